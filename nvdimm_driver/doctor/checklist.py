# SPDX-License-Identifier: Apache-2.0
"""All checks of a host, in the order in which an operator repairs it: from the machine up to the domains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import host_files, plugin_loader
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.paths import resolve_strictly
from nvdimm_driver.conf import configured_pools
from nvdimm_driver.doctor import access, confinement, hypervisor, ledger, libvirt, nova, pmem, programs, storage
from nvdimm_driver.doctor.finding import Finding, could_not, noted, passed, warned
from nvdimm_driver.driver import driver_class
from nvdimm_driver.errors import LedgerError, NvdimmError
from nvdimm_driver.labels.confinement import find_isolation_fault
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.nova.conf import read as read_nova_conf
from nvdimm_driver.nova.pmem_namespaces import Configured, Inventory, NovaNamespace
from nvdimm_driver.plugins import AcpiBuilder
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.registered import ledger_path, run_by_libvirt
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import DefinitionFiles
from nvdimm_driver.xml.hooks import XmlHooks

Check = tuple[str, Callable[[], Finding | Iterable[Finding]]]


@dataclass(frozen=True)
class Installed:
    """The files and units that ``nvdimmctl register`` installs.

    :ivar hook: libvirt's hook.
    :ivar enabled: True when systemd starts nvdimmd at boot; None on a host without systemd.
    """

    hook: programs.Script
    device_model: programs.Script
    enabled: bool | None


def examine(conf: cfg.ConfigOpts, installed: Installed) -> Iterator[Finding]:
    """Check this host; yield each finding as soon as it is known."""
    for name, look in _checks(conf, installed):
        try:
            found = look()
            yield from (found,) if isinstance(found, Finding) else found
        except (NvdimmError, OSError) as error:
            yield could_not(name, error)


def _checks(conf: cfg.ConfigOpts, installed: Installed) -> Iterator[Check]:
    """Yield all checks, each with the name that its finding has when the check cannot be done."""
    yield "plug-ins", lambda: _plugins(conf)
    yield "Xen", hypervisor.check
    yield "namespaces", pmem.check_namespaces
    yield "pools", lambda: _pools(conf)
    yield "QEMU", lambda: programs.check_qemu(conf.xen.qemu)
    yield "ACPI tables", lambda: programs.check_tables(conf.acpi.builder, _builder(conf))
    yield "device model", lambda: programs.check_script(installed.device_model)
    yield "hook", lambda: programs.check_script(installed.hook)
    daemon = confinement.find_daemon()
    started = daemon.started if daemon else None
    yield "hook, libvirt", lambda: programs.check_hook_known(installed.hook.path, started)
    yield "libvirt", lambda: _libvirt(conf)
    yield "emulators", lambda: _emulators(conf)
    yield "definitions", lambda: libvirt.check_definitions(_definitions(conf))
    yield "nvdimmd", lambda: libvirt.check_nvdimmd(conf.rpc.socket, conf.xen.device_model)
    yield access.CHECK, lambda: _access(conf)
    yield "nvdimmd, boot", lambda: libvirt.check_service(installed.enabled)
    yield "label servers, isolation", lambda: _isolation(conf.acpi.dsm)
    yield "AppArmor, nvdimm-driver", confinement.check_profiles
    folder = Path(conf.libvirt.apparmor_dir)
    yield "AppArmor, libvirt", lambda: confinement.check_apparmor(daemon, run_by_libvirt(conf), folder)
    yield "SELinux", confinement.check_selinux
    yield "log", lambda: storage.check_log(Path(conf.log_file))
    yield "state folder", lambda: storage.check_state(Path(ledger_path(conf)))
    yield "ledger", lambda: _records(conf)
    yield "Nova", lambda: _nova(conf)


def _isolation(dsm: str) -> Finding:
    if os.geteuid():
        return noted("label servers, isolation", "can only be tried by root", "run as root")
    return confinement.check_label_servers(find_isolation_fault(), dsm)


def _plugins(conf: cfg.ConfigOpts) -> Finding:
    """Check that the driver and the XML hooks that the options name can be loaded, and every backing."""
    driver_class(conf)
    XmlHooks.from_conf(conf)
    hooks = ", ".join(conf.xml_hooks) or "none"
    if "libxl" not in conf.xml_hooks:
        return warned(
            "plug-ins",
            f"XML hooks are {hooks}: libvirt's libxl driver refuses a domain that 'libxl' has not rewritten",
            "add libxl to [DEFAULT] xml_hooks, and restart nvdimmd",
        )
    backings = ", ".join(each.name for each in plugin_loader.load_all("nvdimm_driver.backings", conf))
    return passed("plug-ins", f"driver {conf.driver}, XML hooks {hooks}, backings {backings}")


def _pools(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    pools = Pools(configured_pools(conf), any_path=conf.allow_any_path)
    backings = plugin_loader.load_all("nvdimm_driver.backings", conf)
    return pmem.check_pools(pools, backings, any_path=conf.allow_any_path)


def _builder(conf: cfg.ConfigOpts) -> AcpiBuilder:
    """Return the configured builder, without its cache: the check is that QEMU gives tables now."""
    if conf.acpi.builder == "qemu":
        return QemuAcpiBuilder(conf.acpi.qemu)
    builder: AcpiBuilder = plugin_loader.load("nvdimm_driver.acpi_builders", conf.acpi.builder, conf)
    return builder


def _libvirt(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    return libvirt.check_libvirt(_libvirt_socket(conf))


def _emulators(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    return libvirt.check_emulators(_libvirt_socket(conf), XmlHooks.from_conf(conf).restore, Emulators.from_conf(conf))


def _definitions(conf: cfg.ConfigOpts) -> DefinitionFiles:
    return DefinitionFiles(conf.libvirt.definition_dirs, XmlHooks.from_conf(conf).restore, resolve_strictly)


def _libvirt_socket(conf: cfg.ConfigOpts) -> str:
    direct = str(conf.rpc.libvirt_direct_socket)
    return direct if host_files.exists(direct) else str(conf.rpc.libvirt_socket)


def _access(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    modular = host_files.exists(conf.rpc.libvirt_direct_socket)
    return access.check_access(access.FOLDER / ("virtxend.conf" if modular else "libvirtd.conf"), conf.rpc.group)


def _records(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    path = Path(ledger_path(conf))
    backings = plugin_loader.load_all("nvdimm_driver.backings", conf)
    mapper = plugin_loader.load("nvdimm_driver.mappers", conf.xen.mapper, conf)
    servers, holders = LabelServers(conf.state_dir), Holders(conf.state_dir)
    return ledger.check(path, backings, mapper, servers.is_running, holders.held)


def _nova(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    def find(configured: Sequence[Configured]) -> tuple[NovaNamespace, ...]:
        pools = Pools(configured_pools(conf), any_path=conf.allow_any_path)
        backings = plugin_loader.load_all("nvdimm_driver.backings", conf)
        path = Path(ledger_path(conf))
        if not host_files.exists(path):
            raise LedgerError(f"there is no {path}", hint="'nvdimmctl register' makes it")
        with closing(Ledger(str(path))) as ledger:
            return Inventory(pools, backings, ledger, served=conf.acpi.dsm == "qemu").find(configured)

    return nova.check(read_nova_conf(), find, nova.nova_version())
