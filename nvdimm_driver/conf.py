# SPDX-License-Identifier: Apache-2.0
"""The options, and their files: nvdimm-driver.conf and nvdimm-driver.conf.d/ in /etc/nvdimm-driver."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oslo_config import cfg, types

from nvdimm_driver import conf_files, plugin_loader, sizes
from nvdimm_driver.acpi.machine import DEFAULT_BINARIES
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.model import KIB, MIN_LABEL_SIZE, PAGE, SUPERPAGE, Pool
from nvdimm_driver.pools.places import find_nested


class Size(types.ConfigType):
    """Type of an option whose value is a size, with a unit or in bytes."""

    def __init__(self) -> None:
        super().__init__(type_name="size")

    def __call__(self, value: str | int) -> int:
        try:
            return sizes.parse(str(value))
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def __repr__(self) -> str:
        return "Size"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size)

    __hash__ = None  # type: ignore[assignment]

    def _formatter(self, value: int) -> str:
        return sizes.human(value).replace(" ", "")


DEFAULT_OPTS = [
    cfg.StrOpt(
        "state_dir",
        default="/var/lib/nvdimm-driver",
        help="Folder of the ledger and of the files built for each domain. To move it, shut down all domains with "
        "NVDIMMs, move the folder, change this option, and run 'nvdimmctl register' again: until then, no domain with "
        "NVDIMMs starts. Where the ledger is not the same file as before, 'nvdimmctl check --repair' has to compare it "
        "with what is there.",
    ),
    cfg.StrOpt(
        "log_file",
        default="/var/log/nvdimm-driver.log",
        help="Log file of the libvirt hook, the device model and label servers, one line per event. After a change, "
        "run 'nvdimmctl register' again.",
    ),
    cfg.StrOpt(
        "log_format",
        default="text",
        choices=[("text", "key=value after time, program and level"), ("json", "one object per line")],
        help="Format of the lines in 'log_file' and of nvdimmd's lines in the journal. After a change, run "
        "'nvdimmctl register' again, and restart nvdimmd.",
    ),
    cfg.StrOpt(
        "log_level",
        default="INFO",
        choices=[
            ("DEBUG", "also each step of a define and a start"),
            ("INFO", "also events of domains"),
            ("WARNING", "also conditions that may need attention"),
            ("ERROR", "only errors"),
        ],
        help="Lowest level that is logged to 'log_file' and, by nvdimmd, to the journal. A change applies to the "
        "libvirt hook at once, and to label servers from a guest's next start. For the device model, run 'nvdimmctl "
        "register' again; for nvdimmd, restart it. nvdimmctl ignores this option and has -v.",
    ),
    cfg.StrOpt(
        "driver",
        default="xen",
        help="Plug-in of namespace nvdimm_driver.drivers that nvdimmd, the libvirt hook, the device model and "
        "nvdimmctl use. Restart nvdimmd after a change.",
    ),
    cfg.ListOpt(
        "xml_hooks",
        default=["libxl"],
        help="Plug-ins of namespace nvdimm_driver.xml_hooks, in the order in which they rewrite domain XML with "
        "NVDIMMs on its way into libvirt; on its way out they restore it in reverse order. Without 'libxl', "
        "libvirt's libxl driver refuses such a domain. Restart nvdimmd after a change; domains keep the form in which "
        "they were defined.",
    ),
    cfg.BoolOpt(
        "allow_any_path",
        default=False,
        help="Allow domains to have backings outside the pools. Everybody who may define domains can then use all of "
        "the host's persistent memory.",
    ),
]
POOL_OPTS = [
    cfg.StrOpt(
        "kind",
        default="fsdax",
        help="Kind of backing, a plug-in of namespace nvdimm_driver.backings: fsdax (files on ext4 or XFS, mounted "
        "with DAX), devdax (device-dax devices) or pmem (block devices of raw namespaces).",
    ),
    cfg.ListOpt(
        "paths",
        default=[],
        help="For fsdax, the mount point of the file system that is mounted with DAX, or a folder in it; for the other "
        "kinds, the devices. A pool without paths is an error.",
    ),
    cfg.Opt(
        "quota",
        type=Size(),
        help="Most of the pool that domains may have, such as 512GiB. By default, all of it.",
    ),
    cfg.Opt(
        "alignsize",
        type=Size(),
        default=SUPERPAGE,
        help="The size of an NVDIMM in the pool, with its label area, must be a multiple of this; others are refused. "
        "Less than 2MiB has no effect, as libvirt rounds sizes up to that.",
    ),
    cfg.Opt(
        "label_size",
        type=Size(),
        default=128 * KIB,
        help="Label area of NVDIMMs that 'nvdimmctl provision' creates in the pool: 0 for none, else 128KiB or more. "
        "Domain XML has its own <label>.",
    ),
    cfg.BoolOpt(
        "wipe_on_release",
        default=False,
        help="Make 'nvdimmctl release' overwrite a domain's bytes in the pool with zeros before other domains may "
        "have them. By default, they stay as they are.",
    ),
]
POOL_PREFIX = "pool:"
"""The names of the pools' sections begin with it."""
EMULATORS = (
    "/usr/libexec/xen-qemu-system-i386",  # Debian: qemu-system-xen
    "/usr/lib/xen/bin/qemu-system-i386",  # Xen's own build
    "/usr/bin/qemu-system-i386",
    "/usr/bin/qemu-system-x86_64",
)
"""The QEMUs of distributions."""
XEN_OPTS = [
    cfg.StrOpt(
        "device_model",
        default="/usr/libexec/xen/bin/nvdimm-device-model",
        help="Path at which 'nvdimmctl register' installs the device model that rewritten domains name as their "
        "emulator. Defined domains keep their path: define them again after a change.",
    ),
    cfg.StrOpt(
        "qemu",
        default="/usr/libexec/xen-qemu-system-i386",
        help="The QEMU that the device model becomes, unless the domain names its own emulator. A change applies from "
        "a guest's next start.",
    ),
    cfg.ListOpt(
        "emulators",
        default=list(EMULATORS),
        help="QEMUs that a domain may name as its <emulator>, apart from 'qemu'. They run as root, so any other is "
        "refused, and so is a file that somebody else than root can change. The path counts as it is written.",
    ),
    cfg.StrOpt(
        "mapper",
        default="domctl",
        help="Plug-in of namespace nvdimm_driver.mappers that maps frames into guests. After a change, run 'nvdimmctl "
        "register' again, for the device model.",
    ),
    cfg.StrOpt(
        "cache",
        default="auto",
        choices=[
            ("auto", "write-back where the hypervisor gives it, uncached elsewhere"),
            ("write-back", "a guest that cannot have it does not boot"),
            ("uncached", "never write-back: each store of a guest is durable at once, and slow"),
        ],
        help="Whether the processors cache a guest's NVDIMMs, unless the domain's XML specifies it. Stock Xen never "
        "caches them. A change applies from a guest's next start or restore.",
    ),
    cfg.BoolOpt(
        "hotplug",
        default=False,
        help="Experimental. Give guests whose XML has <maxMemory slots='...'> slots for hot-plug: their ACPI tables "
        "have each NVDIMM in a container of its own, and 'virsh attach-device --live' and 'detach-device --live' work. "
        "A change applies from a guest's next start.",
    ),
]
LAYOUT_OPTS = [
    cfg.IntOpt(
        "gap_gib",
        default=64,
        min=0,
        help="GiB of guest-physical space to keep free between RAM and the first NVDIMM, for 64-bit PCI BARs and for "
        "PV drivers that look for free address space. Shrinks by itself in guests with few physical address bits.",
    ),
]
ACPI_OPTS = [
    cfg.StrOpt(
        "builder",
        default="qemu",
        help="Plug-in of namespace nvdimm_driver.acpi_builders: qemu (tables made by a real QEMU) or native (the "
        "driver's own, without any QEMU). A change applies from a guest's next start; a guest without labels sees no "
        "difference.",
    ),
    cfg.StrOpt(
        "dsm",
        default="aml",
        choices=[
            ("none", "nobody: the guest has one namespace without labels for each NVDIMM"),
            ("aml", "byte code in the guest's ACPI tables, which uses the label area in the guest's memory"),
            ("qemu", "a stopped QEMU in dom0, one process for each guest; needs the builder 'qemu'"),
        ],
        help="Who serves the label areas of NVDIMMs that have one, unless the domain's XML specifies it. A change "
        "applies from a guest's next start.",
    ),
    cfg.ListOpt(
        "qemu",
        default=list(DEFAULT_BINARIES),
        help="QEMUs (7.2 or later) from which the builder 'qemu' takes the tables, tried in order until one gives "
        "them. If none does, a define or start fails with the reason.",
    ),
]
LIBVIRT_OPTS = [
    cfg.StrOpt(
        "hooks_dir",
        default="/etc/libvirt/hooks",
        help="Folder of libvirt's hook scripts, in which 'nvdimmctl register' puts the driver's. If libvirt uses "
        "another folder, it never runs that script, and the device model alone prepares starts of domains with "
        "NVDIMMs.",
    ),
    cfg.ListOpt(
        "definition_dirs",
        default=["/etc/libvirt/libxl", "/run/libvirt/libxl"],
        help="Folders in which libvirt's Xen driver keeps the definitions of domains, and the XML of those that run. "
        "Before a domain gets a device, whose mark can be lost with the ledger, the driver reads there whose it is. If "
        "none of the folders is there, no domain gets a device. An empty list goes by the ledger and the marks.",
    ),
    cfg.StrOpt(
        "save_dir",
        default="/var/lib/libvirt/libxl/save",
        help="Folder in which libvirt's Xen driver keeps managed saves. libvirt removes one before it restores it, so "
        "the driver tries first whether the guest can go on, with the XML that is saved there.",
    ),
    cfg.StrOpt(
        "apparmor_dir",
        default="/etc/apparmor.d",
        help="Folder of AppArmor's profiles. 'nvdimmctl register' adds to the profile of libvirt's daemon there, in "
        "its file in local/, what the driver needs.",
    ),
]
RPC_OPTS = [
    cfg.StrOpt(
        "socket",
        default="/run/libvirt/virtxend-sock",
        help="Socket on which nvdimmd serves libvirt clients. Clients that open xen:///system try the default path "
        "first; they find another only if they name it. After a change, run 'nvdimmctl register' again.",
    ),
    cfg.StrOpt(
        "socket_ro",
        default="/run/libvirt/virtxend-sock-ro",
        help="The same for read-only clients ('virsh -r'), which need not be in 'group'.",
    ),
    cfg.StrOpt(
        "group",
        default="libvirt",
        help="Members of this group, and root, may connect to 'socket'. They can do everything that root can: nvdimmd "
        "is root to libvirtd, which does not ask polkit.",
    ),
    cfg.StrOpt(
        "libvirt_socket",
        default="/run/libvirt/libvirt-sock",
        help="libvirtd's own socket, to which nvdimmd connects once for each of its clients. Restart nvdimmd after a "
        "change.",
    ),
    cfg.StrOpt("libvirt_socket_ro", default="/run/libvirt/libvirt-sock-ro", help="The same for read-only clients."),
    cfg.StrOpt(
        "libvirt_direct_socket",
        default="/run/libvirt/virtxend-direct-sock",
        help="Path to which 'nvdimmctl register' moves the socket of virtxend, libvirt's modular daemon for Xen, to "
        "make room for nvdimmd's. If it exists, nvdimmd connects to it instead of 'libvirt_socket'.",
    ),
    cfg.StrOpt(
        "libvirt_direct_socket_ro",
        default="/run/libvirt/virtxend-direct-sock-ro",
        help="The same for read-only clients.",
    ),
    cfg.StrOpt(
        "unit_dir",
        default="/etc/systemd/system",
        help="Folder for the systemd units of nvdimmd that 'nvdimmctl register' writes: those that the package lacks, "
        "or has with other options.",
    ),
]
METRICS_OPTS = [
    cfg.StrOpt(
        "textfile",
        help="File to which nvdimmd writes metrics for Prometheus while it runs, such as "
        "/var/lib/prometheus/node-exporter/nvdimm-driver.prom, which Debian's node exporter reads. Unset by "
        "default: 'nvdimmctl metrics' prints them. Needs the Python package prometheus_client.",
    ),
    cfg.IntOpt(
        "interval",
        default=15,
        min=1,
        help="Seconds between writes of 'textfile'. Prometheus sees metrics that are up to this old.",
    ),
]
GROUPS: list[tuple[str | None, Sequence[cfg.Opt]]] = [
    (None, DEFAULT_OPTS),
    ("xen", XEN_OPTS),
    ("layout", LAYOUT_OPTS),
    ("acpi", ACPI_OPTS),
    ("libvirt", LIBVIRT_OPTS),
    ("rpc", RPC_OPTS),
    ("metrics", METRICS_OPTS),
    (f"{POOL_PREFIX}name", POOL_OPTS),
]
CONF_FOLDER = "/etc/nvdimm-driver/nvdimm-driver.conf.d"
"""Folder of the files that 'nvdimmctl pool create' writes."""
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*", re.ASCII)


