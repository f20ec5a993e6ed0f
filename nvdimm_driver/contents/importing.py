# SPDX-License-Identifier: Apache-2.0
"""Provisioning and import of backings: in place, or by a copy.

All of this can be interrupted, by KeyboardInterrupt too, and repeated: a repetition continues where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from typing import BinaryIO

from nvdimm_driver.backing.files import check_copy_name, hidden_name
from nvdimm_driver.contents import copying, ordinary_files, streams
from nvdimm_driver.contents.shared_checks import Checks, reporting_errors_of
from nvdimm_driver.errors import BackingError, RefusedError, UnsupportedError
from nvdimm_driver.labels import index_block
from nvdimm_driver.model import KIB, MIN_LABEL_SIZE, PAGE, SUPERPAGE, BackingIdentity, Intake, NvdimmSpec, Watch
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.shell import command
from nvdimm_driver.sizes import human

_RUNNING = "shut it down first, or copy it while it changes with 'nvdimmctl export --running', and import that copy"

_LABEL_STEP = 64 * KIB
"""Sizes of label areas that are looked for in the middle of a file are multiples of this."""


class Importer:
    """Provisions and imports backings that no domain owns yet."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def provision(self, spec: NvdimmSpec, watch: Watch) -> Intake:
        """Provision a backing that no domain owns yet: a new one is all zeros, an existing one keeps its bytes.

        :returns: the work that there was to do.
        :raises RefusedError: when it is in no pool, or a pool's rules forbid it.
        :raises InUseError: when a domain owns it.
        """
        self._checks.check_new(spec)
        backing = backing_of(self._checks.backings, spec.path)
        intake = backing.examine(spec)
        backing.provision(spec, watch("writing zeros"))
        return intake

    def default_label_size(self, path: str, size: int, wanted: int) -> int:
        """Return the bytes of the label area that an NVDIMM is to have if nobody says.

        :param wanted: what its pool gives a new one. An existing backing gets that only if all of it is zeros still: no
            label area may hide data.
        :raises BackingError: when an existing one has labels behind the end of the NVDIMM.
        """
        backing = backing_of(self._checks.backings, path)
        if not backing.exists(path):
            return wanted
        size = new_nvdimm(path, size, 0).size
        self._check_end(backing, path, size)
        try:
            opened = backing.open_bytes(NvdimmSpec(0, path, size))
        except UnsupportedError:  # the host cannot read it
            return wanted
        with opened as content:
            is_unused = wanted <= size and content.read(size - wanted, wanted) == bytes(wanted)
            return _found_label_size(content, size) or (wanted if is_unused else 0)

    def import_in_place(self, path: str, size: int | None, label_size: int | None, watch: Watch) -> NvdimmSpec:
        """Import a file or device that is in a pool, with the bytes that it has.

        :param path: absolute.
        :param size: bytes of the NVDIMM, from the start of the file or device; None for all.
        :param label_size: bytes of the label area, 0 for none; None for the label area that is found in it.
        :raises NotFoundError: when there is no such file or device.
        :raises BackingError: when it is not fit.
        """
        self._checks.pools.check_place(path)
        backing = backing_of(self._checks.backings, path)
        whole = size is None
        size = _checked_size(path, backing.size(path) if size is None else size)
        if label_size is None:
            self._check_end(backing, path, size)
        with backing.open_bytes(NvdimmSpec(0, path, size)) as content:
            ordinary_files.check_raw(path, content.read(0, PAGE))
            label_size = _label_size(path, content, size, whole=whole) if label_size is None else label_size
        spec = new_nvdimm(path, size, label_size)
        self._checks.check_new(spec)
        backing.fill_holes(spec)  # QEMU makes sparse files
        backing.provision(spec, watch("writing zeros"))
        return spec

    def import_copy(
        self, source: str, path: str, size: int | None, label_size: int | None, watch: Watch, *, overwrite: bool = False
    ) -> NvdimmSpec:
        """Make a backing with the bytes of a file or block device that is elsewhere.

        :param source: resolved path.
        :param path: path of the backing, absolute.
        :param size: bytes of the NVDIMM, with zeros behind the end of a smaller source, or from the start of a larger
            one; None for the source's size.
        :param label_size: as for :meth:`import_in_place`.
        :param overwrite: overwrite what is on a device.
        :raises NotFoundError: when there is no such source.
        :raises InUseError: when a domain runs with the source, or owns the path.
        :raises UnsupportedError: when the source is an image that is not raw.
        :raises RefusedError: when the path is in no pool, a pool's rules forbid it, or something would be overwritten.
        """
        last = self._checks.check_off(source, _RUNNING)
        with reporting_errors_of(source), ordinary_files.open_source(source) as content:
            ordinary_files.check_raw(source, content.read(0, min(PAGE, content.size)))
            if size is not None:
                _check_end(source, content, size)
            whole, size = size is None, _checked_size(source, content.size if size is None else size)
            if label_size is None:
                label_size = _label_size(source, content, min(size, content.size), whole=whole)
                if size < content.size and not label_size:
                    raise BackingError(
                        f"{source}: has {human(content.size)}, and no label area ends at {human(size)}",
                        hint="if --size is right, give --label-size as in the XML on KVM, 0 for none: the rest of the "
                        "file is not copied",
                    )
            spec = new_nvdimm(path, size, label_size)
            self._checks.check_new(spec)
            backing_of(self._checks.backings, path)
            _check_overwrite(path, overwrite)
            hidden, digest = self._copy_in(lambda _: content, spec, watch)
            with backing_of(self._checks.backings, path).open_bytes(hidden, write=True) as target:  # as nobody else can
                copying.verify(target, digest, watch("verifying"))
                self._checks.check_off_since(last, source, _RUNNING)
                self._publish(hidden, spec, target.identity)
        return spec

    def _check_end(self, backing: Backing, path: str, size: int) -> None:
        """Check that what exists has no label area behind the end of an NVDIMM of that size.

        :raises BackingError: when it has.
        """
        whole = backing.size(path) // PAGE * PAGE if backing.exists(path) else 0
        if whole <= size:
            return
        try:
            opened = backing.open_bytes(NvdimmSpec(0, path, whole))
        except UnsupportedError:  # the host cannot read it
            return
        with opened as content:
            _check_end(path, content, size)

    def receive(
        self,
        stream: BinaryIO,
        sent: Sequence[streams.Sent],
        paths: Sequence[str],
        watched: Callable[[str], AbstractContextManager[Watch]],
        *,
        is_whole: bool,
        overwrite: bool = False,
    ) -> list[NvdimmSpec]:
        """Make backings with the bytes of the NVDIMMs that come in a stream.

        None gets its name before all have come: the bytes of one domain are of one moment.

        :param paths: path of the backing of each, absolute.
        :param watched: shows the progress of the work on a path.
        :param is_whole: they get their names; otherwise, they keep their hidden names until the rest has come.
        :param overwrite: overwrite what is on a device.
        :raises BackingError: when the stream is cut off or damaged, or more comes than it says: what has come is kept.
        :raises InUseError: when a domain owns a path.
        :raises RefusedError: when a path is in no pool, a pool's rules forbid it, or something would be overwritten.
        """
        specs = [
            new_nvdimm(path, _checked_size(path, each.size), each.label_size)
            for each, path in zip(sent, paths, strict=True)
        ]
        for path, spec in zip(paths, specs, strict=True):
            self._checks.check_new(spec)
            _check_overwrite(path, overwrite)
            if not is_whole and os.path.exists(path) and not os.path.isfile(path):
                raise RefusedError(
                    f"{path}: a device cannot wait for the rest: it has no other name until then",
                    hint="shut the domain down, and send without --running",
                )
        came = []
        for each, path, spec in zip(sent, paths, specs, strict=True):
            with watched(path) as watch, reporting_errors_of(path):
                came.append(self._receive(stream, each, spec, watch))
        if stream.read(1):
            raise BackingError(
                "more comes than the stream says", hint="one 'receive' takes what one 'send' writes: send it again"
            )
        with ExitStack() as opened:
            targets = []
            for path, spec, (hidden, digest) in zip(paths, specs, came, strict=True) if is_whole else ():
                with watched(path) as watch, reporting_errors_of(path):
                    target = opened.enter_context(
                        backing_of(self._checks.backings, path).open_bytes(hidden, write=True)
                    )
                    copying.verify(target, digest, watch("verifying"))
                    targets.append((path, spec, hidden, target))
            for path, spec, hidden, target in targets:
                with reporting_errors_of(path):
                    self._publish(hidden, spec, target.identity)
        return specs

    def _receive(self, stream: BinaryIO, sent: streams.Sent, spec: NvdimmSpec, watch: Watch) -> tuple[NvdimmSpec, str]:
        """Do what :meth:`_copy_in` does, with what comes in a stream."""
        received: list[streams.Received] = []

        def come(target: ByteRange) -> ByteRange:
            received.append(streams.Received(stream, sent, target))
            return received[0]

        hidden, digest = self._copy_in(come, spec, watch)
        received[0].check_end(digest)
        return hidden, digest

    def sums(self, path: str) -> Iterator[str]:
        """Yield the SHA-256 of each MiB of what has come for a path so far; nothing when nothing has."""
        backing, hidden = backing_of(self._checks.backings, path), hidden_name(path)
        there = hidden if backing.exists(hidden) else path
        if backing.exists(there):
            with backing.open_bytes(NvdimmSpec(0, there, backing.size(there))) as content:
                yield from streams.sums(content)

    def _copy_in(
        self, content_for: Callable[[ByteRange], ByteRange], spec: NvdimmSpec, watch: Watch
    ) -> tuple[NvdimmSpec, str]:
        """Copy into a backing under its hidden name, if it can have one.

        :param content_for: returns what is to be copied into an open range.
        :returns: what it is until :meth:`_publish`, and the SHA-256 of the bytes.
        """
        backing = backing_of(self._checks.backings, spec.path)
        check_copy_name(spec.path)
        self._checks.check_unowned(hidden_name(spec.path))
        hidden = backing.allocate(spec)
        with backing.open_bytes(hidden, write=True) as target:
            self._checks.check_new(spec)  # from here on, a start fails as long as this is open
            self._checks.check_unowned(hidden.path, target.identity)
            self._checks.tell_overwritten(hidden.path, target)
            digest = copying.copy(content_for(target), target, watch("copying"))
        backing.provision(hidden, watch("writing zeros"))
        return hidden, digest

    def _publish(self, hidden: NvdimmSpec, spec: NvdimmSpec, identity: BackingIdentity | None) -> None:
        self._checks.check_new(spec)
        if hidden != spec:
            self._checks.check_unowned(hidden.path)
        backing_of(self._checks.backings, spec.path).publish(spec, identity)


