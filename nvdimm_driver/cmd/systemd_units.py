# SPDX-License-Identifier: Apache-2.0
"""The systemd units of nvdimmd: their texts, their installation and their removal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import host_text
from nvdimm_driver.cmd.installed_files import install, remove
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.processes import run
from nvdimm_driver.registered import MARK

BOOTED = Path("/run/systemd/system")
"""Exists when systemd is the init system (sd_booted(3))."""
PACKAGED = Path("/usr/lib/systemd/system")
"""The folder of packages' units; those in the operator's folder override them (systemd.unit(5))."""
UNITS = {
    "nvdimmd.socket": """\
{mark}
[Unit]
Description=Socket for libvirt clients of Xen domains with NVDIMMs

[Socket]
ListenStream={socket}
SocketMode=0660
SocketGroup={group}
RemoveOnStop=yes
Service=nvdimmd.service

[Install]
WantedBy=sockets.target
""",
    "nvdimmd-ro.socket": """\
{mark}
[Unit]
Description=Socket for libvirt clients of Xen domains with NVDIMMs, read-only
BindsTo=nvdimmd.socket
After=nvdimmd.socket

[Socket]
ListenStream={socket_ro}
SocketMode=0666
RemoveOnStop=yes
Service=nvdimmd.service

[Install]
WantedBy=sockets.target
""",
    "nvdimmd.service": """\
{mark}
[Unit]
Description=Proxy between libvirt clients and libvirtd for Xen domains with NVDIMMs
Wants={libvirt}.socket
After={libvirt}.socket {libvirt}-ro.socket local-fs.target
Requires=nvdimmd.socket nvdimmd-ro.socket

[Service]
Type=notify
ExecStart={python} -I -m nvdimm_driver.cmd.nvdimmd
SyslogIdentifier=nvdimmd
Restart=always
RestartSec=1
LimitNOFILE=16384
# It takes some 60 MiB, and the QEMUs that it runs as much each. A client can have it keep 64 calls with 4 MiB of XML,
# 256 MiB: clients that do so end it, and not the host; it starts again, and no guest notices.
MemoryMax=1G
# It has the host's /tmp: a client may restore a guest that is saved there.
# It writes files on any file system that the operator has NVDIMMs on, makes them immutable (LINUX_IMMUTABLE), asks who
# may write them (LEASE), reads page tables and confines label servers (SYS_ADMIN), locks pages (IPC_LOCK), and starts
# QEMUs without privileges (SETUID, SETGID, SETPCAP) and kills them (KILL).
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_IPC_LOCK CAP_KILL
CapabilityBoundingSet=CAP_LEASE CAP_LINUX_IMMUTABLE
CapabilityBoundingSet=CAP_SETGID CAP_SETPCAP CAP_SETUID CAP_SYS_ADMIN CAP_SYS_RAWIO
NoNewPrivileges=yes
ProtectSystem=full
ProtectHome=read-only
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=ipc mnt net
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077
""",
}
MODULAR = "virtxend"
"""libvirt's modular daemon for Xen. If it is enabled, its sockets have the paths that nvdimmd's need."""
MOVED = {"virtxend.socket": "libvirt_direct_socket", "virtxend-ro.socket": "libvirt_direct_socket_ro"}
"""The socket units of the modular daemon, each with the option that has its new path."""
DROP_IN = """\
{mark}
[Socket]
ListenStream=
ListenStream={path}
"""
DEFAULT_URI = (
    "clients that name no URI bypass nvdimmd: use virsh -c xen:///system, or write "
    'uri_default = "xen:///system" into /etc/libvirt/libvirt.conf'
)


def texts(conf: cfg.ConfigOpts, python: str, libvirt: str) -> dict[str, str]:
    """Return the text of each unit, by name.

    :param python: the interpreter to run nvdimmd with.
    :param libvirt: ``libvirtd`` or :data:`MODULAR`.
    """
    names = {"mark": MARK, "python": python, "libvirt": libvirt, "group": conf.rpc.group}
    names |= {"socket": conf.rpc.socket, "socket_ro": conf.rpc.socket_ro}
    return {name: text.format(**names) for name, text in UNITS.items()}


def enable(conf: cfg.ConfigOpts, python: str) -> Iterator[str]:
    """Install the units, unless a package has the same, and start them; yield a line for each thing that was done.

    :param python: the interpreter to run nvdimmd with.
    :raises ConfigError: when systemctl fails; then the units are removed again.
    """
    if not BOOTED.is_dir():
        yield f"no systemd on this host: run '{python} -I -m nvdimm_driver.cmd.nvdimmd' as a service"
        return
    folder = Path(conf.rpc.unit_dir)
    modular = _is("enabled", f"{MODULAR}.socket")
    made = texts(conf, python, MODULAR if modular else "libvirtd")
    done = [place(folder / name, PACKAGED / name, text) for name, text in made.items()]
    if modular:
        done += [
            install(_drop_in(folder, unit), DROP_IN.format(mark=MARK, path=conf.rpc[option]), 0o644)
            for unit, option in MOVED.items()
        ]
    yield from done
    changed = any(not line.startswith("unchanged") for line in done)
    try:
        if changed:
            _reload(modular)
        _systemctl("enable", "--now", "nvdimmd.socket", "nvdimmd-ro.socket")
        if changed:
            _systemctl("try-restart", "nvdimmd.service")
    except ConfigError:
        yield from disable(conf)
        raise
    yield f"started nvdimmd.socket; {DEFAULT_URI}"


def disable(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Stop the units and remove those that no package has installed; yield a line for each thing that was done.

    :raises ConfigError: when systemctl fails; repeat it to remove what is left.
    """
    folder = Path(conf.rpc.unit_dir)
    drop_ins = [path for path in (_drop_in(folder, unit) for unit in MOVED) if path.exists()]
    ours = [folder / name for name in UNITS if (folder / name).exists()]
    started = [name for name in UNITS if (folder / name).exists() or (PACKAGED / name).exists()]
    if BOOTED.is_dir() and started:
        _systemctl("disable", "--now", *started)
        yield f"stopped {', '.join(started)}"
    for path in ours + drop_ins:
        yield remove(path)
    if BOOTED.is_dir() and ours + drop_ins:
        _reload(bool(drop_ins))