def list_opts() -> list[tuple[str | None, Sequence[cfg.Opt]]]:
    """Return all options by group, for oslo-config-generator."""
    return GROUPS


def load(files: Sequence[str] | None = None) -> cfg.ConfigOpts:
    """Read and check the whole configuration.

    :param files: configuration files; None means those in /etc/nvdimm-driver.
    :raises ConfigError: when a file cannot be read, or has an unknown section or option, an invalid value, or values
        that contradict each other.
    """
    conf = cfg.ConfigOpts()
    for group, opts in GROUPS[:-1]:
        conf.register_opts(opts, group=group)
    try:
        conf_files.read(conf, "nvdimm-driver", files)
        sections = _check_names(conf)
        for section, opts in sections:
            conf.register_opts(opts, group=section)
        for group, opts in [*_registered(conf), *sections]:
            for opt in opts:
                _check_value(conf, group, opt)
    except (cfg.Error, OSError) as error:
        raise ConfigError(f"configuration: {error}") from error
    _check_values(conf)
    return conf


def _check_value(conf: cfg.ConfigOpts, group: str | None, opt: cfg.Opt) -> None:
    """Check a value; reading it does that.

    :raises ConfigError: when it is not one of the option's type.
    """
    try:
        (conf if group is None else conf[group])[opt.dest]
    except cfg.ConfigFileValueError as error:
        where, _, reason = str(error).partition(" is not valid: ")
        (file,) = re.findall(r"detail='(.*?)'", where) or [""]
        raise ConfigError(
            f"configuration: [{group or 'DEFAULT'}] {opt.name}: {reason or where}",
            hint=f"correct it in {file}" if file else "",
        ) from error


