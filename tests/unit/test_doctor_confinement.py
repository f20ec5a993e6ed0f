# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.apparmor import PROFILES
from nvdimm_driver.doctor.confinement import (
    Daemon,
    check_apparmor,
    check_label_servers,
    check_profiles,
    check_selinux,
    find_daemon,
    missing_rules,
)
from nvdimm_driver.doctor.finding import Finding, Result
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.processes import start_time

DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
ENFORCED = Daemon("libvirtd", 1.0, "libvirtd (enforce)")
PROFILE = "profile libvirtd /usr/sbin/libvirtd {\n  capability chown,\n  # capability linux_immutable,\n}\n"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def checked(daemon: Daemon | None, device_model: str, root: Path) -> Finding:
    return check_apparmor(daemon, [device_model], root / "etc/apparmor.d", root)


@pytest.fixture
def apparmor(tmp_path: Path) -> Path:
    """The root folder of a host with AppArmor and Debian's profile."""
    write(tmp_path, "sys/module/apparmor/parameters/enabled", "Y\n")
    write(tmp_path, "etc/apparmor.d/usr.sbin.libvirtd", PROFILE)
    return tmp_path


def test_without_apparmor(tmp_path: Path) -> None:
    assert checked(ENFORCED, DEVICE_MODEL, tmp_path).result == Result.PASS
    write(tmp_path, "sys/module/apparmor/parameters/enabled", "N\n")
    assert checked(ENFORCED, DEVICE_MODEL, tmp_path).result == Result.PASS


@pytest.mark.parametrize("label", ["unconfined", "libvirtd (complain)"])
def test_a_daemon_that_is_not_confined(apparmor: Path, label: str) -> None:
    assert checked(Daemon("libvirtd", 1.0, label), DEVICE_MODEL, apparmor).result == Result.PASS


def test_a_daemon_of_which_nothing_is_known(apparmor: Path) -> None:
    assert checked(None, DEVICE_MODEL, apparmor).result == Result.NOTE
    assert checked(Daemon("libvirtd", 1.0, ""), DEVICE_MODEL, apparmor).result == Result.NOTE


def test_a_profile_that_does_not_allow_what_is_needed(apparmor: Path) -> None:
    found = checked(ENFORCED, DEVICE_MODEL, apparmor)
    assert found.result == Result.WARN
    assert found.message.endswith(
        "the profile lacks: change_profile -> nvdimm-hook, signal (send) peer=nvdimm-*, ptrace (read) peer=nvdimmd,"
    )
    assert found.hint == "repeat 'nvdimmctl register'"
    write(apparmor, "etc/apparmor.d/local/usr.sbin.libvirtd", "change_profile -> nvdimm-hook,\n")
    assert checked(ENFORCED, DEVICE_MODEL, apparmor).result == Result.PASS
    found = checked(ENFORCED, "/opt/dm", apparmor)
    assert "/opt/dm Ux," in found.message


def test_the_drivers_own_profiles(apparmor: Path) -> None:
    assert check_profiles(apparmor).result == Result.NOTE, "they cannot be listed"
    lines = [f"{name} (enforce)\n" for name in PROFILES]
    write(apparmor, "sys/kernel/security/apparmor/profiles", "".join(lines))
    assert check_profiles(apparmor).result == Result.PASS
    write(apparmor, "sys/kernel/security/apparmor/profiles", "".join(lines[1:]) + "nvdimmd (complain)\n")
    found = check_profiles(apparmor)
    assert (found.result, found.message) == (Result.WARN, "is on, and does not confine nvdimmd")
    write(apparmor, "sys/module/apparmor/parameters/enabled", "N\n")
    assert check_profiles(apparmor).result == Result.PASS


@pytest.mark.parametrize("rule", ["capability,", " capability chown linux_immutable,", "capability linux_immutable,"])
def test_rules_that_allow_it(rule: str) -> None:
    assert missing_rules(f"{{\n{rule}\n}}", [DEVICE_MODEL]) == []


def test_the_profile_of_debian() -> None:
    """The profile in this machine's libvirt-daemon-system."""
    rules = Path("/etc/apparmor.d/usr.sbin.libvirtd").read_text()
    assert missing_rules(rules, [DEVICE_MODEL]) == [
        "change_profile -> nvdimm-hook,",
        "signal (send) peer=nvdimm-*,",
        "ptrace (read) peer=nvdimmd,",
    ]


@pytest.mark.parametrize(("enforce", "result"), [(None, Result.PASS), ("0", Result.PASS), ("1", Result.WARN)])
def test_selinux(tmp_path: Path, enforce: str | None, result: Result) -> None:
    if enforce is not None:
        write(tmp_path, "sys/fs/selinux/enforce", enforce)
    assert check_selinux(tmp_path).result == result


def test_the_daemon_is_found_and_the_modular_one_is_preferred(tmp_path: Path) -> None:
    stat = Path("/proc/self/stat").read_text()
    assert find_daemon(tmp_path) is None
    for number, name in enumerate(("bash", "libvirtd", "virtxend"), start=10):
        write(tmp_path, f"{number}/comm", f"{name}\n")
        write(tmp_path, f"{number}/stat", stat)
        write(tmp_path, f"{number}/attr/current", f"{name} (enforce)\n\0")
    found = find_daemon(tmp_path)
    assert found is not None
    assert (found.name, found.label) == ("virtxend", "virtxend (enforce)")
    assert found.started == pytest.approx(start_time(Path("/proc/self")))
    (tmp_path / "12/stat").write_text("")
    found = find_daemon(tmp_path)
    assert found is not None
    assert found.name == "libvirtd"


@pytest.mark.parametrize(("dsm", "result"), [("qemu", Result.FAIL), ("aml", Result.NOTE), ("none", Result.NOTE)])
def test_label_servers_that_cannot_be_kept_from_the_host_are_named(dsm: str, result: Result) -> None:
    assert check_label_servers(None, dsm).result is Result.PASS
    found = check_label_servers(ConfigError("pivot_root: Invalid argument", hint="boot from a disk"), dsm)
    assert (found.result, found.hint) == (result, "boot from a disk")
    assert "pivot_root: Invalid argument" in found.message