def place(path: Path, packaged: Path, text: str) -> str:
    """Make systemd find a unit with this text; return a line that says what was done.

    :param path: path in the operator's folder; no file stays there if the packaged unit has the same text.
    :param packaged: path of the packaged unit, which may not exist.
    :raises ConfigError: when `path` has a file that nvdimm_driver did not write.
    """
    is_packaged = packaged.exists() and host_text.read(packaged) == text
    if is_packaged and not path.exists():
        return f"unchanged {packaged}"
    done = install(path, text, 0o644)
    return remove(path) if is_packaged else done


def is_enabled() -> bool | None:
    """Return True when systemd starts nvdimmd at boot; None on a host without systemd."""
    return _is("enabled", "nvdimmd.socket") if BOOTED.is_dir() else None


def _reload(modular: bool) -> None:
    """Make systemd read the units again.

    :param modular: the paths of the modular daemon's sockets have changed. It stops before the reload: a running daemon
        would keep systemd from opening the sockets, and when systemd closes them, it deletes the paths that their
        units have at that moment.
    """
    units = [*MOVED]
    if modular:
        if _is("active", f"{MODULAR}.service"):
            units.append(f"{MODULAR}.service")
        _systemctl("stop", f"{MODULAR}.service", *MOVED)
    _systemctl("daemon-reload")
    if modular:
        _systemctl("start", *units)


def _drop_in(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.d" / "nvdimmd.conf"


def _is(state: str, unit: str) -> bool:
    return run(["systemctl", f"is-{state}", unit]).returncode == 0


def _systemctl(*arguments: str) -> None:
    done = run(["systemctl", *arguments])
    if done.returncode:
        raise ConfigError(
            f"'systemctl {' '.join(arguments)}' failed: {done.stderr.strip()}", hint="'journalctl -xe' has the details"
        )