def new_nvdimm(path: str, size: int, label_size: int) -> NvdimmSpec:
    """Return an NVDIMM of that size, rounded up as libvirt does.

    :param path: absolute.
    :param size: bytes.
    :param label_size: bytes of its label area, 0 for none.
    :raises BackingError: when no domain could have it.
    """
    try:
        return NvdimmSpec.of_size(size, slot=0, path=path, label_size=label_size or None)
    except ValueError as error:
        raise BackingError(f"{path}: {error}", hint="change --size or --label-size") from error


def _checked_size(path: str, size: int) -> int:
    if not size or size % SUPERPAGE:
        raise BackingError(
            f"{path}: {human(size)} ({size} bytes) is not a multiple of 2 MiB",
            hint="set the NVDIMM's size with --size: on KVM, it is the size in the domain XML, rounded up to 2 MiB",
        )
    return size


def _check_overwrite(path: str, overwrite: bool) -> None:
    if os.path.isfile(path) and os.path.getsize(path):
        raise RefusedError(
            f"{path}: exists already",
            hint=f"take another --name; to import it as it is: {command('nvdimmctl', 'import', path)}",
        )
    if os.path.exists(path) and not os.path.isfile(path) and not overwrite:
        raise RefusedError(f"{path}: what is on it would be overwritten", hint="--force overwrites it")


