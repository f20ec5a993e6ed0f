"""The options, in the files an operator edits: /etc/nvdimm-driver/nvdimm-driver.conf and *.conf.d."""

from __future__ import annotations

from collections.abc import Sequence

from oslo_config import cfg

from nvdimm_driver.acpi.machine import DEFAULT_BINARIES

DEFAULT_OPTS = [
    cfg.StrOpt(
        "state_dir",
        default="/var/lib/nvdimm-driver",
        help="Folder of the ledger and of what is built for each domain.",
    ),
    cfg.StrOpt(
        "log_file",
        default="/var/log/nvdimm-driver.log",
        help="File to which the libvirt hook and the device model write what they did.",
    ),
]
XEN_OPTS = [
    cfg.StrOpt(
        "device_model",
        default="/usr/libexec/xen/bin/nvdimm-device-model",
        help="Where 'nvdimmctl register' installs the device model that rewritten domains name as their emulator.",
    ),
    cfg.StrOpt(
        "qemu",
        default="/usr/libexec/xen-qemu-system-i386",
        help="The QEMU that the device model becomes, when a domain names no emulator of its own.",
    ),
    cfg.StrOpt("mapper", default="domctl", help="Plug-in of namespace nvdimm_driver.mappers."),
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
    cfg.StrOpt("builder", default="qemu", help="Plug-in of namespace nvdimm_driver.acpi_builders."),
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
        help="QEMUs (7.2 or later) from which the builder 'qemu' takes the tables; each is tried until one gives them.",
    ),
]
LIBVIRT_OPTS = [
    cfg.StrOpt("hooks_dir", default="/etc/libvirt/hooks", help="Folder in which libvirt looks for hook scripts."),
]
RPC_OPTS = [
    cfg.StrOpt(
        "socket",
        default="/run/libvirt/virtxend-sock",
        help="Socket on which nvdimmd serves libvirt clients, when systemd does not hand it one. libvirt clients look "
        "for this one first when they open xen:///system.",
    ),
    cfg.StrOpt(
        "socket_ro", default="/run/libvirt/virtxend-sock-ro", help="The same for clients that only read ('virsh -r')."
    ),
    cfg.StrOpt(
        "group",
        default="libvirt",
        help="Members of this group, and root, may connect to 'socket'. libvirtd takes nvdimmd for root and asks "
        "polkit nothing: they can do what root can.",
    ),
    cfg.StrOpt(
        "libvirt_socket", default="/run/libvirt/libvirt-sock", help="libvirtd's own socket, to which nvdimmd connects."
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
        "unit_dir", default="/etc/systemd/system", help="Folder for the units that 'nvdimmctl register' installs."
    ),
]
GROUPS: list[tuple[str | None, Sequence[cfg.Opt]]] = [
    (None, DEFAULT_OPTS),
    ("xen", XEN_OPTS),
    ("layout", LAYOUT_OPTS),
    ("acpi", ACPI_OPTS),
    ("libvirt", LIBVIRT_OPTS),
    ("rpc", RPC_OPTS),
]


def list_opts() -> list[tuple[str | None, Sequence[cfg.Opt]]]:
    """All options by group, for oslo-config-generator."""
    return GROUPS


def load(files: list[str] | None = None) -> cfg.ConfigOpts:
    """Read the configuration.

    :param files: configuration files; None means the standard places.
    :raises oslo_config.cfg.Error: when a file cannot be read or has a wrong value.
    """
    conf = cfg.ConfigOpts()
    for group, opts in GROUPS:
        conf.register_opts(opts, group=group)
    conf(args=[], project="nvdimm-driver", default_config_files=files)
    return conf
