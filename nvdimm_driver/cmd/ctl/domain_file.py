# SPDX-License-Identifier: Apache-2.0
"""Base class and functions of the commands that take a domain XML file."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Action
from nvdimm_driver.errors import ConfigError, DomainXmlError, NotFoundError
from nvdimm_driver.sizes import human

if TYPE_CHECKING:
    from oslo_config import cfg

    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import DomainSpec

FILE_HELP = "domain XML file, or - for standard input"


class FileAction(Action):
    """A command that takes one domain XML file."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", metavar="FILE", help=FILE_HELP)
        return parser


def host_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--host``."""
    parser.add_argument(
        "--host",
        metavar="HOSTFILE",
        help="use the host that this file describes, as 'nvdimmctl host' prints it, instead of this machine",
    )


def read_file(file: str) -> bytes:
    """Return what is in a file, or in standard input for ``-``.

    :raises NotFoundError: when there is no such file.
    :raises ConfigError: when it cannot be read.
    """
    from nvdimm_driver.xml.document import MAX_BYTES

    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)  # what is longer is refused; /dev/zero has no end
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def read_xml(file: str) -> str:
    """Return the XML in a file, in the encoding that it declares; for its errors see :func:`read_file`.

    :raises DomainXmlError: when it is not in that encoding.
    """
    from nvdimm_driver.xml.document import MAX_BYTES, decode

    data = read_file(file)
    if len(data) > MAX_BYTES:
        raise DomainXmlError(f"{file}: has more than {human(MAX_BYTES)}, which is all that libvirt takes")
    try:
        return decode(data)
    except DomainXmlError as error:
        raise DomainXmlError(f"{file}: {error.message}", hint=error.hint) from error


def domain_in(xml: str, file: str, options: cfg.ConfigOpts) -> DomainSpec:
    """Return the domain that a domain XML file describes, rewritten or as the user wrote it.

    :raises DomainXmlError: when it is not a Xen domain with NVDIMMs.
    """
    from nvdimm_driver.xml.hooks import XmlHooks
    from nvdimm_driver.xml.parse_domain import extract, why_none

    xml = XmlHooks.from_conf(options).restore(xml)
    domain = extract(xml)
    if domain is None:
        raise DomainXmlError(f"{file} is not a Xen domain with NVDIMMs", hint=why_none(xml))
    return domain


def driver_for(options: cfg.ConfigOpts, host_file: str | None) -> XenNvdimmDriver:
    """Return the driver of this host, or a driver that only plans, for the host that a file describes."""
    from nvdimm_driver.driver import driver_class, load_driver

    if host_file is None:
        return load_driver(options)
    from nvdimm_driver import plugin_loader
    from nvdimm_driver.backing.host_file import HostDescription
    from nvdimm_driver.backing.paper import PaperBacking
    from nvdimm_driver.lifecycle.emulators import Emulators
    from nvdimm_driver.lifecycle.plan import HostFacts
    from nvdimm_driver.model import GIB
    from nvdimm_driver.pools.rules import Pools
    from nvdimm_driver.state.ledger import Ledger
    from nvdimm_driver.xen.dry_run import DryRunMapper

    host = HostDescription.from_json(read_file(host_file), host_file)
    return driver_class(options)(
        ledger=Ledger(":memory:"),
        state_dir=Path(options.state_dir),
        backings=[PaperBacking(host)],
        acpi=plugin_loader.load("nvdimm_driver.acpi_builders", options.acpi.builder, options),
        mapper=DryRunMapper(),
        host=HostFacts(host.physical_address_bits),
        emulators=Emulators.from_conf(options, lambda path: None),  # its files are not here
        gap=options.layout.gap_gib * GIB,
        dsm=options.acpi.dsm,
        cache=options.xen.cache,
        hotplug=options.xen.hotplug,
        pools=Pools([], any_path=True),
    )
