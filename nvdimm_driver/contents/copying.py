# SPDX-License-Identifier: Apache-2.0
"""Copying of bytes. It can be interrupted at any time and repeated: bytes that are right are not written again."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import MIB, Progress
from nvdimm_driver.plugins import ByteRange

_CHUNK = MIB


def copy(source: ByteRange, target: ByteRange, progress: Progress) -> str:
    """Copy the source to the target, durably, with zeros behind the end of a shorter source.

    Bytes of the target that are right are read and not written: holes of a file stay holes, and an interrupted copy is
    soon where it stopped.

    :returns: SHA-256 of the target, in hexadecimal.
    """
    digest = sha256()
    for offset, data in _chunks(source, target.size):
        digest.update(data)
        _put(target, offset, data)
        progress(offset + len(data), target.size)
    target.sync()
    return digest.hexdigest()


def wipe(target: ByteRange, progress: Progress) -> None:
    """Overwrite the target with zeros, durably; zeros are read and not written, as by :func:`copy`."""
    zeros = bytes(_CHUNK)
    for offset in range(0, target.size, _CHUNK):
        length = min(_CHUNK, target.size - offset)
        _put(target, offset, zeros if length == _CHUNK else zeros[:length])
        progress(offset + length, target.size)
    target.sync()


def verify(copied: ByteRange, digest: str, progress: Progress) -> None:
    """Check the SHA-256 of a copy.

    :raises BackingError: when it is another.
    """
    found = sha256()
    for offset, data in _chunks(copied, copied.size):
        found.update(data)
        progress(offset + len(data), copied.size)
    if found.hexdigest() != digest:
        raise BackingError(
            f"the copy differs from what was copied: its SHA-256 is {found.hexdigest()}, not {digest}",
            hint="does another program write to it? If not, its medium is bad: look at the kernel's log",
        )


def _put(target: ByteRange, offset: int, data: bytes) -> None:
    if target.read(offset, len(data)) != data:
        target.write(offset, data)


def _chunks(source: ByteRange, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the source, cut or padded with zeros to that size."""
    for offset in range(0, size, _CHUNK):
        length = min(_CHUNK, size - offset)
        there = max(0, min(length, source.size - offset))
        data = source.read(offset, there) if there else b""
        yield offset, data if there == length else data + bytes(length - there)