def configured_pools(conf: cfg.ConfigOpts) -> tuple[Pool, ...]:
    """Return the pools of a configuration that :func:`load` has read, by name."""
    return tuple(
        Pool(name=section[len(POOL_PREFIX) :], **{**conf[section], "paths": tuple(conf[section].paths)})
        for section, _ in _registered(conf)
        if section and section.startswith(POOL_PREFIX)
    )


def _registered(conf: cfg.ConfigOpts) -> list[tuple[str | None, Sequence[cfg.Opt]]]:
    pools = sorted(name for name in conf._groups if name.startswith(POOL_PREFIX))
    return [*GROUPS[:-1], *[(name, POOL_OPTS) for name in pools]]


def _check_names(conf: cfg.ConfigOpts) -> list[tuple[str, Sequence[cfg.Opt]]]:
    """Check that the sections and options of the files exist; return the sections of pools and plug-ins with theirs."""
    known: dict[str, Sequence[cfg.Opt]] = {group or "DEFAULT": opts for group, opts in GROUPS[:-1]}
    found: dict[str, Sequence[cfg.Opt]] = {}
    opts: Sequence[cfg.Opt]
    for file in _files(conf):
        sections: dict[str, dict[str, Any]] = {}
        cfg.ConfigParser(file, sections).parse()
        for section, options in sections.items():
            if section.startswith(POOL_PREFIX):
                if not options:
                    continue  # the sample has an empty one
                check_pool_name(section[len(POOL_PREFIX) :], f"{file}: [{section}]")
                opts = found[section] = POOL_OPTS
            elif section in known:
                opts = known[section]
            elif own := plugin_loader.options_of(section):
                opts = found[section] = own
            else:
                raise ConfigError(f"{file}: there is no section [{section}]", hint=_closest(section, known))
            there = {opt.dest for opt in opts}
            for option in options:
                if option.replace("-", "_") not in there:
                    raise ConfigError(
                        f"{file}: there is no option {option} in section [{section}]", hint=_closest(option, there)
                    )
    return list(found.items())


