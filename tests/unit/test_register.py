# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from oslo_config import cfg

from nvdimm_driver import conf, plugin_loader
from nvdimm_driver.cmd.apparmor_rules import BEGIN, END
from nvdimm_driver.cmd.nvdimmd import driver_maker, metrics_writer
from nvdimm_driver.cmd.register import device_model, find_running, libvirt_hook, register, unregister
from nvdimm_driver.device_marks import FOLDER, DeviceMarks
from nvdimm_driver.doctor import checklist
from nvdimm_driver.doctor.checklist import Installed
from nvdimm_driver.driver import XenNvdimmDriver, load_driver
from nvdimm_driver.errors import ConfigError, InUseError, LedgerError
from nvdimm_driver.model import BackingIdentity, Run
from nvdimm_driver.registered import ledger_path, list_path, state_dir
from nvdimm_driver.state.ledger import Ledger
from tests.ledger_copies import copy_ledger, forget_in_use
from tests.unit.doubles import UUID, RecordingMapper, started


@pytest.fixture
def options(tmp_path: Path) -> cfg.ConfigOpts:
    file = tmp_path / "nvdimm-driver.conf"
    file.write_text(
        f"[DEFAULT]\nstate_dir={tmp_path}/state\nlog_file={tmp_path}/log\n"
        f"[xen]\ndevice_model={tmp_path}/libexec/dm\nqemu=/bin/echo\n[libvirt]\nhooks_dir={tmp_path}/hooks\n"
        f"apparmor_dir={tmp_path}/apparmor.d\n"
    )
    return conf.load([str(file)])


