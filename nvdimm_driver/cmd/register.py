# SPDX-License-Identifier: Apache-2.0
"""Install the driver into libvirt's libxl driver, and remove it."""

from __future__ import annotations

import logging
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import host_files, plugin_loader, registered
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.cmd import apparmor_rules, systemd_units
from nvdimm_driver.cmd.hook import MARK as XML_MARK
from nvdimm_driver.cmd.installed_files import install, is_ours, remove
from nvdimm_driver.device_marks import FOLDER, DeviceMarks
from nvdimm_driver.doctor import repair_saved_guests
from nvdimm_driver.doctor.libvirt import daemon_socket
from nvdimm_driver.doctor.programs import Script
from nvdimm_driver.driver import load_driver
from nvdimm_driver.errors import ConfigError, InUseError, LedgerError, NvdimmError, hint_of
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import Record
from nvdimm_driver.registered import MARK, ledger_in
from nvdimm_driver.rpc.xdr import DomainRef
from nvdimm_driver.shell import command
from nvdimm_driver.state import in_use
from nvdimm_driver.state.database import FROM_ELSEWHERE, TAKE_OVER
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import host_boot_id
from nvdimm_driver.xml.hooks import XmlHooks

LOG = logging.getLogger(__name__)

HOOK_NAME = "50-nvdimm"
HOOK = """#!/bin/sh -e
{mark}
# libvirt runs this at each step of each guest: no Python starts for what is not the driver's
case $2 in prepare | release) ;; *) exit ;; esac
[ "$1" != Domain-0 ] || exit 0
xml=$(cat)
case $xml in *{xml_mark}*) ;; *) exit ;; esac
printf '%s\\n' "$xml" | {python} -I -c '
import sys
from nvdimm_driver.cmd.hook import main
sys.exit(main())
' "$@"
"""
DEVICE_MODEL = """#!{python} -I
{mark}
import sys
from nvdimm_driver.cmd.device_model import main
main(
    sys.argv,
    state_dir={state_dir!r},
    log_file={log_file!r},
    qemu={qemu!r},
    log_format={log_format!r},
    log_level={log_level!r},
    mapper={mapper!r},
)
"""