def check_pool_name(name: str, where: str) -> None:
    """Check a pool's name.

    :param where: place of the name, for the message.
    :raises ConfigError: when a pool cannot have it.
    """
    if not _POOL_NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is not a name for a pool", hint="lower-case letters, digits, - _ and .")


def _files(conf: cfg.ConfigOpts) -> Iterator[str]:
    yield from conf.config_file
    for folder in conf.config_dir:
        yield from sorted(str(path) for path in Path(folder).glob("*.conf"))


def _closest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, words, 1)
    return f"did you mean {found[0]}?" if found else "the sample nvdimm-driver.conf of the driver has all of them"


def _check_values(conf: cfg.ConfigOpts) -> None:
    """Check values that depend on each other, and lists."""
    for name in conf.xml_hooks:
        if conf.xml_hooks.count(name) > 1:
            raise ConfigError(
                f"configuration: [DEFAULT] xml_hooks: {name} is in the list twice", hint="take one of them out"
            )
    if conf.acpi.dsm == "qemu" and conf.acpi.builder != "qemu":
        raise ConfigError(
            f"configuration: [acpi] dsm is qemu and [acpi] builder is {conf.acpi.builder}",
            hint="dsm=qemu needs the tables of builder=qemu; use dsm=aml with others",
        )
    for path in conf.xen.emulators:
        if not os.path.isabs(path):
            raise ConfigError(
                f"configuration: [xen] emulators: {path} is not an absolute path", hint="write the whole path"
            )
    if conf.metrics.textfile and not os.path.isabs(conf.metrics.textfile):
        raise ConfigError(
            f"configuration: [metrics] textfile: {conf.metrics.textfile} is not an absolute path",
            hint="write the whole path",
        )
    pools = configured_pools(conf)
    for pool in pools:
        _check_pool(pool)
    if nested := find_nested(pools):
        one, other, path = nested
        raise ConfigError(
            f"configuration: pools {one.name} and {other.name} both have {path}",
            hint="give each path to one pool only, and no folder inside another pool's; symbolic links and bind mounts "
            "count as what they lead to",
        )


def _check_pool(pool: Pool) -> None:
    where = f"configuration: [{POOL_PREFIX}{pool.name}]"
    if not pool.paths:
        raise ConfigError(f"{where} has no paths", hint="paths=/mnt/pmem0, or a list of devices")
    for path in pool.paths:
        if not os.path.isabs(path):
            raise ConfigError(f"{where} paths: {path} is not absolute", hint="write the whole path")
    if pool.alignsize < PAGE or pool.alignsize & (pool.alignsize - 1):
        raise ConfigError(
            f"{where} alignsize: {sizes.human(pool.alignsize)} is not a power of two of at least {sizes.human(PAGE)}",
            hint="write 2MiB, or leave it out",
        )
    if pool.label_size and pool.label_size < MIN_LABEL_SIZE:
        raise ConfigError(
            f"{where} label_size: a label area has {sizes.human(MIN_LABEL_SIZE)} or more", hint="write 0 for none"
        )