def test_register_says_what_it_did_and_can_be_repeated(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    first = list(register(options))
    assert first[:3] == [
        f"created {tmp_path}/state",
        f"installed {tmp_path}/libexec/dm",
        f"installed {tmp_path}/hooks/libxl.d/50-nvdimm",
    ]
    assert "systemctl restart libvirtd" in first[3]
    assert [line.split()[0] for line in register(options)][:2] == ["unchanged", "unchanged"]
    assert os.stat(tmp_path / "state").st_mode & 0o777 == 0o700


def test_libvirt_need_not_be_restarted_for_the_hook_of_another_version(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    hook = tmp_path / "hooks/libxl.d/50-nvdimm"
    text = hook.read_text()
    hook.write_text(text + "# of before\n")
    os.utime(hook, (1000, 1000))
    told = list(register(options))
    assert f"installed {hook}" in told
    assert not [line for line in told if line.startswith("restart libvirtd")]
    assert (hook.read_text(), hook.stat().st_mtime) == (text, 1000)


def test_register_makes_the_folders_of_state_and_log(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    options.set_override("log_file", f"{tmp_path}/logs/nvdimm.log")
    assert f"created {tmp_path}/logs" in list(register(options))
    assert (tmp_path / "state/ledger.sqlite-reserve").stat().st_size == 16 << 20


def test_the_installed_scripts_run(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    hook = tmp_path / "hooks/libxl.d/50-nvdimm"
    subprocess.run([hook, "db1", "start", "begin", "-"], check=True, stdin=subprocess.DEVNULL)
    done = subprocess.run([tmp_path / "libexec/dm", "-help"], check=True, capture_output=True, text=True)
    assert done.stdout == "-help\n"


def test_the_device_model_is_told_how_to_log(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    options.set_override("log_level", "DEBUG")
    list(register(options))
    script = (tmp_path / "libexec/dm").read_text()
    assert f"log_file='{tmp_path}/log',\n" in script
    assert "log_format='text',\n    log_level='DEBUG',\n" in script


def test_unregister_takes_it_out_and_keeps_the_ledger(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    assert [line.split()[0] for line in unregister(options, [])] == ["removed", "removed", "removed", "kept"]
    assert not (tmp_path / "libexec/dm").exists()
    assert (tmp_path / "state/ledger.sqlite").exists()
    assert next(unregister(options, [])).startswith("not there")


def test_unregister_is_refused_while_a_domain_runs(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    with pytest.raises(InUseError, match="db1"):
        list(unregister(options, ["db1"]))
    assert (tmp_path / "libexec/dm").exists()


def test_somebody_elses_file_is_not_overwritten(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    other = tmp_path / "libexec/dm"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match=f"{other} exists, and nvdimm_driver did not write it"):
        list(register(options))
    assert other.read_text() == "#!/bin/sh\n"


def test_a_missing_qemu_is_an_error_with_its_path(options: cfg.ConfigOpts) -> None:
    options.set_override("qemu", "/nonexistent/qemu", group="xen")
    with pytest.raises(ConfigError, match="no QEMU at /nonexistent/qemu"):
        list(register(options))


def test_the_interpreter_is_this_one(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    assert (tmp_path / "libexec/dm").read_text().startswith(f"#!{sys.executable} -I\n")


def test_the_state_folder_is_that_of_the_registered_device_model(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """An option that was changed and not registered must not hide a running domain from 'unregister'."""
    assert state_dir(options) == f"{tmp_path}/state"
    list(register(options))
    options.set_override("state_dir", f"{tmp_path}/other")
    assert state_dir(options) == f"{tmp_path}/state"
    options.set_override("state_dir", f'{tmp_path}/it\'s "odd" \\ here')
    list(register(options))
    odd = options.state_dir
    options.set_override("state_dir", f"{tmp_path}/other")
    assert state_dir(options) == odd
    (tmp_path / "libexec/dm").write_text("somebody else's\n    state_dir='/x',\n")
    assert state_dir(options) == f"{tmp_path}/other"


def test_what_a_killed_register_has_left_is_removed(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    left = [tmp_path / f"hooks/{folder}.50-nvdimm.new" for folder in ("", "libxl.d/")]
    for run in (register, partial(unregister, running=[])):
        for path in left:
            path.touch(0o755)
        told = list(run(options))
        for path in left:
            assert f"removed {path}" in told
            assert not path.exists()


def test_an_empty_file_is_what_a_loss_of_power_has_left(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Earlier versions did not sync what they wrote."""
    list(register(options))
    whole, hook = (tmp_path / "libexec/dm").read_text(), tmp_path / "hooks/libxl.d/50-nvdimm"
    os.truncate(tmp_path / "libexec/dm", 0)
    assert f"installed {tmp_path}/libexec/dm" in list(register(options))
    assert (tmp_path / "libexec/dm").read_text() == whole
    os.truncate(hook, 0)
    assert f"removed {hook}" in list(unregister(options, []))


def test_a_link_to_nothing_is_somebody_elses(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """An operator masks a unit so."""
    (tmp_path / "libexec").mkdir()
    (tmp_path / "libexec/dm").symlink_to("/dev/null")
    with pytest.raises(ConfigError, match="nvdimm_driver did not write it"):
        list(register(options))


def test_a_program_in_the_way_is_left_alone(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    (tmp_path / "libexec").mkdir(exist_ok=True)
    (tmp_path / "libexec/dm").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(ConfigError, match="nvdimm_driver did not write it"):
        list(register(options))
    assert (tmp_path / "libexec/dm").read_bytes() == b"\x7fELF\xff\xfe"


def test_a_broken_plug_in_does_not_keep_the_driver_from_being_removed(
    options: cfg.ConfigOpts, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it hide a running domain."""
    assert find_running(options) == []
    list(register(options))
    options.set_override("driver", "broken")
    with closing(Ledger(f"{options.state_dir}/ledger.sqlite")) as ledger:
        ledger.store(UUID, "db1", 1 << 30, [])
        assert find_running(options) == []
        ledger.begin_start(UUID, [])
        assert find_running(options) == ["db1"]
    assert "there is no plug-in 'broken'" in caplog.text


@pytest.mark.parametrize("lost", [False, True])
def test_a_guest_that_the_ledger_does_not_know_keeps_the_driver_from_being_removed(
    options: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The ledger was lost under it, or is from a backup of before its start; it has announced its frames."""
    list(register(options))
    mapper = RecordingMapper({7: UUID})
    mapper.announce(7, [(0x1100000, 0x240000, 512)])
    monkeypatch.setattr(plugin_loader, "load", lambda *_: mapper)
    if lost:
        for file in Path(options.state_dir).glob("ledger.sqlite*"):
            file.unlink()
    assert find_running(options) == [f"domid 7 ({UUID})"]
    assert (Path(options.state_dir) / "ledger.sqlite").exists() is not lost


def start_db1(options: cfg.ConfigOpts) -> None:
    """Register, and record a start as domid 7, which the mappers of these tests do not have."""
    list(register(options))
    with closing(Ledger(f"{options.state_dir}/ledger.sqlite")) as ledger:
        ledger.store(UUID, "db1", 1 << 30, [])
        start = ledger.begin_start(UUID, [])
        ledger.finish_preparing(start, "/qemu", (0, 1), [], [], run=Run(2, "[]", "{}"))
        ledger.begin_mapping(started(ledger), 7)


def test_with_a_broken_plug_in_xen_is_asked_which_domains_run(options: cfg.ConfigOpts) -> None:
    start_db1(options)
    options.set_override("driver", "broken")
    options.set_override("mapper", "dry-run", group="xen")
    assert find_running(options) == []


def test_if_xen_cannot_be_asked_unregister_says_so_and_what_helps(options: cfg.ConfigOpts) -> None:
    start_db1(options)
    options.set_override("mapper", "broken", group="xen")
    with pytest.raises(InUseError, match=r"may be running: db1; Xen cannot be asked: .*'broken'") as raised:
        find_running(options)
    assert "after a reboot of the host, they count as off" in raised.value.hint


def test_another_state_folder_is_refused_while_domains_run_in_the_one_before(
    options: cfg.ConfigOpts, tmp_path: Path
) -> None:
    """Only with that folder, their ends are noted: the hint must not let an operator shut them down first."""
    start_db1(options)
    options.set_override("state_dir", f"{tmp_path}/other")
    with pytest.raises(InUseError, match=f"{tmp_path}/state has to stay .*: db1") as raised:
        list(register(options))
    assert raised.value.hint == f"set [DEFAULT] state_dir back to {tmp_path}/state, shut them down, and then change it"


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("ledger", ["damaged", "gone", "from a backup"])
def test_a_state_folder_whose_ledger_does_not_know_can_be_left_if_no_guest_runs(
    options: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool, ledger: str
) -> None:
    list(register(options))
    if ledger == "damaged":
        (tmp_path / "state/ledger.sqlite").write_bytes(b"damaged" * 4096)
    elif ledger == "gone":
        (tmp_path / "state/ledger.sqlite").unlink()
    options.set_override("state_dir", f"{tmp_path}/other")
    mapper = RecordingMapper({7: UUID})
    if runs:
        mapper.announce(7, [(0x1100000, 0x240000, 512)])
    monkeypatch.setattr(plugin_loader, "load", lambda *_: mapper)
    if runs:
        with pytest.raises(InUseError, match="domid 7"):
            list(register(options))
    else:
        list(register(options))
    assert state_dir(options) == f"{tmp_path}/{'state' if runs else 'other'}"


def test_a_state_folder_whose_ledger_is_damaged_is_not_left_if_xen_cannot_be_asked(
    options: cfg.ConfigOpts, tmp_path: Path
) -> None:
    list(register(options))
    (tmp_path / "state/ledger.sqlite").write_bytes(b"damaged" * 4096)
    options.set_override("state_dir", f"{tmp_path}/other")
    options.set_override("mapper", "broken", group="xen")
    with pytest.raises(InUseError, match="Xen cannot be asked which guests run"):
        list(register(options))


def is_believed(options: cfg.ConfigOpts, folder: Path) -> bool:
    """Register with a state folder; return True if its ledger counts as the one in use."""
    options.set_override("state_dir", str(folder))
    said = "\n".join(register(options))
    with closing(Ledger(ledger_path(options))) as ledger:
        assert ledger.is_from_elsewhere() == ("is a backup or a copy" in said)
        return not ledger.is_from_elsewhere()


@pytest.mark.parametrize("before", ["whole", "lost", "of an earlier version"])
def test_the_ledger_of_another_state_folder_is_not_the_one_in_use(
    options: cfg.ConfigOpts, tmp_path: Path, before: str
) -> None:
    """Neither a new one nor one that was in use earlier: the devices were given away by another since."""
    one, other = tmp_path / "state", tmp_path / "other"
    assert is_believed(options, one)
    if before == "lost":
        shutil.rmtree(one)
    if before == "of an earlier version":
        forget_in_use(one)
    assert not is_believed(options, other)
    with closing(Ledger(ledger_path(options))) as ledger:
        ledger.take_over(compared=True)
    assert is_believed(options, other)
    assert not is_believed(options, one)


def test_a_state_folder_that_was_moved_has_the_ledger_in_use(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    assert is_believed(options, tmp_path / "state")
    (tmp_path / "state").rename(tmp_path / "other")
    assert is_believed(options, tmp_path / "other")


def test_another_state_folder_gets_the_marks_of_devices(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Also if it was in use earlier, and has older ones."""
    device, other = (BackingIdentity("pmem", uid, 0, 0, 0, 1 << 21) for uid in ("one", "other"))
    assert is_believed(options, tmp_path / "state")
    with closing(Ledger(ledger_path(options))) as ledger:
        ledger.device_marks.set_owner(device, b"of now")
        ledger.device_marks.note_run([device], 7)
    before = DeviceMarks(tmp_path / "other" / FOLDER)
    (tmp_path / "other").mkdir()
    before.set_owner(device, b"of before")
    before.set_owner(other, b"of before")
    is_believed(options, tmp_path / "other")
    with closing(Ledger(ledger_path(options))) as ledger:
        marks = ledger.device_marks
        assert (marks.owner(device), marks.last_run(device), marks.owner(other)) == (b"of now", 7, b"of before")


def mark_four(options: cfg.ConfigOpts) -> list[BackingIdentity]:
    """Register, and mark four devices."""
    list(register(options))
    devices = [BackingIdentity("pmem", f"ns{number}", 0, 0, 0, 1 << 21) for number in range(4)]
    with closing(Ledger(ledger_path(options))) as ledger:
        for number, each in enumerate(devices):
            ledger.device_marks.set_owner(each, b"db1")
            ledger.device_marks.note_run([each], number + 1)
    return devices


def test_another_state_folder_gets_all_marks_that_can_be_read(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Its disk is damaged, which is why the operator changes it. Whose the others are must not be lost, too."""
    devices = mark_four(options)
    for name in ("ns1-0-2097152.owner", "ns2-0-2097152.run"):
        (tmp_path / "state" / FOLDER / name).unlink()
        (tmp_path / "state" / FOLDER / name).mkdir()  # which cannot be read, also by root
    options.set_override("mapper", "dry-run", group="xen")
    options.set_override("state_dir", f"{tmp_path}/other")
    said = list(register(options))
    with closing(Ledger(ledger_path(options))) as ledger:
        assert [ledger.device_marks.owner(each) for each in devices] == [b"db1", None, b"db1", b"db1"]
        assert [ledger.device_marks.last_run(each) for each in devices] == [1, 2, 0, 4]
    folder = f"{tmp_path}/state/{FOLDER}"
    assert [line for line in said if line.startswith("cannot read")] == [
        f"cannot read {folder}/ns1-0-2097152.owner: Is a directory; whose that device is, is not known here",
        f"cannot read {folder}/ns2-0-2097152.run: Is a directory; no saved guest with that device can go on",
    ]


@pytest.mark.parametrize("how", ["not a folder", "gone", "moved", "without devices"])
def test_register_says_when_it_finds_no_marks(options: cfg.ConfigOpts, tmp_path: Path, how: str) -> None:
    mark_four(options)
    before = tmp_path / "state"
    if how == "not a folder":
        shutil.rmtree(before / FOLDER)
        (before / FOLDER).symlink_to(FOLDER)  # to itself: ELOOP
    elif how == "gone":
        shutil.rmtree(before)
    elif how == "moved":
        before.rename(tmp_path / "other")
    else:
        shutil.rmtree(before / FOLDER)
    options.set_override("mapper", "dry-run", group="xen")
    options.set_override("state_dir", f"{tmp_path}/other")
    said = [line for line in register(options) if "is not known here" in line]
    assert len(said) == (how in ("not a folder", "gone"))


def test_register_fails_if_a_mark_cannot_be_written(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Nothing would come back for it: the folder is in use from then on."""
    mark_four(options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FOLDER).write_text("in the way")
    options.set_override("mapper", "dry-run", group="xen")
    options.set_override("state_dir", f"{tmp_path}/other")
    with pytest.raises(LedgerError, match=f"cannot write {tmp_path}/other/{FOLDER}/ns0"):
        list(register(options))
    assert state_dir(options) == f"{tmp_path}/state"
    (tmp_path / "other" / FOLDER).unlink()
    list(register(options))
    assert len(list((tmp_path / "other" / FOLDER).iterdir())) == 8


@pytest.mark.parametrize("other_device_model", [False, True])
def test_another_state_folder_is_noticed_together_with_another_device_model(
    options: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_device_model: bool
) -> None:
    """Nothing is at the path of the new device model that tells which folder was in use."""
    device = BackingIdentity("pmem", "one", 0, 0, 0, 1 << 21)
    list(register(options))
    with closing(Ledger(ledger_path(options))) as ledger:
        ledger.device_marks.set_owner(device, b"db1")
    if other_device_model:
        options.set_override("device_model", f"{tmp_path}/libexec/new", group="xen")
    options.set_override("state_dir", f"{tmp_path}/other")
    with pytest.raises(ConfigError, match=f"the driver is registered with {tmp_path}/state"):
        load_driver(options)
    mapper = RecordingMapper({7: UUID})
    mapper.announce(7, [(0x1100000, 0x240000, 512)])
    monkeypatch.setattr(plugin_loader, "load", lambda *_: mapper)
    with pytest.raises(InUseError, match="domid 7"):
        list(register(options))
    mapper.announce(7, ())
    list(register(options))
    with closing(Ledger(ledger_path(options))) as ledger:
        assert ledger.is_from_elsewhere()
        assert ledger.device_marks.owner(device) == b"db1"


def test_device_models_of_earlier_options_use_the_same_state_folder(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Domains that were defined with one keep it, and it may be the configured one again."""
    old, new = tmp_path / "libexec/dm", tmp_path / "libexec/new"
    list(register(options))
    options.set_override("device_model", str(new), group="xen")
    assert is_believed(options, tmp_path / "state")
    assert not is_believed(options, tmp_path / "other")
    assert f"    state_dir='{tmp_path}/other',\n" in old.read_text()
    assert old.read_text() == new.read_text()
    with closing(Ledger(ledger_path(options))) as ledger:
        ledger.take_over(compared=True)
    options.set_override("device_model", str(old), group="xen")
    assert is_believed(options, tmp_path / "other")
    list(unregister(options, []))
    assert not old.exists()
    assert not new.exists()


def test_a_list_of_device_models_that_cannot_be_read_is_an_error(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    list(register(options))
    (tmp_path / "registered").unlink()
    (tmp_path / "registered").mkdir()
    assert load_driver(options).ledger.path == f"{tmp_path}/state/ledger.sqlite"
    options.set_override("device_model", f"{tmp_path}/libexec/new", group="xen")
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}/registered"):
        load_driver(options)


def test_without_options_the_list_of_device_models_is_in_the_standard_place() -> None:
    assert [str(list_path(conf.load(files))) for files in ([], ["/dev/null"])] == ["/etc/nvdimm-driver/registered"] * 2


def test_a_state_folder_that_was_put_aside_and_comes_back(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    folder, aside = tmp_path / "state", tmp_path / "aside"
    assert is_believed(options, folder)
    folder.rename(aside)
    list(register(options))
    with closing(Ledger(ledger_path(options))) as ledger:
        assert ledger.is_from_elsewhere()
        ledger.take_over(compared=True)
    folder.rename(tmp_path / "newer")
    aside.rename(folder)
    with closing(Ledger(ledger_path(options))) as ledger:
        assert ledger.is_strange()


@pytest.mark.parametrize("names", [("real", "link"), ("link", "real")])
def test_two_names_of_a_state_folder_tell_one_ledger(
    options: cfg.ConfigOpts, tmp_path: Path, names: tuple[str, str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    first, second = (tmp_path / name for name in names)
    assert is_believed(options, first)
    copy_ledger(first / "ledger.sqlite", tmp_path / "backup")
    with closing(Ledger(ledger_path(options))) as ledger:
        ledger.count_harvest(1.0)
    assert is_believed(options, second)
    with (
        closing(sqlite3.connect(tmp_path / "backup")) as backup,
        closing(sqlite3.connect(second / "ledger.sqlite")) as there,
    ):
        backup.backup(there)
    for each in (first, second):
        with closing(Ledger(str(each / "ledger.sqlite"))) as ledger:
            assert ledger.is_from_elsewhere()


def test_a_state_folder_that_is_not_registered_yet_is_not_used(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """The device model uses the one that it was registered with."""
    list(register(options))
    options.set_override("state_dir", f"{tmp_path}/other")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=f"is {tmp_path}/other, and the driver is registered with {tmp_path}/state"):
        load_driver(options)
    assert list((tmp_path / "other").iterdir()) == []


def test_doctor_looks_at_no_ledger_that_is_not_registered(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    """It would also upgrade it."""
    list(register(options))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/ledger.sqlite").touch()
    options.set_override("state_dir", f"{tmp_path}/other")
    checks = dict(checklist._checks(options, Installed(libvirt_hook(options), device_model(options), None)))
    for name in ("state folder", "ledger"):
        with pytest.raises(ConfigError, match="the driver is registered with"):
            checks[name]()
    assert (tmp_path / "other/ledger.sqlite").stat().st_size == 0


def test_a_log_that_everybody_could_read_is_protected(options: cfg.ConfigOpts, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    (tmp_path / "log").chmod(0o644)
    assert f"changed {tmp_path}/log, which everybody could read" in list(register(options))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640
    assert not [line for line in register(options) if line.startswith("changed")]


def test_register_adds_to_the_profile_of_libvirtd_and_unregister_takes_it_away(
    options: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/python/bin/python3.11")
    profile, local = tmp_path / "apparmor.d/usr.sbin.libvirtd", tmp_path / "apparmor.d/local/usr.sbin.libvirtd"
    profile.parent.mkdir()
    profile.write_text("profile libvirtd /usr/sbin/libvirtd {\n}\n")
    local.parent.mkdir()
    own = "  # an operator's\n  /srv/** r,\n"
    local.write_text(own)
    assert f"changed {local}" in list(register(options))
    dm = options.xen.device_model
    python = "  /opt/python/bin/python3.11 Ux,\n"
    rules = "  change_profile -> nvdimm-hook,\n  signal (send) peer=nvdimm-*,\n  ptrace (read) peer=nvdimmd,\n"
    rules += f"  {dm} Ux,\n{python}"
    assert local.read_text() == f"{own}{BEGIN}\n{rules}{END}\n"
    assert f"changed {local}" not in list(register(options))
    options.set_override("device_model", f"{tmp_path}/libexec/new", group="xen")
    list(register(options))
    both = f"  {tmp_path}/libexec/new Ux,\n  {dm} Ux,\n{python}{END}"
    assert both in local.read_text(), "domains still name the one before"
    local.write_text(local.read_text() + "  /opt/** r,\n")
    assert f"changed {local}" in list(unregister(options, []))
    assert local.read_text() == f"{own}  /opt/** r,\n"


def test_register_adds_nothing_to_a_profile_that_allows_it(
    options: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.11")
    profile = tmp_path / "apparmor.d/usr.sbin.virtxend"
    profile.parent.mkdir()
    profile.write_text(f"  change_profile -> nvdimm-hook,\n  {options.xen.device_model} Ux,\n")
    list(register(options))
    assert not (tmp_path / "apparmor.d/local").exists()


def test_nvdimmd_writes_metrics_from_the_state_folder_that_is_registered_now(
    options: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the options anew for each, as for each call."""
    file = tmp_path / "nvdimm-driver.conf"
    options.set_override("textfile", f"{tmp_path}/metrics", group="metrics")
    write = metrics_writer(options, driver_maker([str(file)]))
    assert write is not None
    monkeypatch.setattr(XenNvdimmDriver, "reconcile", lambda _: None)
    for folder in ("state", "other"):
        file.write_text(file.read_text().replace(f"{tmp_path}/state\n", f"{tmp_path}/{folder}\n"))
        now = conf.load([str(file)])
        now.set_override("mapper", "dry-run", group="xen")
        list(register(now))
        with closing(Ledger(ledger_path(now))) as ledger:
            ledger.count_harvest(1.0 if folder == "state" else 8.0)
        write()
        assert f"harvest_seconds_sum {1.0 if folder == 'state' else 8.0}\n" in (tmp_path / "metrics").read_text()
