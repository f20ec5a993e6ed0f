# SPDX-License-Identifier: Apache-2.0
"""nvdimmctl doctor on a machine without Xen, and on a host with the real libvirt and driver (bench_host.py)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from nvdimm_driver.doctor import libvirt
from nvdimm_driver.doctor.finding import Result
from tests.integration.bench_host import Host
from tests.integration.etc_folder import with_folder
from tests.integration.private_libvirtd import PrivateLibvirtd
from tests.waiting import HANG_SECONDS

COLUMNS = {"Check", "Result", "Message", "Hint"}
CONF = """
[DEFAULT]
state_dir = {folder}/state
log_file = {folder}/log
[libvirt]
hooks_dir = {folder}/hooks
[xen]
device_model = {folder}/device-model
qemu = {folder}/qemu
[rpc]
socket = {folder}/socket
libvirt_socket = {folder}/libvirt
libvirt_direct_socket = {folder}/direct
[acpi]
builder = native
"""


def doctor(folder: Path, *words: str, nova: Path | None = None, options: str = "") -> subprocess.CompletedProcess[str]:
    conf = folder / "nvdimm-driver.conf"
    conf.write_text(CONF.format(folder=folder).replace("[DEFAULT]", f"[DEFAULT]\n{options}"))
    command = [str(Path(sys.executable).with_name("nvdimmctl")), "--config-file", str(conf), "doctor", *words]
    command = with_folder("/etc/nova", nova, command) if nova else command
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert "Traceback" not in done.stderr
    return done


def rows(text: str) -> dict[str, dict[str, str]]:
    found: list[dict[str, str]] = json.loads(text)
    assert all(row.keys() == COLUMNS and all(isinstance(value, str) for value in row.values()) for row in found)
    assert all(row["Result"] in list(Result) and row["Message"] for row in found)
    assert len({row["Check"] for row in found}) == len(found)
    return {row["Check"]: row for row in found}


def test_a_machine_without_xen_fails_and_says_what_to_do(tmp_path: Path) -> None:
    done = doctor(tmp_path, "-f", "json")
    assert done.returncode == 1
    assert done.stderr == ""
    found = rows(done.stdout)
    assert {name for name, row in found.items() if row["Result"] == "PASS"} == {
        *(
            "plug-ins",
            "ACPI tables",
            "label servers, isolation",
            "AppArmor, nvdimm-driver",
            "AppArmor, libvirt",
            "SELinux",
            "log",
        )
    }
    assert {name for name, row in found.items() if row["Result"] == "NOTE"} <= {"access", "nvdimmd, boot"}
    for name in (
        "Xen",
        "namespaces",
        "pools",
        "QEMU",
        "hook",
        "device model",
        "libvirt",
        "definitions",
        "nvdimmd",
        "state folder",
        "ledger",
    ):
        assert found[name]["Result"] == "FAIL"
        assert found[name]["Hint"]
    assert found["nvdimmd"]["Message"] == f"{tmp_path}/socket: No such file or directory"
    assert not (tmp_path / "state").exists(), "nothing is changed"


@pytest.mark.parametrize(
    ("options", "result", "message"),
    [
        ("driver = kvm", "FAIL", "no plug-in 'kvm' in nvdimm_driver.drivers"),
        ("xml_hooks = libxl, other", "FAIL", "no plug-in 'other' in nvdimm_driver.xml_hooks"),
        ("xml_hooks =", "WARN", "libvirt's libxl driver refuses a domain that 'libxl' has not rewritten"),
    ],
)
def test_a_plug_in_that_is_missing_is_told(tmp_path: Path, options: str, result: str, message: str) -> None:
    found = rows(doctor(tmp_path, "-f", "json", options=options).stdout)["plug-ins"]
    assert found["Result"] == result
    assert message in found["Message"]
    assert found["Hint"]


def test_lines_for_people_and_every_other_format(tmp_path: Path) -> None:
    lines = doctor(tmp_path).stdout.splitlines()
    assert lines[0].split()[:2] == ["plug-ins", "PASS"]
    assert lines[1].split()[:2] == ["Xen", "FAIL"]
    assert lines[2].split()[:2] == ["->", "boot"]
    assert "\033" not in "".join(lines)
    for name in ("table", "csv", "value", "yaml"):
        done = doctor(tmp_path, "-f", name)
        assert done.returncode == 1
        assert "boot this machine into Xen" in done.stdout
    assert doctor(tmp_path, "-c", "Check", "-c", "Result").stdout.splitlines()[1].split() == ["Xen", "FAIL"]
    assert doctor(tmp_path, "-f", "xml").returncode == 2


def test_who_is_not_root_gets_an_answer() -> None:
    """Only root can look into the ledger's folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir(mode=0o700)
        (folder / "nvdimm-driver.conf").write_text(CONF.format(folder=folder))
        code = (
            "import os, sys; from nvdimm_driver.cmd.nvdimmctl import main; "
            "from nvdimm_driver.cmd import register; from nvdimm_driver import conf; "
            "from nvdimm_driver.doctor.checklist import Installed, examine; options = conf.load([sys.argv[1]]); "
            "installed = Installed(register.libvirt_hook(options), register.device_model(options), None); "
            "os.setuid(65534); print([each for each in examine(options, installed) if each.check == 'ledger'])"
        )
        command = [sys.executable, "-c", code, str(folder / "nvdimm-driver.conf")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "hint='run as root'" in done.stdout, done.stderr
    assert done.returncode == 0


def test_nova_is_looked_at_where_there_is_a_nova_conf(tmp_path: Path) -> None:
    conf = tmp_path / "nova/nova.conf"
    conf.parent.mkdir()
    libvirt_section = "[libvirt]\nvirt_type = kvm\npmem_namespaces = 6GB:ns0\n"
    conf.write_text(f"[DEFAULT]\ncompute_driver = nvdimm_ext.XenLibvirtDriver\n{libvirt_section}")
    found = rows(doctor(tmp_path, "-f", "json", nova=conf.parent).stdout)
    assert found["Nova, compute_driver"]["Result"] == "PASS"
    assert found["Nova, virt_type"]["Result"] == "FAIL"
    assert found["Nova, pmem_namespaces"]["Message"] == f"there is no {tmp_path}/state/ledger.sqlite"
    assert not (tmp_path / "state").exists(), "nothing is changed"
    conf.write_text("[libvirt\n")
    found = rows(doctor(tmp_path, "-f", "json", nova=conf.parent).stdout)
    assert found["Nova"]["Result"] == "FAIL"
    assert "/etc/nova/nova.conf" in found["Nova"]["Message"]


# --- with libvirtd ---


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with the driver, libvirtd and nvdimmd, and a defined domain."""
    made = Host(tmp_path_factory.mktemp("host"))
    try:
        made.define("db1", 1)
        yield made
    finally:
        made.libvirtd.close()


def looked_at(host: Host) -> dict[str, dict[str, str]]:
    done = host.nvdimmctl("doctor", "-f", "json")
    assert "[\n" in done.stdout, done.stderr
    found = rows(done.stdout[done.stdout.index("[\n") :])  # the stand-ins for Xen's libraries print to stdout, too
    assert done.returncode == int(any(row["Result"] == "FAIL" for row in found.values())), done.stderr
    return found


def test_what_is_right_passes(host: Host) -> None:
    found = looked_at(host)
    for name in (
        *(
            "plug-ins",
            "Xen",
            "toolstack library",
            "HAP",
            "namespaces",
            "namespace0.0",
            "QEMU",
            "ACPI tables",
            "device model",
        ),
        *("hook", "libvirt", "nvdimmd", "ledger", "ledger, Xen", "ledger, backings", "label servers", "holders"),
    ):
        assert found[name]["Result"] == "PASS", found[name]
    assert found["memory type"]["Result"] == "WARN"
    assert found["ledger"]["Message"] == "1 domains, 1 NVDIMMs", "nvdimmd was asked about one that is not defined"
    assert found["pools"]["Result"] == "NOTE"
    version = subprocess.check_output(["libvirtd", "--version"], text=True).split()[-1]  # "libvirtd (libvirt) 9.0.0"
    assert found["libvirt"]["Message"].startswith(version)
    kind = "slic" if version.startswith("9.") else "rawset"  # Debian 12's libvirt knows no other
    assert f"<table type='{kind}'>" in found["ACPI table type"]["Message"]


def test_a_running_domain_is_in_both(host: Host) -> None:
    host.check("start", "db1")
    assert looked_at(host)["ledger, Xen"]["Message"] == "1 domains run, according to both"
    host.check("destroy", "db1")


def test_a_library_that_does_not_fit(host: Host) -> None:
    host.fail("xc_physinfo", 13)
    found = looked_at(host)
    host.clean_up()
    assert found["toolstack library"]["Result"] == "FAIL"
    assert "EACCES" in found["toolstack library"]["Message"]
    assert found["HAP"]["Result"] == "FAIL"


def test_without_hook_device_model_or_file(host: Host) -> None:
    moved = [host.libvirtd.hooks / "libxl.d/50-nvdimm", host.folder / "nvdimm-device-model"]
    for path in moved:
        path.rename(path.with_name("away"))
    host.libvirtd.run("mv", host.folder / "pmem/db1.img", host.folder / "pmem/away")
    found = looked_at(host)
    for path in moved:
        path.with_name("away").rename(path)
    host.libvirtd.run("mv", host.folder / "pmem/away", host.folder / "pmem/db1.img")
    for name in ("hook", "hook, libvirt", "device model", "ledger, backings"):
        assert found[name]["Result"] == "FAIL"
    assert "db1" in found["ledger, backings"]["Message"]


def test_libvirtd_in_the_place_of_nvdimmd_is_not_taken_for_it(host: Host) -> None:
    path = host.libvirtd.folder / "run/libvirt/libvirt-sock"
    found = libvirt.check_nvdimmd(str(path), f"{host.folder}/nvdimm-device-model")
    assert found.result == Result.FAIL


def test_a_libvirtd_without_xen(tmp_path: Path) -> None:
    with PrivateLibvirtd(tmp_path) as libvirtd:
        first, second = libvirt.check_libvirt(str(libvirtd.socket))
    assert (first.result, second.result) == (Result.FAIL, Result.FAIL)
    assert str(libvirtd.socket) in first.message


def test_who_does_not_answer_or_is_not_libvirt(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            for reply in (b"HTTP/1.1 400 Bad Request\r\n\r\n....", b""):
                client, _ = listener.accept()
                client.recv(28)
                client.sendall(reply)
                client.close()

        server = Thread(target=answer)
        server.start()
        for expected in ("RPC message", "closed"):
            found = libvirt.check_nvdimmd(str(path), "/dm")
            assert found.result == Result.FAIL
            assert expected in found.message
        server.join()
        assert "no answer in time" in libvirt.check_nvdimmd(str(path), "/dm", timeout=0.2).message
