"""The bytes of backings, which no domain needs to be defined for: made, taken over, copied in and out, overwritten.

All of this can be interrupted, by KeyboardInterrupt too, and done again: what was done is found and not done twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from nvdimm_driver.backing.files import HINTS
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.contents import copying, ordinary_files
from nvdimm_driver.errors import BackingError, NotFoundError, RefusedError
from nvdimm_driver.labels import index_block
from nvdimm_driver.model import PAGE, SUPERPAGE, Allocation, BackingIdentity, Intake, NvdimmSpec, Record, Watch
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.sizes import human
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml import parse_domain as domxml


class Contents:
    """What can be done to the bytes of backings that no running domain has.

    The ledger has to be reconciled with the domains that run before each call.
    """

    def __init__(self, ledger: Ledger, backings: Sequence[Backing], pools: Pools) -> None:
        self.ledger = ledger
        self.backings = backings
        self.pools = pools

    def provision(self, spec: NvdimmSpec, watch: Watch) -> Intake:
        """Make a backing that no domain has yet: all of it zeros, or as it is when it exists.

        :returns: what was to be done.
        :raises RefusedError: when the pools do not have it.
        :raises InUseError: when a domain has it.
        """
        self._check_new(spec)
        backing = backing_of(self.backings, spec.path)
        intake = backing.examine(spec)
        backing.provision(spec, watch("writing zeros"))
        return intake

    def adopt(self, path: str, size: int | None, label_size: int | None, watch: Watch) -> NvdimmSpec:
        """Take over a file or device that is in a pool, with the bytes that it has.

        :param path: absolute.
        :param size: bytes of it that are to be the NVDIMM; None for all.
        :param label_size: of its label area; None for the one that is found in it.
        :raises NotFoundError: when there is none.
        :raises BackingError: when it is not fit.
        """
        self.pools.check_place(path)
        backing = backing_of(self.backings, path)
        size = _checked_size(path, backing.size(path) if size is None else size)
        with backing.open_bytes(NvdimmSpec(0, path, size)) as content:
            ordinary_files.check_raw(path, content.read(0, PAGE))
            label_size = _label_size(content) if label_size is None else label_size
        spec = domxml.new_nvdimm(path, size, label_size)
        self._check_new(spec)
        backing.fill_holes(spec)  # QEMU makes sparse files
        backing.provision(spec, watch("writing zeros"))
        return spec

    def copy_in(
        self, source: str, path: str, size: int | None, label_size: int | None, watch: Watch, *, overwrite: bool = False
    ) -> NvdimmSpec:
        """Make a backing with the bytes of a file or block device that is elsewhere.

        :param path: where it is to be, absolute.
        :param size: of the NVDIMM, which has zeros behind the end of a smaller source; None for that of the source.
        :param label_size: as for :meth:`adopt`.
        :param overwrite: what a device has may be overwritten.
        :raises NotFoundError: when there is no such source.
        :raises UnsupportedError: when it is an image that is not raw.
        :raises RefusedError: when the pools do not have the path, or something is there.
        """
        with _told(source), ordinary_files.open_source(source) as content:
            ordinary_files.check_raw(source, content.read(0, min(PAGE, content.size)))
            found = _label_size(content)
            size = _checked_size(source, content.size if size is None else size)
            if size < content.size or (found and size != content.size):
                raise BackingError(
                    f"{source}: has {content.size} bytes, {human(found)} of them a label area, and cannot become an "
                    f"NVDIMM of {size}",
                    hint="leave --size out, or make it larger, which a source with labels cannot be",
                )
            spec = domxml.new_nvdimm(path, size, found if label_size is None else label_size)
            self._check_new(spec)
            _check_overwrite(path, overwrite)
            self._copy_in(content, spec, watch)
        return spec

    def copy_out(self, spec: NvdimmSpec, destination: str, watch: Watch, *, overwrite: bool, running: bool) -> str:
        """Copy an NVDIMM into an ordinary file, in which zeros are holes, and check the copy.

        :param overwrite: a file of that name may be replaced.
        :param running: do it also while a domain runs with it, which may then change what is copied.
        :returns: SHA-256 of the copy, in hexadecimal.
        :raises InUseError: when a domain runs with it, or has the destination.
        """
        if not running:
            self._check_off(spec.path)
        ownership.check_free(self.ledger, destination, self._identity(destination))
        backing = backing_of(self.backings, spec.path)
        with (
            _told(spec.path),
            backing.open_bytes(spec) as content,
            ordinary_files.open_destination(destination, spec.size, overwrite=overwrite) as copy,
        ):
            digest = copying.copy(content, copy, watch("copying"))
            copying.verify(copy, digest, watch("verifying"))
        if not running:
            self._check_off(spec.path)
        ordinary_files.publish(destination, overwrite=overwrite)
        return digest

    def is_in_use(self, path: str) -> bool:
        """Whether a domain runs with what is at a path."""
        owners = ownership.owners(self.ledger, path, self._identity(path))
        return any(record.attachment is not None for record in owners)

    def wipe(self, spec: NvdimmSpec, watch: Watch, identity: BackingIdentity | None = None) -> None:
        """Overwrite an NVDIMM with zeros, its label area too; they are durable on return. Claims stay.

        :param identity: what it has to be, when that is known.
        :raises RefusedError: when it is in no pool.
        :raises NotFoundError: when it is not there.
        :raises BackingError: when it is something else.
        :raises InUseError: when a domain runs with it.
        """
        self.pools.check_place(spec.path)
        self._check_same(spec.path, identity)
        self._check_off(spec.path)  # what a domain runs with cannot be opened for writing
        backing = backing_of(self.backings, spec.path)
        with _told(spec.path), backing.open_bytes(spec, write=True) as content:
            self._check_off(spec.path)  # from here on, a start fails as long as this is open
            copying.wipe(content, watch("wiping"))

    def to_wipe(self, record: Record) -> tuple[Allocation, ...]:
        """Those of a domain's NVDIMMs that its pools want wiped when it gives them up."""
        pools = [(item, self.pools.of(item.spec.path)) for item in record.allocations]
        return tuple(item for item, pool in pools if pool is not None and pool.wipe_on_release)

    def give_up(self, record: Record, watch: Watch, *, delete: bool) -> None:
        """Give up a domain's claim to its backings, after wiping those of :meth:`to_wipe`.

        :param delete: delete the files, too; devices stay.
        :raises InUseError: while the domain runs.
        """
        ownership.check_off(record)
        for item in self.to_wipe(record):
            with suppress(NotFoundError):
                self.wipe(item.spec, watch, item.identity)
        for item in record.allocations if delete else ():
            self._check_same(item.spec.path, item.identity)
            backing_of(self.backings, item.spec.path).discard(item.spec)
        ownership.give_up(self.ledger, self.backings, self.ledger.domain(record.uuid) or record)

    def _copy_in(self, content: ByteRange, spec: NvdimmSpec, watch: Watch) -> None:
        backing = backing_of(self.backings, spec.path)
        hidden = backing.allocate(spec)
        with backing.open_bytes(hidden, write=True) as target:
            digest = copying.copy(content, target, watch("copying"))
        backing.provision(hidden, watch("writing zeros"))
        with backing.open_bytes(hidden) as target:
            copying.verify(target, digest, watch("verifying"))
        backing.publish(spec)

    def _check_new(self, spec: NvdimmSpec) -> None:
        self.pools.check_new([spec], self.ledger.domains())
        ownership.check_free(self.ledger, spec.path, self._identity(spec.path))

    def _check_off(self, path: str) -> None:
        for record in ownership.owners(self.ledger, path, self._identity(path)):
            ownership.check_off(record)

    def _check_same(self, path: str, identity: BackingIdentity | None) -> None:
        found = self._identity(path)
        if found is not None and identity is not None:
            check_identity(path, found, identity)

    def _identity(self, path: str) -> BackingIdentity | None:
        """What is at a path; None for nothing, and for what no domain can have."""
        try:
            return backing_of(self.backings, path).locate(NvdimmSpec(0, path, PAGE)).identity
        except BackingError:
            return None


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What the system says of bytes that are read or written is reported with what was worked on."""
    try:
        yield
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error


def _checked_size(path: str, size: int) -> int:
    if not size or size % SUPERPAGE:
        raise BackingError(
            f"{path}: {size} bytes are not a multiple of 2 MiB",
            hint="--size says how much of it the NVDIMM has: on KVM, what its domain XML says, rounded up to 2 MiB",
        )
    return size


def _check_overwrite(path: str, overwrite: bool) -> None:
    if os.path.isfile(path) and os.path.getsize(path):
        raise RefusedError(
            f"{path}: exists already", hint=f"take another --name; 'nvdimmctl import {path}' takes it as it is"
        )
    if os.path.exists(path) and not os.path.isfile(path) and not overwrite:
        raise RefusedError(f"{path}: what is on it would be overwritten", hint="--force does so")


def _label_size(content: ByteRange) -> int:
    length = min(index_block.TAIL, content.size)
    return index_block.label_area_size(content.read(content.size - length, length))
