# SPDX-License-Identifier: Apache-2.0
"""AppArmor in enforce mode: libvirtd under Debian's profile, the driver's programs under theirs, and a whole start."""

from __future__ import annotations

import json

import pytest

from nvdimm_driver.apparmor import DEVICE_MODEL, LABEL_SERVER, NVDIMMD, PROFILES
from tests.lab import operator
from tests.lab.guest import install_guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
NAME, FILE = "confined", "/mnt/pmem0/confined.img"


@pytest.mark.thorough  # test_qemu_labels.py looks at a guest, too
def test_a_guest_with_labels_runs_and_everything_is_confined(driver_host: XenHost) -> None:
    enforced = json.loads(driver_host.check("aa-status --json").stdout)["profiles"]
    assert {name: enforced.get(name) for name in ("libvirtd", *PROFILES)} == dict.fromkeys(
        ("libvirtd", *PROFILES), "enforce"
    )
    assert operator.confinement(driver_host, "$(pidof libvirtd)") == "libvirtd (enforce)"
    assert operator.confinement(driver_host, f"$(cat {operator.NVDIMMD_PID})") == f"{NVDIMMD} (enforce)"
    driver_host.check("dmesg --clear")
    install_guest(driver_host)
    xml = operator.domain_xml(NAME, [operator.nvdimm(FILE, 18, label_kib=128)], dsm="qemu")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    guest = operator.start(driver_host, NAME)
    try:
        assert guest.wait_report().problems == ()
        watching, serving = driver_host.check("pgrep -f '[n]vdimm_driver.cmd.label_server'").stdout.split()
        qemu = driver_host.check(f"pgrep -P {serving}").stdout.strip()
        assert operator.confinement(driver_host, watching) == f"{DEVICE_MODEL} (enforce)"
        assert operator.confinement(driver_host, serving) == f"{LABEL_SERVER} (enforce)"
        assert operator.confinement(driver_host, qemu) == f"{LABEL_SERVER} (enforce)"
        driver_host.check(f"kill -KILL {qemu}")
        guest.check("run", "cat /sys/bus/nd/devices/nmem*/available_slots")
        driver_host.check(f"kill -KILL {watching} {serving}")
        assert operator.show(driver_host, NAME)["label_server"] == "running"
        assert "i" in driver_host.check(f"lsattr {FILE}").stdout.split()[0], "the hook has made it immutable"
        guest.reboot()
    finally:
        driver_host.run(f"{operator.VIRSH} destroy {NAME}")
        operator.remove(driver_host, NAME)
        driver_host.check(f"rm -f {FILE}")
    assert operator.apparmor_denials(driver_host) == ""


def test_doctor_says_what_is(driver_host: XenHost) -> None:
    rows = json.loads(driver_host.run(f"{operator.NVDIMMCTL} doctor -f json").stdout)
    found = {row["Check"]: row for row in rows}
    for name in ("AppArmor, nvdimm-driver", "AppArmor, libvirt"):
        assert found[name]["Result"] == "PASS", found[name]
    assert "confines libvirtd" in found["AppArmor, libvirt"]["Message"]


def test_the_device_model_becomes_no_other_program(driver_host: XenHost) -> None:
    """As a fault in the driver's own check would try it; the profile is the second one."""
    code = f"from nvdimm_driver import apparmor; import os; assert apparmor.enter({DEVICE_MODEL!r}); "
    driver_host.check("install -m 755 /bin/true /srv/emulator && install -m 755 /bin/true /mnt/pmem0/emulator")
    try:
        for path in ("/srv/emulator", "/mnt/pmem0/emulator", "/usr/bin/virsh", "/bin/sh"):
            done = driver_host.run(f"""python3 -c "{code} os.execv('{path}', ['x'])" """)
            assert "PermissionError" in done.stderr, path
        qemu = "os.execv('/usr/libexec/xen-qemu-system-i386', ['x', '-version'])"
        done = driver_host.check(f'python3 -c "{code} {qemu}"')
        assert "QEMU emulator" in done.stdout
    finally:
        driver_host.check("rm /srv/emulator /mnt/pmem0/emulator")


@pytest.mark.parametrize("profile", PROFILES)
def test_none_of_them_changes_what_the_system_trusts(driver_host: XenHost, profile: str) -> None:
    code = f"from nvdimm_driver import apparmor; assert apparmor.enter({profile!r}); open('{{}}', 'a')"
    for path in ("/etc/passwd", "/usr/bin/virsh", "/root/.ssh/authorized_keys", "/proc/sys/kernel/core_pattern"):
        done = driver_host.run(f'mkdir -p /root/.ssh; python3 -c "{code.format(path)}"')
        assert "PermissionError" in done.stderr, path


def test_a_label_server_that_nvdimmd_starts_has_both_profiles(driver_host: XenHost) -> None:
    """Under systemd, nvdimmd has no_new_privs, with which a process keeps the profile that it has."""
    code = (
        f"import ctypes; from nvdimm_driver import apparmor; ctypes.CDLL(None).prctl(38, 1, 0, 0, 0); "
        f"assert apparmor.enter({NVDIMMD!r}); assert apparmor.enter({LABEL_SERVER!r}); "
        "print(open('/proc/self/attr/current').read())"
    )
    done = driver_host.check(f'python3 -c "{code}"')
    assert {*done.stdout.strip().removesuffix(" (enforce)").split("//&")} == {NVDIMMD, LABEL_SERVER}
