# SPDX-License-Identifier: Apache-2.0
"""A user's <emulator> runs as root: which programs a domain with NVDIMMs may name, under the real libvirtd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver.xml.rewrite import NAMESPACE
from tests.integration.bench_host import QEMU, Host

USER = 1000
UNLISTED = "which is not in [xen] emulators, and would run as root"


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    host = Host(folder, f"\n[xen]\nemulators = {folder}/listed\n")
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """A host with no domain, and one program in ``[xen] emulators``."""
    listed = shared_host.folder / "listed"
    make_program(listed)
    yield shared_host
    shared_host.clean()
    for name in shared_host.libvirtd.check("list", "--all", "--name").split():
        if name != "Domain-0":
            shared_host.check("undefine", name, "--managed-save")
    for row in shared_host.nvdimmctl("list", "-f", "value", "-c", "Domain").stdout.split():
        shared_host.nvdimmctl("release", "--yes", row)
    shared_host.libvirtd.run("find", shared_host.folder / "pmem", "-name", "*.img", "-delete")
    for path in (listed, shared_host.folder / "users"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_program(path: Path) -> None:
    path.write_text(QEMU.replace("echo running", f"touch {path}.ran; echo running"))
    path.chmod(0o755)


def xml(host: Host, emulator: Path | str) -> Path:
    """Return the file of domain db1, with an emulator."""
    file = host.xml("db1", 1)
    file.write_text(file.read_text().replace("<devices>", f"<devices><emulator>{emulator}</emulator>"))
    return file


def refused(host: Host, *words: str | Path) -> str:
    done = host.virsh(*words)
    assert done.returncode == 1, done
    return done.stderr


@contextmanager
def unlisted(host: Host) -> Iterator[None]:
    """Take the program out of ``[xen] emulators``."""
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    before = conf.read_text()
    conf.write_text(before.replace(f"emulators = {host.folder}/listed", "emulators ="))
    try:
        yield
    finally:
        conf.write_text(before)


def test_a_listed_program_runs_the_guest(host: Host) -> None:
    host.check("define", xml(host, f"{host.folder}/listed"))
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    assert (host.folder / "listed.ran").exists()


@pytest.mark.parametrize("trick", ["script", "symlink", "dotdot", "slashes", "relative"])
def test_any_other_path_is_refused_by_define_create_and_plan(host: Host, trick: str) -> None:
    users = host.folder / "users"
    users.mkdir()
    os.chown(users, USER, USER)
    make_program(users / "script")
    (users / "symlink").symlink_to(host.folder / "listed")
    path = {
        "script": f"{users}/script",
        "symlink": f"{users}/symlink",
        "dotdot": f"{users}/../listed",
        "slashes": f"{host.folder}//listed",
        "relative": "listed",
    }[trick]
    file = xml(host, path)
    for command in ("define", "create"):
        said = refused(host, command, file)
        assert f"its <emulator> is {path}, {UNLISTED}" in said
    assert UNLISTED in host.nvdimmctl("plan", str(file)).stderr
    assert host.files() == ["lost+found"], "nothing was provisioned"
    assert host.libvirtd.check("list", "--all", "--name").split() in ([], ["Domain-0"])


@pytest.mark.parametrize("change", ["owner", "mode", "group", "link", "folder", "gone", "plain"])
def test_a_listed_program_that_others_can_change_is_refused(host: Host, change: str) -> None:
    listed, users = host.folder / "listed", host.folder / "users"
    users.mkdir()
    if change == "owner":
        os.chown(listed, USER, USER)
        says = f"is not root's alone: {listed} belongs to uid {USER}"
    elif change in ("mode", "group"):
        listed.chmod(0o757 if change == "mode" else 0o775)
        says = f"is not root's alone: {listed} can be written by others"
    elif change == "link":
        os.chown(users, USER, USER)
        make_program(users / "qemu")
        listed.unlink()
        listed.symlink_to("users/qemu")
        says = f"is not root's alone: {users} belongs to uid {USER}"
    elif change == "folder":
        users.chmod(0o777)
        make_program(users / "qemu")
        listed.unlink()
        listed.symlink_to(users / "../users/qemu")
        says = f"is not root's alone: {users} can be written by others"
    elif change == "gone":
        listed.unlink()
        says = f"cannot run {listed}: No such file"
    else:
        listed.chmod(0o644)
        says = f"cannot run {listed}: it is no program"
    assert says in refused(host, "define", xml(host, listed))
    assert host.files() == ["lost+found"]


def test_a_program_that_was_changed_since_its_define_is_refused_by_a_start(host: Host) -> None:
    host.check("define", xml(host, f"{host.folder}/listed"))
    os.chown(host.folder / "listed", USER, USER)
    assert f"listed belongs to uid {USER}" in refused(host, "start", "db1")
    assert host.state("db1") == ("", None, False)


def test_the_default_is_looked_at_too(host: Host) -> None:
    host.define("db1", 1)
    qemu = host.folder / "qemu"
    os.chown(qemu, USER, USER)
    try:
        assert f"{qemu} belongs to uid {USER}" in refused(host, "start", "db1")
        assert "is not root's alone" in host.nvdimmctl("doctor").stdout
    finally:
        os.chown(qemu, 0, 0)
    host.check("start", "db1")


def test_xml_that_reaches_libvirtd_by_another_way_does_not_start(host: Host) -> None:
    """As edited by hand in libvirt's folder, or defined on libvirtd's own socket."""
    host.define("db1", 1)
    stored = host.libvirtd.check("dumpxml", "--inactive", "db1")
    assert NAMESPACE in stored
    users = host.folder / "users"
    users.mkdir()
    make_program(users / "evil")
    file = host.folder / "by-hand.xml"
    own = f"<emulator>{users}/evil</emulator>"
    at = stored.index("<devices>") + len("<devices>")
    file.write_text(stored[:at] + own + stored[at:])
    host.libvirtd.check("define", file)
    for command in (["start", "db1"], ["start", "--force-boot", "db1"]):
        assert UNLISTED in refused(host, *command)
    assert host.state("db1") == ("", None, False)


def test_a_domain_of_before_the_list_says_why_and_doctor_too(host: Host) -> None:
    file = xml(host, f"{host.folder}/listed")
    host.check("define", file)
    host.check("start", "db1")
    saved = host.folder / "saved"
    host.check("save", "db1", saved)
    with unlisted(host):
        assert UNLISTED in refused(host, "restore", saved)
        assert UNLISTED in refused(host, "start", "db1")
        said = host.nvdimmctl("doctor").stdout
        assert f"db1: its <emulator> is {host.folder}/listed, {UNLISTED}" in " ".join(said.split())
        assert "or have the operator add it to [xen] emulators" in said
    assert host.state("db1") == ("", None, False)
    host.check("restore", saved)
    assert host.state("db1")[0] == "mapped"
    saved.unlink()