def _check_end(path: str, content: ByteRange, size: int) -> None:
    """Check that a file or device with a label area at its end becomes an NVDIMM of its own size.

    :raises BackingError: when it does not.
    """
    found = _found_label_size(content, content.size) if content.size != size else 0
    if found:
        raise BackingError(
            f"{path}: has {human(content.size)}, {human(found)} of it a label area at its end, and cannot become an "
            f"NVDIMM of {human(size)}",
            hint=f"leave --size out, or give all: --size {content.size}",
        )


def _label_size(path: str, content: ByteRange, size: int, *, whole: bool) -> int:
    """Return the bytes of the label area at the end of what becomes an NVDIMM, 0 for none.

    :param size: bytes of it.
    :param whole: nobody gave the size of the NVDIMM: a file may be larger than it was on KVM.
    :raises BackingError: when there is one in the middle instead, which the guest would have as data.
    """
    found = _found_label_size(content, size)
    if whole and not found:
        for end, label_size in _inner_areas(content):
            raise BackingError(
                f"{path}: has no label area at its end, and one of {human(label_size)} that ends at {human(end)}",
                hint=f"if the NVDIMM is smaller than the file, give its size: --size {end}; if not, --label-size 0 "
                "takes all as data",
            )
    return found


def _inner_areas(content: ByteRange) -> Iterator[tuple[int, int]]:
    """Yield ends and sizes of label areas at the ends of smaller NVDIMMs, of multiples of 64 KiB.

    Of what looks like one, no more than ``index_block.MAX_CHECKSUMS`` are read: the bytes are a guest's.
    """
    for start, end in islice(_possible_areas(content), index_block.MAX_CHECKSUMS):
        if index_block.label_area_size(content.read(start, end - start)) == end - start:
            yield end, end - start


def _possible_areas(content: ByteRange) -> Iterator[tuple[int, int]]:
    for start in range(0, content.size - MIN_LABEL_SIZE, _LABEL_STEP):
        if used := index_block.first_end(content.read(start, index_block.HEAD)):
            end = -(-(start + used) // SUPERPAGE) * SUPERPAGE
            if end < content.size and end - start <= index_block.TAIL:
                yield start, end


def _found_label_size(content: ByteRange, end: int) -> int:
    length = min(index_block.TAIL, end)
    return index_block.label_area_size(content.read(end - length, length))