def register(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Install the driver; yield a line for each thing that was done.

    :raises ConfigError: when QEMU is missing, or a file that ``register`` did not write is in the way.
    :raises InUseError: while domains run, or are saved, that are in the ledger of another state folder.
    :raises LedgerError: when the ledger, or the marks of devices, cannot be written in this one.
    """
    before = registered.state_dir(conf)
    is_moved = os.path.realpath(before) != os.path.realpath(conf.state_dir)
    if is_moved:
        _check_off(conf, before)
        _check_none_saved(conf, before)
    if not os.access(conf.xen.qemu, os.X_OK):
        raise ConfigError(
            f"there is no QEMU at {conf.xen.qemu}", hint="install qemu-system-xen, or set [xen] qemu in the options"
        )
    try:
        state_dir = Path(conf.state_dir)
        if not state_dir.is_dir():
            state_dir.mkdir(parents=True, mode=0o700)
            yield f"created {state_dir}"
        if is_moved:
            in_use.beside(ledger_in(conf.state_dir)).follow(in_use.beside(ledger_in(before)))
        with closing(Ledger(ledger_in(conf.state_dir))) as ledger:
            if is_moved:
                yield from _follow_marks(ledger, before)
            ledger.reserve.keep()
            if is_moved and ledger.is_from_elsewhere():
                yield f"{ledger.path} {FROM_ELSEWHERE} ({TAKE_OVER})"
        log_dir = Path(conf.log_file).parent
        if not log_dir.is_dir():
            log_dir.mkdir(parents=True)
            yield f"created {log_dir}"
        yield from _protect(Path(conf.log_file))
        text, models = device_model(conf).text, [*registered.device_models(conf)]
        listed = install(registered.list_path(conf), "\n".join([MARK, *models, ""]), 0o644)
        for path in filter(is_ours, map(Path, models[1:])):
            yield install(path, text, 0o755)
        yield install(Path(models[0]), text, 0o755)  # last: its text tells whether all this was done
        yield from _install_hook(libvirt_hook(conf))
        yield listed
        yield from apparmor_rules.allow(conf)
        yield from systemd_units.enable(conf, sys.executable)
    except OSError as error:
        raise ConfigError(f"cannot install: {error}", hint=hint_of(error)) from error


def _install_hook(hook: Script) -> Iterator[str]:
    """Install the hook, and remove what a :func:`register` that was killed has left of it.

    One in the place of that of another version keeps its time: libvirt has found a hook there, if it has since then.
    """
    new, earlier = _left(hook.path)
    yield from _remove_left(new, earlier)
    before = hook.path.stat() if os.access(hook.path, os.X_OK) else None
    done = install(hook.path, hook.text, 0o755, new=new)
    yield done
    if before is not None:
        os.utime(hook.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif not done.startswith("unchanged"):
        yield "restart libvirtd (or virtxend), which looks for hooks only at its start: systemctl restart libvirtd"


def _left(hook: Path) -> tuple[Path, Path]:
    """Return what the hook is called until it is whole, and what earlier versions called it until then.

    libvirt runs each program in the hook's folder, also with a name that begins with a dot, and refuses the start of
    each domain for one that is not whole or is still being written (src/util/virhook.c:virHookCall). In the folder
    above, it looks for names that it knows.
    """
    name = f".{hook.name}.new"
    return hook.parent.parent / name, hook.parent / name


def _remove_left(*paths: Path) -> Iterator[str]:
    for path in filter(os.path.lexists, paths):
        path.unlink()
        host_files.sync_folder(path.parent)
        yield f"removed {path}"


def _follow_marks(ledger: Ledger, before: str) -> Iterator[str]:
    """Take over whose devices are, as the state folder of before has it; yield a line for each thing that is lost."""
    marks = os.path.join(os.path.dirname(ledger.path), FOLDER)
    if not os.path.isdir(before) and not os.path.isdir(marks):  # neither is it there, nor was it moved
        yield f"there is no {before}; whose devices are, and which run had them last, is not known here"
    yield from ledger.device_marks.follow(DeviceMarks(os.path.join(before, FOLDER)))


def _check_off(conf: cfg.ConfigOpts, state_dir: str) -> None:
    """Check that no domain runs whose NVDIMMs are in the ledger of a folder that is to be left.

    Its disk may be damaged or not mounted: another folder is the way out. So Xen is asked, too.

    :raises InUseError: when one does, or Xen cannot be asked.
    """
    started: list[Record] = []
    try:
        with closing(_open_ledger(state_dir)) as ledger:
            started = _started(ledger)
    except LedgerError as error:
        LOG.warning("%s", error)
    leaving = f"{state_dir} has to stay the state folder"
    try:
        mapper = plugin_loader.load("nvdimm_driver.mappers", conf.xen.mapper, conf)
        domids = {domid for domid, *_ in mapper.frames_of_guests()}
    except NvdimmError as error:
        raise InUseError(
            f"{leaving}: Xen cannot be asked which guests run: {error.message}", hint=error.hint
        ) from error
    unknown = sorted(domids - {each.start.domid for each in started if each.start})
    if running := [*(each.name for each in started), *(f"domid {each}" for each in unknown)]:
        back = f"set [DEFAULT] state_dir back to {state_dir}, shut them down, and then change it"
        raise InUseError(
            f"{leaving}: domains run with NVDIMMs: {', '.join(running)}",
            hint=back if started else "shut them down first",
        )


def _check_none_saved(conf: cfg.ConfigOpts, state_dir: str) -> None:
    """Check that no domain is saved whose guest could not go on without the ledger of a folder that is to be left.

    :raises InUseError: when one is.
    """
    if not os.path.isdir(state_dir):  # its disk is gone: another folder is the way out
        return
    try:
        saved = _find_saved(conf, state_dir)
    except LedgerError as error:
        LOG.warning("%s", error)  # with or without it, no saved guest goes on
        return
    with closing(_open_ledger(state_dir)) as known, closing(_open_ledger(conf.state_dir)) as ledger:
        goes_on = [each for each in saved if known.find_run(each.uuid) or known.find_domain(each.uuid)]
        lost = [each.name for each in goes_on if ledger.find_run(each.uuid) is None]
    if lost:
        raise InUseError(
            f"{state_dir} has to stay the state folder: domains with NVDIMMs have saved guests, which go on with its "
            f"ledger only: {', '.join(lost)}",
            hint=f"set [DEFAULT] state_dir back to {state_dir}, and start and shut down each, or discard its saved "
            "guest: virsh managedsave-remove; with a copy of the ledger, those that have files only can go on: "
            f"{command('cp', '-aT', state_dir, conf.state_dir)}",
        )


def _protect(log_file: Path) -> Iterator[str]:
    """Take the log, which names domains and files, from everybody but its owner and group: 0.1.0 made it for all."""
    if log_file.is_file() and (mode := log_file.stat().st_mode) & stat.S_IRWXO:
        log_file.chmod(stat.S_IMODE(mode) & ~stat.S_IRWXO)
        yield f"changed {log_file}, which everybody could read"


def unregister(conf: cfg.ConfigOpts, running: Sequence[str], saved: Sequence[str] = ()) -> Iterator[str]:
    """Remove what :func:`register` installed; yield a line for each thing that was done.

    :param running: names of the running domains with NVDIMMs.
    :param saved: names of those with a managed save.
    :raises InUseError: while a domain with NVDIMMs runs: its reboot would fail; or is saved: libvirt removes a managed
        save before its start fails.
    """
    if running:
        raise InUseError(f"domains with NVDIMMs are running: {', '.join(running)}", hint="shut them down first")
    if saved:
        raise InUseError(
            f"domains with NVDIMMs have saved guests: {', '.join(saved)}; a start without the driver would lose them",
            hint="start and shut down each, or discard its saved guest: virsh managedsave-remove",
        )
    try:
        models = map(Path, registered.device_models(conf))
        hook = libvirt_hook(conf).path
        yield from _remove_left(*_left(hook))
        for path in [hook, *models, registered.list_path(conf)]:
            yield remove(path)
        yield from apparmor_rules.forbid(conf)
        yield from systemd_units.disable(conf)
    except OSError as error:
        raise ConfigError(f"cannot remove: {error}", hint=hint_of(error)) from error
    if not os.path.exists(ledger_in(conf.state_dir)):
        return
    yield f"kept {conf.state_dir}"
    with closing(_open_ledger(conf.state_dir)) as ledger:
        records = ledger.domains()
    for record in records:
        yield from (f"kept {item.spec.path}, of domain {record.name}" for item in record.allocations)


def find_running(conf: cfg.ConfigOpts) -> list[str]:
    """Return the running domains with NVDIMMs, by name, or by domid if only Xen knows that they run.

    The starts of those that are over are put away.

    A broken plug-in, or a start that cannot be put away, does not keep the driver from being removed.

    :raises InUseError: when there are starts since the host's boot, and Xen cannot be asked which of them are over.
    """
    if os.path.exists(ledger_in(conf.state_dir)):
        try:
            with closing(load_driver(conf)) as driver:
                driver.reconcile()
        except NvdimmError as error:
            LOG.warning("%s", error)
    with closing(_open_ledger(conf.state_dir)) as ledger:
        started = [each.name for each in _started(ledger)]
        try:
            mapper = plugin_loader.load("nvdimm_driver.mappers", conf.xen.mapper, conf)
            starts = Starts(ledger, (), mapper, LabelServers(conf.state_dir), Holders(conf.state_dir))
            over = {each.name for each in starts.find_stale()}
            unknown = [f"domid {domid} ({uuid})" for domid, uuid in starts.find_unknown()]
        except NvdimmError as error:
            if not started:
                LOG.warning("whether guests run that the ledger does not know cannot be found out: %s", error)
                return []
            raise InUseError(
                f"domains with NVDIMMs may be running: {', '.join(started)}; Xen cannot be asked: {error.message}",
                hint="shut them down; after a reboot of the host, they count as off",
            ) from error
    return [*(name for name in started if name not in over), *unknown]


def find_saved(conf: cfg.ConfigOpts) -> list[str]:
    """Return the names of the domains with NVDIMMs that have a managed save, also such as the ledger does not know.

    :returns: none if a plug-in is broken: that does not keep the driver from being removed.
    """
    return [each.name for each in _find_saved(conf, conf.state_dir)]


def _find_saved(conf: cfg.ConfigOpts, state_dir: str) -> list[DomainRef]:
    try:
        restore = XmlHooks.from_conf(conf).restore
    except NvdimmError as error:
        LOG.warning("%s", error)
        return []
    socket = daemon_socket(conf.rpc.libvirt_direct_socket, conf.rpc.libvirt_socket)
    with closing(_open_ledger(state_dir)) as ledger:
        return repair_saved_guests.saved(ledger, restore, socket, conf.libvirt.save_dir)


def _started(ledger: Ledger) -> list[Record]:
    """Return the domains with a start since the host's boot, whether their guests run still or not."""
    return [each for each in ledger.started_domains() if each.start and each.start.boot_id == host_boot_id()]


def _open_ledger(state_dir: str) -> Ledger:
    """Open the ledger in a folder; where none is, none is made: an empty one in memory."""
    path = ledger_in(state_dir)
    return Ledger(path if os.path.exists(path) else ":memory:")


def libvirt_hook(conf: cfg.ConfigOpts) -> Script:
    """Return the hook that :func:`register` installs."""
    path = Path(conf.libvirt.hooks_dir) / "libxl.d" / HOOK_NAME
    text = HOOK.format(python=shlex.quote(sys.executable), mark=MARK, xml_mark=XML_MARK.decode())
    return Script("hook", path, text, MARK)


def device_model(conf: cfg.ConfigOpts) -> Script:
    """Return the device model that :func:`register` installs."""
    text = DEVICE_MODEL.format(
        python=sys.executable,
        mark=MARK,
        state_dir=conf.state_dir,
        log_file=conf.log_file,
        log_format=conf.log_format,
        log_level=conf.log_level,
        mapper=conf.xen.mapper,
        qemu=conf.xen.qemu,
    )
    return Script("device model", Path(conf.xen.device_model), text, MARK)
