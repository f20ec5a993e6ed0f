# SPDX-License-Identifier: Apache-2.0
"""Ask libvirt whose devices are: the ledger may be from a backup, and their marks lost."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from nvdimm_driver.errors import ConfigError, InUseError

if TYPE_CHECKING:
    from oslo_config import cfg

    from nvdimm_driver.doctor.repair_view import Inconsistency
    from nvdimm_driver.driver import XenNvdimmDriver


def find_device_claims(
    driver: XenNvdimmDriver, conf: cfg.ConfigOpts, named: Collection[str] = ()
) -> list[Inconsistency]:
    """Find the claims to devices that libvirt and the ledger do not agree on.

    :param named: paths that the operator has named.
    :raises ConfigError: when the host has devices, and libvirt cannot be asked.
    """
    from nvdimm_driver.doctor import repair_device_claims
    from nvdimm_driver.doctor.libvirt import daemon_socket
    from nvdimm_driver.xml.hooks import XmlHooks

    socket = daemon_socket(conf.rpc.libvirt_direct_socket, conf.rpc.libvirt_socket)
    return repair_device_claims.look(driver, XmlHooks.from_conf(conf).restore, socket, named)


def check_agreed(driver: XenNvdimmDriver, conf: cfg.ConfigOpts, paths: Collection[str]) -> None:
    """Check that libvirt and the ledger agree whose the devices among these paths are.

    :raises InUseError: when they do not.
    :raises ConfigError: when the host has devices, and libvirt cannot be asked.
    """
    for each in find_device_claims(driver, conf):
        if each.path in paths:
            raise InUseError(f"{each.path}: {each.problem} (domain {each.domain})", hint=each.remedy)


def check_uncontested(driver: XenNvdimmDriver, conf: cfg.ConfigOpts, paths: Collection[str]) -> None:
    """Do what :func:`check_agreed` does before an operator overwrites them.

    Without libvirt, print to standard error that nobody knows.
    """
    try:
        check_agreed(driver, conf, paths)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
