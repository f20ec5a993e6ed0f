# SPDX-License-Identifier: Apache-2.0
"""Warnings of commands that take the NVDIMMs of a saved guest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nvdimm_driver.errors import ProtocolError

if TYPE_CHECKING:
    from nvdimm_driver.cmd.nvdimmctl import Nvdimmctl
    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import Record

_TIMEOUT = 5.0


def warn_of_saved_guest(app: Nvdimmctl, driver: XenNvdimmDriver, record: Record) -> None:
    """Print to standard error that a domain has a saved guest, or may have one, which cannot go on afterwards.

    One whose run the ledger does not have could go on with the ledger of its time.
    """
    run = driver.ledger.find_run(record.uuid)
    if record.start is not None or (run is not None and not run.number):
        return  # no guest that was saved could go on in any case
    has = _has_managed_save(app, record)
    if has is None:
        print(f"libvirt cannot be asked whether {record.name} has a saved guest: it could not go on", file=sys.stderr)
    elif has:
        print(
            f"{record.name} has a saved guest (virsh managedsave), which cannot go on without these bytes",
            file=sys.stderr,
        )


def _has_managed_save(app: Nvdimmctl, record: Record) -> bool | None:
    """Return what libvirt says; None when it cannot be asked."""
    from nvdimm_driver.doctor.libvirt import Connection, daemon_socket
    from nvdimm_driver.rpc.xdr import LibvirtError

    options = app.conf.rpc
    try:
        with Connection(daemon_socket(options.libvirt_direct_socket, options.libvirt_socket), _TIMEOUT) as connection:
            return connection.has_managed_save(record.name, record.uuid, app.conf.libvirt.save_dir)
    except (OSError, LibvirtError, ProtocolError):
        return None
