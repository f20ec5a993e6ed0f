# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs as a stream of bytes, to move them to another host: what 'nvdimmctl send' writes and 'receive' reads.

A line that says what it is; a line of JSON with the NVDIMMs; then, for each of them, a record for each MiB: a byte that
says what it is, and the bytes, unless they are zeros or the other side has them; and a last record with the SHA-256 of
the whole. A stream that ends before that was cut off. What comes from another host is not trusted to be well formed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import BinaryIO

from nvdimm_driver.errors import BackingError, RefusedError
from nvdimm_driver.model import MAX_NVDIMMS, MIB, Progress
from nvdimm_driver.plugins import ByteRange

CHUNK = MIB
_MAGIC = b"nvdimm_driver stream 1\n"
_MAX_LINE = 4 * MIB
_DATA, _ZEROS, _SAME, _END = b"D", b"Z", b"S", b"E"
_CUT = "the stream ended before all of it was there"
_CONTINUE = "what has come is kept: 'nvdimmctl receive --sums' says what it is, and 'send --have' sends only the rest"


@dataclass(frozen=True)
class Sent:
    """An NVDIMM in a stream.

    :ivar name: of its file, without its folder.
    :ivar slot: its slot in the domain; None for one of no domain.
    """

    name: str
    size: int
    label_size: int
    slot: int | None


def write_header(out: BinaryIO, nvdimms: Sequence[Sent], *, is_whole: bool) -> None:
    """Begin a stream.

    :param is_whole: the bytes are of one moment: no guest runs with them.
    """
    header = {"whole": is_whole, "nvdimms": [asdict(each) for each in nvdimms]}
    _put(out, _MAGIC + json.dumps(header).encode() + b"\n")


def read_header(stream: BinaryIO) -> tuple[list[Sent], bool]:
    """Return the NVDIMMs of a stream, and whether their bytes are of one moment.

    :raises RefusedError: when it is no such stream.
    """
    line = stream.readline(len(_MAGIC))
    if line != _MAGIC:
        hint = "'nvdimmctl send' of the same version writes one" if line else "nothing came: did 'send' fail?"
        raise RefusedError("what comes is no stream of 'nvdimmctl send'", hint=hint)
    try:
        header = json.loads(stream.readline(_MAX_LINE))
        found = [Sent(**each) for each in header["nvdimms"]]
        for each in found:
            numbers = [each.size, each.label_size, *([] if each.slot is None else [each.slot])]
            if each.slot is not None and each.slot >= MAX_NVDIMMS:
                raise ValueError
            if not all(type(number) is int and number >= 0 for number in numbers) or not _is_name(each.name):
                raise ValueError
        if not found or len({each.name for each in found}) < len(found):
            raise ValueError
        return found, header["whole"] is True
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError("the stream does not say which NVDIMMs it has") from error


def _is_name(name: object) -> bool:
    """Return True for the name of a file, without a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable()


def write(content: ByteRange, out: BinaryIO, have: Sequence[str], progress: Progress) -> str:
    """Write the bytes of an NVDIMM, but for :func:`write_end`.

    :param have: what :func:`sums` has returned on the other side.
    :returns: the SHA-256 of all bytes, in hexadecimal.
    """
    digest, zeros = sha256(), bytes(CHUNK)
    for number, offset in enumerate(range(0, content.size, CHUNK)):
        data = content.read(offset, min(CHUNK, content.size - offset))
        digest.update(data)
        if number < len(have) and sha256(data).hexdigest() == have[number]:
            _put(out, _SAME)
        elif data == zeros[: len(data)]:
            _put(out, _ZEROS)
        else:
            _put(out, _DATA + data)
        progress(offset + len(data), content.size)
    return digest.hexdigest()


def write_end(out: BinaryIO, digest: str) -> None:
    """Write that all bytes of an NVDIMM are there, and were of one moment if the stream says so."""
    _put(out, _END + bytes.fromhex(digest))


def _put(out: BinaryIO, data: bytes) -> None:
    """Write all of the data to a stream that is not buffered.

    :raises RefusedError: when nobody reads it.
    """
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as error:
        hint = "what does 'receive' say?"
        raise RefusedError(f"the stream cannot be written: {error.strerror}", hint=hint) from error


def sums(content: ByteRange) -> Iterator[str]:
    """Yield the SHA-256 of each MiB, in hexadecimal."""
    for offset in range(0, content.size, CHUNK):
        yield sha256(content.read(offset, min(CHUNK, content.size - offset))).hexdigest()


def read_sums(lines: Iterable[str]) -> list[str]:
    """Return what :func:`sums` has yielded, from its lines.

    :raises RefusedError: when a line is none of these.
    """
    found = [line.strip() for line in lines]
    if any(len(each) != sha256().digest_size * 2 for each in found):
        raise RefusedError("what the other side has is not what 'nvdimmctl receive --sums' prints")
    return found


class Received(ByteRange):
    """The bytes of an NVDIMM that come in a stream, from the first to the last, each read once.

    :param target: has the bytes that the stream leaves out.
    """

    def __init__(self, stream: BinaryIO, sent: Sent, target: ByteRange) -> None:
        self.size = sent.size
        self._stream, self._target = stream, target

    def check_end(self, digest: str) -> None:
        """Check that all bytes have come, by the SHA-256 of what was written.

        :raises BackingError: when they have not.
        """
        end = self._take(1 + sha256().digest_size)
        if end != _END + bytes.fromhex(digest):
            raise BackingError("what came differs from what was sent: its SHA-256 is another", hint=_CONTINUE)

    def sync(self) -> None:
        """Do nothing: it is not written."""

    def close(self) -> None:
        """Do nothing: the stream goes on."""

    def _read(self, offset: int, length: int) -> bytes:
        kind = self._take(1)
        if kind == _DATA:
            return self._take(length)
        if kind == _ZEROS:
            return bytes(length)
        if kind == _SAME:
            return self._target.read(offset, length)
        raise BackingError("the stream is damaged", hint=_CONTINUE)

    def _write(self, offset: int, data: bytes) -> None:
        raise NotImplementedError

    def _take(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise BackingError(_CUT, hint=_CONTINUE)
        return data
