# SPDX-License-Identifier: Apache-2.0
"""Command that changes the size of an NVDIMM."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nvdimm_driver.backing import paths
from nvdimm_driver.cmd.ctl.base import (
    Action,
    check_single,
    domain_argument,
    find,
    items_of,
    size_argument,
    up_to_date,
)
from nvdimm_driver.errors import ConfigError, NotFoundError, ProtocolError, RefusedError
from nvdimm_driver.model import SIZE_STEP
from nvdimm_driver.sizes import align_up, human

if TYPE_CHECKING:
    from nvdimm_driver.model import Record


class Resize(Action):
    """Make an NVDIMM of a domain that is off larger: its file, and the domain's definition.

    The guest's bytes and labels stay.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        domain_argument(parser)
        parser.add_argument(
            "size",
            metavar="SIZE",
            type=size_argument,
            help="size with the label area, such as 64GiB; rounded up to 2 MiB",
        )
        parser.add_argument("--slot", type=int, help="the NVDIMM in this slot of the domain")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        driver = up_to_date(self.app)
        record = find(driver, parsed_args.domain)
        items = items_of(record, parsed_args.slot)
        check_single(record.name, items, "say which with --slot")
        spec, size = items[0].spec, align_up(parsed_args.size, SIZE_STEP)
        if size < spec.size:
            raise RefusedError(
                f"{spec.path}: has {human(spec.size)} and would have {human(size)}: the guest would lose its end",
                hint="give the domain a copy of its own (guide: Changing the size)",
            )
        if size > spec.size:
            _define(self.app.conf.rpc.socket, record, spec.path, size)
        print(f"{record.name} has {human(size)} in slot {spec.slot}, {spec.path}")
        return 0


def _define(socket: str, record: Record, path: str, size: int) -> None:
    """Define a domain with another size of one NVDIMM, through nvdimmd, which does what is to be done for that.

    :param path: resolved.
    """
    from nvdimm_driver.doctor.libvirt import Connection
    from nvdimm_driver.rpc.xdr import LibvirtError, RemoteError
    from nvdimm_driver.xml.edit_devices import paths_in, with_size

    try:
        with Connection(socket, None) as connection:
            domain = connection.find(record.uuid)
            xml = connection.xml(domain, inactive=True, secure=True) if domain else ""
            named = next((each for each in paths_in(xml) if paths.resolve(each) == path), None) if xml else None
            if named is None:
                raise NotFoundError(
                    f"domain {record.name} has no definition with {path}",
                    hint="'nvdimmctl check' compares what libvirt and the ledger have",
                )
            connection.define(with_size(xml, named, size))
    except LibvirtError as error:
        raise RefusedError(f"libvirt: {RemoteError.unpack(error.payload).message}") from error
    except (OSError, ProtocolError) as error:
        raise ConfigError(
            f"{socket}: nvdimmd cannot be asked: {error}", hint="start it: systemctl start nvdimmd.socket"
        ) from error
