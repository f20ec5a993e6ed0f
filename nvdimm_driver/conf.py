"""The options, in the files an operator edits: nvdimm-driver.conf and nvdimm-driver.conf.d/, in /etc/nvdimm-driver."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from oslo_config import cfg, types

from nvdimm_driver import plugin_loader, sizes
from nvdimm_driver.acpi.machine import DEFAULT_BINARIES
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.model import KIB, MIN_LABEL_SIZE, PAGE, SUPERPAGE, Pool
from nvdimm_driver.pools.rules import is_in


class Size(types.ConfigType):
    """An option's value that is a size, with a unit or in bytes."""

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
        help="Folder of the ledger and of what is built for each domain. To move it, shut down all domains with "
        "NVDIMMs, move the folder, change this, and run 'nvdimmctl register' again.",
    ),
    cfg.StrOpt(
        "log_file",
        default="/var/log/nvdimm-driver.log",
        help="File to which the libvirt hook, the device model and label servers write what they did, one line an "
        "event. After a change, run 'nvdimmctl register' again.",
    ),
    cfg.StrOpt(
        "log_format",
        default="text",
        choices=[("text", "key=value behind time, program and level"), ("json", "an object a line")],
        help="Form of the lines in 'log_file' and of what nvdimmd writes to the journal. After a change, run "
        "'nvdimmctl register' again, and restart nvdimmd.",
    ),
    cfg.StrOpt(
        "log_level",
        default="INFO",
        choices=[
            ("DEBUG", "also each step of a define and a start"),
            ("INFO", "also what happened to domains"),
            ("WARNING", "what may need somebody, and errors"),
            ("ERROR", "errors alone"),
        ],
        help="How much goes into 'log_file', and of nvdimmd into the journal. A change counts at once for the libvirt "
        "hook, and for label servers from a guest's next start. For the device model, run 'nvdimmctl register' again; "
        "for nvdimmd, restart it. It does not concern nvdimmctl, which has -v.",
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
        "libvirt's libxl driver refuses such a domain. Restart nvdimmd after a change; domains keep the form that "
        "they were defined in.",
    ),
    cfg.BoolOpt(
        "allow_any_path",
        default=False,
        help="Whether domains may have backings that are in none of the pools. Everybody who may define domains then "
        "has all of the host's persistent memory.",
    ),
]
POOL_OPTS = [
    cfg.StrOpt(
        "kind",
        default="fsdax",
        help="What NVDIMMs are kept in, a plug-in of namespace nvdimm_driver.backings: fsdax (files on ext4 or XFS, "
        "mounted with DAX), devdax (device-dax devices) or pmem (block devices of raw namespaces).",
    ),
    cfg.ListOpt(
        "paths",
        default=[],
        help="For fsdax, the folder of the file system that is mounted with DAX, or one in it; for the others, the "
        "devices. A pool without paths is an error.",
    ),
    cfg.Opt(
        "quota",
        type=Size(),
        help="How much of the pool domains may have, such as 512GiB. All there is, by default.",
    ),
    cfg.Opt(
        "alignsize",
        type=Size(),
        default=SUPERPAGE,
        help="The size of an NVDIMM in the pool, with its label area, is a multiple of this, and one that is not is "
        "refused. Less than 2MiB has no effect, as libvirt rounds sizes up to that.",
    ),
    cfg.Opt(
        "label_size",
        type=Size(),
        default=128 * KIB,
        help="Label area of NVDIMMs that 'nvdimmctl provision' makes here: 0 for none, else 128KiB or more. Domain "
        "XML says it by itself.",
    ),
    cfg.BoolOpt(
        "wipe_on_release",
        default=False,
        help="Whether 'nvdimmctl release' overwrites a domain's bytes here with zeros before others may have them. "
        "Without it, they stay as they are.",
    ),
]
POOL_PREFIX = "pool:"
"""Of the names of the sections that say what pools there are."""
XEN_OPTS = [
    cfg.StrOpt(
        "device_model",
        default="/usr/libexec/xen/bin/nvdimm-device-model",
        help="Where 'nvdimmctl register' installs the device model that rewritten domains name as their emulator. "
        "Domains that are defined already keep the path that they have: define them again after a change.",
    ),
    cfg.StrOpt(
        "qemu",
        default="/usr/libexec/xen-qemu-system-i386",
        help="The QEMU that the device model becomes, when a domain names no emulator of its own. Counts from a "
        "guest's next start.",
    ),
    cfg.StrOpt(
        "mapper",
        default="domctl",
        help="Plug-in of namespace nvdimm_driver.mappers that maps frames into guests. 'nvdimmctl register' tells the "
        "device model of a change.",
    ),
]
LAYOUT_OPTS = [
    cfg.IntOpt(
        "gap_gib",
        default=64,
        min=0,
        help="GiB of guest-physical space to keep free between RAM and the first NVDIMM, for 64-bit PCI BARs and "
        "for what PV drivers look for. Shrinks by itself in guests with few physical address bits.",
    ),
]
ACPI_OPTS = [
    cfg.StrOpt(
        "builder",
        default="qemu",
        help="Plug-in of namespace nvdimm_driver.acpi_builders: qemu (the tables that a real QEMU makes) or native "
        "(the driver's own, without any QEMU). Counts from a guest's next start; a guest sees no difference "
        "without labels.",
    ),
    cfg.StrOpt(
        "dsm",
        default="aml",
        choices=[
            ("none", "nobody: the guest has one namespace without labels for each NVDIMM"),
            ("aml", "byte code in the guest's ACPI tables, against the label area in the guest's memory"),
            ("qemu", "a stopped QEMU in dom0, one process for each guest; needs the builder 'qemu'"),
        ],
        help="Who serves the label areas of NVDIMMs that have one, in domains whose XML does not say. A change counts "
        "from a guest's next start.",
    ),
    cfg.ListOpt(
        "qemu",
        default=list(DEFAULT_BINARIES),
        help="QEMUs (7.2 or later) from which the builder 'qemu' takes the tables; each is tried until one gives them. "
        "When none does, a define or start fails and says why.",
    ),
]
LIBVIRT_OPTS = [
    cfg.StrOpt(
        "hooks_dir",
        default="/etc/libvirt/hooks",
        help="Folder in which libvirt looks for hook scripts, and 'nvdimmctl register' puts the driver's. In another "
        "than libvirt's own it is never run, and starts of domains with NVDIMMs are prepared by the device model "
        "alone.",
    ),
]
RPC_OPTS = [
    cfg.StrOpt(
        "socket",
        default="/run/libvirt/virtxend-sock",
        help="Socket on which nvdimmd serves libvirt clients. libvirt clients look for this one first when they open "
        "xen:///system; they find another only by its name. After a change, run 'nvdimmctl register' again.",
    ),
    cfg.StrOpt(
        "socket_ro",
        default="/run/libvirt/virtxend-sock-ro",
        help="The same for clients that only read ('virsh -r'), who need not be in 'group'.",
    ),
    cfg.StrOpt(
        "group",
        default="libvirt",
        help="Members of this group, and root, may connect to 'socket'. libvirtd takes nvdimmd for root and asks "
        "polkit nothing: they can do what root can.",
    ),
    cfg.StrOpt(
        "libvirt_socket",
        default="/run/libvirt/libvirt-sock",
        help="libvirtd's own socket, to which nvdimmd connects, once for each of its clients. Restart nvdimmd after a "
        "change.",
    ),
    cfg.StrOpt(
        "libvirt_socket_ro", default="/run/libvirt/libvirt-sock-ro", help="The same for clients that only read."
    ),
    cfg.StrOpt(
        "libvirt_direct_socket",
        default="/run/libvirt/virtxend-direct-sock",
        help="Where 'nvdimmctl register' moves the socket of virtxend, libvirt's modular daemon for Xen, which is "
        "where nvdimmd's belongs. nvdimmd connects to it instead of 'libvirt_socket' when it is there.",
    ),
    cfg.StrOpt(
        "libvirt_direct_socket_ro",
        default="/run/libvirt/virtxend-direct-sock-ro",
        help="The same for clients that only read.",
    ),
    cfg.StrOpt(
        "unit_dir",
        default="/etc/systemd/system",
        help="Folder for the units of nvdimmd that 'nvdimmctl register' writes: those that the package does not "
        "have, or has with other options.",
    ),
]
METRICS_OPTS = [
    cfg.StrOpt(
        "textfile",
        help="File in which nvdimmd keeps metrics for Prometheus while it runs, such as "
        "/var/lib/prometheus/node-exporter/nvdimm-driver.prom, which Debian's node exporter reads. None by "
        "default: 'nvdimmctl metrics' prints them. Needs the Python package prometheus_client.",
    ),
    cfg.IntOpt(
        "interval",
        default=15,
        min=1,
        help="Seconds from one writing of 'textfile' to the next. What Prometheus sees is so much older.",
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
"""Where 'nvdimmctl pool create' puts the sections that it makes."""
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*", re.ASCII)


def list_opts() -> list[tuple[str | None, Sequence[cfg.Opt]]]:
    """All options by group, for oslo-config-generator."""
    return GROUPS


def load(files: list[str] | None = None) -> cfg.ConfigOpts:
    """Read the configuration, all of it.

    :param files: configuration files; None means the standard places.
    :raises ConfigError: when a file cannot be read, or has a section or option that there is not, a wrong value, or
        values that contradict each other.
    """
    conf = cfg.ConfigOpts()
    for group, opts in GROUPS[:-1]:
        conf.register_opts(opts, group=group)
    try:
        conf(
            args=[],
            project="nvdimm-driver",
            default_config_files=files,
            default_config_dirs=None if files is None else [],
        )
        sections = _check_names(conf)
        for section, opts in sections:
            conf.register_opts(opts, group=section)
        for group, opts in [*_registered(conf), *sections]:
            for opt in opts:
                (conf if group is None else conf[group])[opt.dest]  # a wrong value is found when it is read
    except (cfg.Error, OSError) as error:
        raise ConfigError(f"configuration: {error}") from error
    _check_values(conf)
    return conf


def configured_pools(conf: cfg.ConfigOpts) -> tuple[Pool, ...]:
    """The pools of a configuration that :func:`load` has read, by name."""
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
                    continue  # as in the sample
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
    """:raises ConfigError: when a pool cannot have that name."""
    if not _POOL_NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is not a name for a pool", hint="lower-case letters, digits, - _ and .")


def _files(conf: cfg.ConfigOpts) -> Iterator[str]:
    yield from conf.config_file
    for folder in conf.config_dir:
        yield from sorted(str(path) for path in Path(folder).glob("*.conf"))


def _closest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, words, 1)
    return f"did you mean {found[0]}?" if found else "'nvdimm-driver.conf' that came with the driver shows all"


def _check_values(conf: cfg.ConfigOpts) -> None:
    """Check what values say together."""
    if conf.acpi.dsm == "qemu" and conf.acpi.builder != "qemu":
        raise ConfigError(
            f"configuration: [acpi] dsm is qemu and [acpi] builder is {conf.acpi.builder}",
            hint="that label server answers the tables of builder qemu; take dsm=aml for others",
        )
    if conf.metrics.textfile and not os.path.isabs(conf.metrics.textfile):
        raise ConfigError(f"configuration: [metrics] textfile: {conf.metrics.textfile} is not an absolute path")
    pools = configured_pools(conf)
    for pool in pools:
        _check_pool(pool)
    for one, other in combinations(pools, 2):
        for path in one.paths:
            if is_in(path, other) or any(is_in(each, one) for each in other.paths):
                raise ConfigError(
                    f"configuration: pools {one.name} and {other.name} have {path} both",
                    hint="a path is in one pool only; take folders that are not within one another",
                )


def _check_pool(pool: Pool) -> None:
    where = f"configuration: [{POOL_PREFIX}{pool.name}]"
    if not pool.paths:
        raise ConfigError(f"{where} has no paths", hint="paths=/mnt/pmem0, or a list of devices")
    for path in pool.paths:
        if not os.path.isabs(path):
            raise ConfigError(f"{where} paths: {path} is not absolute", hint="write the whole path")
    if pool.alignsize < PAGE or pool.alignsize & (pool.alignsize - 1):
        raise ConfigError(f"{where} alignsize: {pool.alignsize} is not a power of two of 4KiB or more")
    if pool.label_size and pool.label_size < MIN_LABEL_SIZE:
        raise ConfigError(
            f"{where} label_size: a label area has {sizes.human(MIN_LABEL_SIZE)} or more", hint="0 is none"
        )
