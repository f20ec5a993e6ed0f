"""nvdimmd as a service of systemd: the units, and what is done with them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver.cmd.files import MARK, install, remove
from nvdimm_driver.errors import ConfigError

BOOTED = Path("/run/systemd/system")
"""There when systemd is the init (sd_booted(3))."""
UNITS = {
    "nvdimmd.socket": """\
{mark}
[Unit]
Description=libvirt clients of Xen domains with NVDIMMs

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
Description=libvirt clients of Xen domains with NVDIMMs, read-only
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
Description=NVDIMMs for Xen domains: between libvirt clients and libvirtd
Wants=libvirtd.socket
After=libvirtd.socket libvirtd-ro.socket local-fs.target
Requires=nvdimmd.socket nvdimmd-ro.socket

[Service]
Type=notify
ExecStart={python} -I -m nvdimm_driver.cmd.nvdimmd
Restart=always
RestartSec=1
LimitNOFILE=16384
# It writes files on whatever file systems the operator has for NVDIMMs, makes them immutable (LINUX_IMMUTABLE), reads
# the page tables (SYS_ADMIN), locks pages (IPC_LOCK), and starts a QEMU as nobody (SETUID, SETGID, SETPCAP).
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_IPC_LOCK CAP_LINUX_IMMUTABLE
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
PrivateTmp=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077
""",
}
MOVED = {"virtxend.socket": "libvirt_direct_socket", "virtxend-ro.socket": "libvirt_direct_socket_ro"}
"""Sockets of libvirt's modular daemon for Xen, which are where ours belong, and the options with their new place."""
DROP_IN = """\
{mark}
[Socket]
ListenStream=
ListenStream={path}
"""


def enable(conf: cfg.ConfigOpts, python: str) -> Iterator[str]:
    """Install and start the units; every line yielded says what was done.

    :param python: the interpreter to run nvdimmd with.
    :raises ConfigError: when systemctl fails.
    """
    if not BOOTED.is_dir():
        yield f"no systemd here: for plain virsh, run '{python} -I -m nvdimm_driver.cmd.nvdimmd' as a service"
        return
    folder = Path(conf.rpc.unit_dir)
    names = {"mark": MARK, "python": python}
    names |= {"socket": conf.rpc.socket, "socket_ro": conf.rpc.socket_ro, "group": conf.rpc.group}
    done = [install(folder / name, text.format(**names), 0o644) for name, text in UNITS.items()]
    modular = _is_enabled("virtxend.socket")
    if modular:
        done += [
            install(_drop_in(folder, unit), DROP_IN.format(mark=MARK, path=conf.rpc[option]), 0o644)
            for unit, option in MOVED.items()
        ]
    yield from done
    if all(line.startswith("unchanged") for line in done):
        return
    _systemctl("daemon-reload")
    if modular:
        _systemctl("restart", *MOVED)
    _systemctl("enable", "--now", "nvdimmd.socket", "nvdimmd-ro.socket")
    _systemctl("try-restart", "nvdimmd.service")
    yield "started nvdimmd.socket: virsh and other libvirt clients go through nvdimmd from now on"


def disable(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Stop and remove the units; every line yielded says what was done."""
    folder = Path(conf.rpc.unit_dir)
    drop_ins = [path for path in (_drop_in(folder, unit) for unit in MOVED) if path.exists()]
    files = [path for path in (folder / name for name in UNITS) if path.exists()] + drop_ins
    if not files:
        return
    if BOOTED.is_dir():
        _systemctl("disable", "--now", *UNITS)
    for path in files:
        yield remove(path)
    if BOOTED.is_dir():
        _systemctl("daemon-reload")
        if drop_ins:
            _systemctl("restart", *MOVED)


def _drop_in(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.d" / "nvdimmd.conf"


def _is_enabled(unit: str) -> bool:
    return subprocess.run(["systemctl", "is-enabled", "--quiet", unit], check=False).returncode == 0


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"'systemctl {' '.join(arguments)}' failed: {done.stderr.strip()}", hint="'journalctl -xe' says more"
        )
