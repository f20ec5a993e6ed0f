# SPDX-License-Identifier: Apache-2.0
"""The options of Nova's own configuration that the driver needs. Nova need not be installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oslo_config import cfg

from nvdimm_driver import conf_files
from nvdimm_driver.errors import ConfigError

_LIBVIRT = [
    cfg.StrOpt("virt_type", default=""),
    cfg.StrOpt("connection_uri", default=""),
    cfg.ListOpt("pmem_namespaces", default=[]),
]
_SCHEDULER = [cfg.ListOpt("enabled_filters", default=[])]


@dataclass(frozen=True)
class NovaConf:
    """Options of Nova, by their names; empty when the files do not set them.

    :ivar files: the files that were read.
    :ivar enabled_filters: the scheduler's.
    """

    files: tuple[str, ...]
    compute_driver: str
    virt_type: str
    connection_uri: str
    pmem_namespaces: tuple[str, ...]
    enabled_filters: tuple[str, ...]


def read(files: Sequence[str] | None = None, *, etc: str = "/etc") -> NovaConf:
    """Read Nova's configuration as nova-compute does.

    :param files: files to read instead of the standard ones, nova.conf and nova-compute.conf in /etc/nova.
    :param etc: that folder of theirs.
    :raises ConfigError: when a file cannot be read.
    """
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("compute_driver", default=""))
    conf.register_opts(_LIBVIRT, group="libvirt")
    conf.register_opts(_SCHEDULER, group="filter_scheduler")
    try:
        conf_files.read(conf, "nova", files, prog="nova-compute", etc=etc)
        return NovaConf(
            files=tuple(conf.config_file) + tuple(conf.config_dir),
            compute_driver=conf.compute_driver,
            virt_type=conf.libvirt.virt_type,
            connection_uri=conf.libvirt.connection_uri,
            pmem_namespaces=tuple(conf.libvirt.pmem_namespaces),
            enabled_filters=tuple(conf.filter_scheduler.enabled_filters),
        )
    except (cfg.Error, OSError) as error:
        raise ConfigError(f"Nova's configuration: {error}") from error
