# SPDX-License-Identifier: Apache-2.0
"""Export: copies of NVDIMMs in ordinary files, which KVM guests can use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from nvdimm_driver.backing.files import check_copy_name, export_name
from nvdimm_driver.backing.identity import check_same_bytes
from nvdimm_driver.contents import copying, ordinary_files, streams
from nvdimm_driver.contents.shared_checks import Checks, reporting_errors_of
from nvdimm_driver.model import Allocation, NvdimmSpec, Watch
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.state import ownership

_RUNNING = "shut it down first, or copy it while it changes with --running"


class Exporter:
    """Copies NVDIMMs out of persistent memory into files."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def export(
        self,
        spec: NvdimmSpec,
        destination: str,
        watch: Watch,
        *,
        overwrite: bool,
        running: bool,
        item: Allocation | None = None,
    ) -> str:
        """Copy an NVDIMM into an ordinary file, in which zeros are holes, and verify the copy.

        :param destination: path, as :func:`.paths.resolve_folder` returns it.
        :param overwrite: replace a file of that name.
        :param running: copy also while a domain runs with the NVDIMM and may change it.
        :param item: the domain's NVDIMM that it must be; None to copy whatever is at the path.
        :returns: SHA-256 of the copy, in hexadecimal.
        :raises RefusedError: when the destination exists and may not be replaced, or is a symbolic link or no file.
        :raises InUseError: when a domain runs with the NVDIMM, or owns the destination, or when the NVDIMM is
            another domain's by its mark.
        :raises BackingError: when it is not the one that was provisioned, or a guest may have written to it that does
            not have it.
        """
        check_copy_name(destination)
        ordinary_files.check_no_link(destination)
        last = {} if running else self._checks.check_off(spec.path, _RUNNING)
        self._checks.check_unshared(item.uuid if item else "", spec.path)
        for path in (destination, export_name(destination)):
            self._checks.check_unowned(path)
        backing = backing_of(self._checks.backings, spec.path)
        with (
            reporting_errors_of(spec.path),
            self._opened(backing, spec, item) as content,
            ordinary_files.opened_destination(destination, spec.size, overwrite=overwrite) as copy,
        ):
            digest = copying.copy(content, copy.content, watch("copying"))
            copying.verify(copy.content, digest, watch("verifying"))
            if not running:
                self._checks.check_off_since(last, spec.path, _RUNNING)
            self._checks.check_unowned(destination)  # a domain may have taken it meanwhile
            copy.publish()
        return digest

    def send(
        self,
        nvdimms: Sequence[tuple[NvdimmSpec, Allocation | None]],
        out: BinaryIO,
        watch: Watch,
        *,
        running: bool,
        have: Sequence[str] = (),
    ) -> None:
        """Write NVDIMMs to a stream, for 'receive' on another host; nothing is changed here.

        :param nvdimms: each with the domain's NVDIMM that it must be, as for :meth:`export`.
        :param running: send also while a domain runs with one and may change it: the other side keeps what comes, and
            waits for the rest.
        :param have: sums of what the other side has of a single one.
        :raises InUseError: when a domain runs with one, or has run with it meanwhile, and as :meth:`export` does.
        :raises BackingError: as :meth:`export` does.
        """
        hint = "shut it down first, or send it while it changes with --running"
        last = [{} if running else self._checks.check_off(spec.path, hint) for spec, _ in nvdimms]
        slots = [item.spec.own_slot if item else None for _, item in nvdimms]
        streams.write_header(
            out,
            [
                streams.Sent(os.path.basename(spec.path), spec.size, spec.label_size, slot)
                for (spec, _), slot in zip(nvdimms, slots, strict=True)
            ],
            is_whole=not running,
        )
        for number, (spec, item) in enumerate(nvdimms, 1):
            self._checks.check_unshared(item.uuid if item else "", spec.path)
            backing = backing_of(self._checks.backings, spec.path)
            with reporting_errors_of(spec.path), self._opened(backing, spec, item) as content:
                digest = streams.write(content, out, have, watch(f"sending {os.path.basename(spec.path)}"))
            for (before, _), had in zip(nvdimms[:number], last[:number], strict=True) if not running else ():
                self._checks.check_off_since(had, before.path, hint)
            streams.write_end(out, digest)

    @contextmanager
    def _opened(self, backing: Backing, spec: NvdimmSpec, item: Allocation | None) -> Iterator[ByteRange]:
        """Open an NVDIMM, before anything is written to the destination, which may be the only good copy of it."""
        with backing.open_bytes(spec) as content:
            if item is not None and item.identity is not None:
                self._checks.unknown.check(item.uuid, {spec.path: content.identity})
                self._checks.check_same(spec.path, item.identity)
                if content.identity is not None:
                    check_same_bytes(spec.path, content.identity, item.identity)
            yield content

    def find_owned(self, path: str) -> Allocation | None:
        """Return the domain's NVDIMM whose bytes are at a path; None when no domain has them, or several have."""
        identity = self._checks.identity(path)
        records = ownership.owners(self._checks.ledger, path, identity)
        items = [item for record in records for item in record.allocations if ownership.has_bytes([item], identity)]
        return items[0] if len(items) == 1 else None

    def is_in_use(self, path: str) -> bool:
        """Return True when a domain runs with the backing at a path."""
        owners = ownership.owners(self._checks.ledger, path, self._checks.identity(path))
        return any(record.start is not None for record in owners)
