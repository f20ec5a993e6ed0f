# SPDX-License-Identifier: Apache-2.0
"""A managed save is asked about before libvirt removes it, in everything that its start will check."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nvdimm_driver.model import MIB
from nvdimm_driver.xml.parse_domain import OPTIONS
from tests.integration.bench_host import CONF, UUID, Host
from tests.ledger_copies import copy_ledger

QUOTA = 8
"""MiB of the pool that domains may have."""
NVDIMM = """<memory model='nvdimm'>
  <source><path>{}</path></source><target><size unit='MiB'>4</size></target>
</memory>"""


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    host = Host(folder, f"[pool:main]\nkind = bench\npaths = {folder}/pmem\nquota = {QUOTA << 20}\n")
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """Return a host with the domain db1 on a file of twice its size, shut off."""
    shared_host.libvirtd.run("dd", "if=/dev/zero", f"of={shared_host.folder}/pmem/db1.img", "bs=1M", "count=8")
    shared_host.define("db1", 1)
    yield shared_host
    shared_host.clean()
    for name in shared_host.check("list", "--all", "--name").split():
        if name != "Domain-0":
            shared_host.check("undefine", name, "--managed-save")
            shared_host.nvdimmctl("release", "--yes", name)
    shared_host.libvirtd.run("find", shared_host.folder / "pmem", "-name", "*.img", "-delete")


def device(host: Host, name: str) -> Path:
    file = host.folder / "device.xml"
    file.write_text(NVDIMM.format(host.folder / f"pmem/{name}.img"))
    return file


def refused(host: Host, *words: str | Path) -> str:
    done = host.virsh(*words)
    assert done.returncode == 1, done
    return done.stderr


def is_saved(host: Host) -> bool:
    return "Managed save:   yes" in host.check("dominfo", "db1")


def resize(host: Host, mib: int) -> None:
    file = host.xml("db1", 1)
    file.write_text(file.read_text().replace("<size unit='MiB'>4<", f"<size unit='MiB'>{mib}<"))
    host.check("define", file)


def sizes(host: Host) -> dict[str, int]:
    return {Path(item.spec.path).name: item.spec.size >> 20 for item in host.record("db1").allocations}


def test_a_full_pool(host: Host) -> None:
    """Another domain has got what the definition gave up under the running guest, and the guest needs it."""
    host.check("attach-device", "db1", device(host, "more"), "--config")
    host.check("start", "db1")
    host.check("detach-device", "db1", device(host, "more"), "--config")
    host.check("managedsave", "db1")
    host.define("db2", 2)
    said = refused(host, "start", "db1")
    assert "pool main: domains have 8 MiB of its quota of 8 MiB; 4 MiB more is too much" in said
    assert is_saved(host)
    host.check("undefine", "db2")
    host.nvdimmctl("release", "--yes", "db2")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    assert not is_saved(host)


def test_what_the_guest_has_is_not_given_to_its_definition_before_it_is_saved(host: Host) -> None:
    """The quota has no room for both, and the saved guest needs what it had."""
    host.check("attach-device", "db1", device(host, "more"), "--config")
    host.check("start", "db1")
    host.check("detach-device", "db1", device(host, "more"), "--config")
    said = refused(host, "attach-device", "db1", device(host, "other"), "--config")
    assert "pool main: domains have 8 MiB of its quota of 8 MiB; 4 MiB more is too much" in said
    host.check("managedsave", "db1")
    host.check("start", "db1")
    assert sizes(host) == {"db1.img": 4, "more.img": 4}


@pytest.mark.parametrize("fails", ["hook", "mapping", "QEMU"])
def test_a_refused_restore_by_the_path_of_the_save_keeps_what_the_guest_has(host: Host, fails: str) -> None:
    """Its definition has given it up while the guest ran: only its mark says whose it is."""
    host.check("attach-device", "db1", device(host, "more"), "--config")
    host.check("start", "db1")
    host.check("detach-device", "db1", device(host, "more"), "--config")
    host.check("managedsave", "db1")
    if fails == "hook":
        host.script("60-x", 'case "$2" in prepare) exit 1;; esac\n')
    elif fails == "mapping":
        host.fail("xc_domain_memory_mapping", errno.ENOMEM)
    else:
        host.fail_qemu()
    refused(host, "restore", "/var/lib/libvirt/libxl/save/db1.save")
    host.clean()
    stranger = host.xml("db2", 2)
    stranger.write_text(stranger.read_text().replace("db2.img", "more.img"))
    assert "belongs to domain db1" in refused(host, "define", stranger)
    assert sizes(host) == {"db1.img": 4, "more.img": 4}
    if fails != "QEMU":  # nobody knows that a guest whose NVDIMMs were mapped has not run
        host.check("start", "db1")


@pytest.mark.parametrize("repaired", [False, True])
def test_a_saved_guest_keeps_what_an_older_ledger_does_not_know_that_it_has(host: Host, repaired: bool) -> None:
    """Its last run in the ledger, from a backup, had only the first file; the image says more."""
    ledger, backup = host.folder / "state/ledger.sqlite", host.folder / "backup"
    host.check("start", "db1")
    host.check("destroy", "db1")
    host.check("attach-device", "db1", device(host, "more"), "--config")
    backup.unlink(missing_ok=True)
    copy_ledger(ledger, backup)
    host.check("start", "db1")
    host.check("managedsave", "db1")
    copy_ledger(backup, ledger)
    if repaired:
        host.nvdimmctl("check", "--repair")
    host.virsh("detach-device", "db1", device(host, "more"), "--config")
    assert is_saved(host)
    stranger = host.xml("db2", 2)
    stranger.write_text(stranger.read_text().replace("db2.img", "more.img"))
    assert "belongs to domain db1" in refused(host, "define", stranger)


def test_the_start_of_a_running_guest_is_written_as_its_mark_says(host: Host) -> None:
    """The ledger, from a backup, has another slot and another base; the guest is saved after the repair."""
    ledger, backup = host.folder / "state/ledger.sqlite", host.folder / "backup"
    backup.unlink(missing_ok=True)
    copy_ledger(ledger, backup)
    file = host.xml("db1", 1)
    text = file.read_text()
    file.write_text(text.replace("</target>", "</target><address type='dimm' slot='3' base='0x1200000000'/>"))
    host.check("define", file)
    host.check("start", "db1")
    before = rows_of(ledger, "mapping")
    assert before
    copy_ledger(backup, ledger)
    host.nvdimmctl("check", "--repair")
    assert rows_of(ledger, "mapping") == before
    assert rows_of(ledger, "run")
    host.check("managedsave", "db1")
    host.check("start", "db1")


def rows_of(ledger: Path, table: str) -> list[tuple[object, ...]]:
    """Return the rows of a table of the ledger."""
    with closing(sqlite3.connect(ledger)) as database:
        return database.execute(f"SELECT * FROM {table}").fetchall()


def test_an_nvdimm_that_the_definition_has_made_larger(host: Host) -> None:
    """The guest goes on with the size that it had, and boots with the larger one."""
    host.check("start", "db1")
    resize(host, 8)
    host.check("managedsave", "db1")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    assert sizes(host) == {"db1.img": 4}
    host.check("destroy", "db1")
    host.check("start", "db1")
    assert sizes(host) == {"db1.img": 8}


def test_the_definition_may_be_made_again_as_the_saved_guest_is(host: Host) -> None:
    host.check("start", "db1")
    resize(host, 8)
    host.check("managedsave", "db1")
    resize(host, 4)
    host.check("start", "db1")
    host.check("destroy", "db1")
    assert sizes(host) == {"db1.img": 4}


@pytest.mark.parametrize("copy", ["cp --preserve=timestamps", "cp"])
def test_an_older_copy_in_the_place_of_what_the_guest_has_written(host: Host, copy: str) -> None:
    """Each run leaves a modification time of its own, so that a backup of the run before is told from it."""

    def put(source: str, target: str) -> None:
        done = host.libvirtd.run("sh", "-ec", f"cd {host.folder}/pmem; {copy} {source} {target}")
        assert done.returncode == 0, done

    host.check("start", "db1")
    host.check("destroy", "db1")
    put("db1.img", "../monday.img")
    host.check("start", "db1")
    host.check("managedsave", "db1")
    put("../monday.img", "db1.img")
    assert "db1.img was written on the host" in refused(host, "start", "db1")
    assert is_saved(host)
    host.check("managedsave-remove", "db1")
    host.check("start", "db1")


def test_a_program_that_may_write_the_file(host: Host) -> None:
    """It has written nothing yet: neither bytes nor times tell of it."""
    save(host)
    opened = host.folder / "opened"
    script = f"exec 9<>{host.folder}/pmem/db1.img; touch {opened}; while [ -e {opened} ]; do sleep 0.1; done"
    with host.libvirtd.begin("sh", "-c", script) as program:
        while not opened.exists():
            assert program.poll() is None
        said = refused(host, "start", "db1")
        opened.unlink()
    assert "may write it" in said
    goes_on(host)


def test_a_qemu_that_is_not_there(host: Host) -> None:
    save(host)
    (host.folder / "qemu").rename(host.folder / "away")
    said = refused(host, "start", "db1")
    (host.folder / "away").rename(host.folder / "qemu")
    assert f"cannot run {host.folder}/qemu" in said
    goes_on(host)


def test_an_emulator_that_is_not_allowed_any_more(host: Host) -> None:
    other = host.folder / "other-qemu"
    other.write_bytes((host.folder / "qemu").read_bytes())
    other.chmod(0o755)
    host.configure(CONF.replace("qemu = {folder}/qemu", f"qemu = {{folder}}/qemu\nemulators = {other}"))
    file = host.xml("db1", 1)
    file.write_text(file.read_text().replace("<devices>", f"<devices><emulator>{other}</emulator>"))
    host.check("define", file)
    save(host)
    host.configure()
    assert "is not in [xen] emulators" in refused(host, "start", "db1")
    host.configure(CONF.replace("qemu = {folder}/qemu", f"qemu = {{folder}}/qemu\nemulators = {other}"))
    goes_on(host)
    host.configure()


def test_a_state_folder_that_cannot_be_written(host: Host) -> None:
    save(host)
    folder = host.folder / "state/domains" / host.record("db1").uuid
    host.libvirtd.run("chattr", "+i", folder)
    said = refused(host, "start", "db1")
    host.libvirtd.run("chattr", "-i", folder)
    assert f"cannot write {folder}/tables" in said
    goes_on(host)


def test_a_file_system_that_is_read_only(host: Host) -> None:
    """An error on the medium does that."""
    save(host)
    host.libvirtd.run("mount", "-o", "remount,ro", host.folder / "pmem")
    said = refused(host, "start", "db1")
    host.libvirtd.run("mount", "-o", "remount,rw", host.folder / "pmem")
    assert "Read-only file system" in said
    goes_on(host)


def test_the_driver_is_not_removed_while_a_guest_is_saved(host: Host) -> None:
    save(host)
    done = host.nvdimmctl("unregister")
    assert (done.returncode, "domains with NVDIMMs have saved guests: db1" in done.stderr) == (4, True), done
    goes_on(host)


def test_nor_while_libvirtd_is_stopped(host: Host) -> None:
    """As when the packages are removed: libvirt's folder says what is saved."""
    save(host)
    host.libvirtd.stop()
    done = host.nvdimmctl("unregister")
    host.libvirtd.start()
    assert (done.returncode, "domains with NVDIMMs have saved guests: db1" in done.stderr) == (4, True), done
    goes_on(host)


def test_a_create_beside_the_start_of_the_saved_guest(host: Host) -> None:
    """libxl reads the guest's memory between the hook and the device model: a script stands for the time of that."""
    save(host)
    host.script("60-slow", '[ "$2" = start ] && sleep 4\nexit 0\n')
    virsh = ["virsh", "-q", "-c", "xen:///system"]
    with host.libvirtd.begin(*virsh, "start", "db1") as one:
        with host.libvirtd.begin(*virsh, "create", str(host.xml("db1", 1))) as other:
            other.wait()
        one.wait()
    assert [one.returncode, other.returncode].count(0) == 1
    assert host.state("db1")[0] == "mapped"


def test_defines_beside_the_start_of_the_saved_guest(host: Host) -> None:
    """The guest has 512 MiB, and its definition other RAM: each of the two starts has to take over its own."""
    small, go = with_ram(host, 256), host.folder / "go"
    script = f"while [ -e {go} ]; do virsh -q -c xen:///system define {small}; done >/dev/null"
    for _ in range(3):
        save(host)
        go.touch()
        with host.libvirtd.begin("sh", "-c", script):
            try:
                done = [host.virsh("start", "db1") for _ in range(3) if is_saved(host)]
            finally:
                go.unlink()
        assert done[-1].returncode == 0 or is_saved(host), done[-1].stderr
        if is_saved(host):
            host.check("start", "db1")
        host.check("destroy", "db1")
        host.define("db1", 1)


def test_a_create_with_other_ram_than_that_of_the_saved_guest(host: Host) -> None:
    save(host)
    host.check("create", with_ram(host, 256))
    assert host.state("db1")[0] == "mapped"
    assert host.record("db1").ram == 512 * MIB, "libvirt restores the guest as it was"


@pytest.mark.parametrize("blank", ["-", " "])
def test_a_create_without_nvdimms_asks_about_the_saved_guest_too(host: Host, blank: str) -> None:
    """libvirt restores that, with its NVDIMMs. It takes blanks in a uuid."""
    save(host)
    host.libvirtd.run("touch", host.folder / "pmem/db1.img")
    plain = without_nvdimms(host)
    plain.write_text(plain.read_text().replace(UUID.format(1), UUID.format(1).replace("-", blank, 1)))
    assert "db1.img was written on the host" in refused(host, "create", plain)
    assert is_saved(host)


@pytest.mark.parametrize("plain", [False, True])
def test_so_does_a_create_of_a_domain_that_libvirt_does_not_know(host: Host, plain: bool) -> None:
    """It starts the image that has the domain's name, and removes that first."""
    image = "/var/lib/libvirt/libxl/save/db1.save"
    host.check("start", "db1")
    host.check("undefine", "db1")
    host.check("save", "db1", image)
    host.libvirtd.run("touch", host.folder / "pmem/db1.img")
    file = without_nvdimms(host) if plain else host.xml("db1", 1)
    try:
        assert "db1.img was written on the host" in refused(host, "create", file)
        assert host.libvirtd.run("ls", image).stdout
    finally:
        host.libvirtd.run("rm", "-f", image)
        host.define("db1", 1)


@pytest.mark.parametrize(
    "words",
    [
        "virsh start db1",
        "virsh define db1.xml",
        "virsh create db1.xml",
        "virsh define plain.xml",
        "virsh attach-device db1 device.xml --config",
        "virsh undefine db1 --managed-save",
        "nvdimmctl wipe --yes db1",
        "nvdimmctl release --yes db1",
    ],
)
def test_one_at_a_time_changes_the_domain_or_starts_its_saved_guest(host: Host, words: str) -> None:
    save(host)
    device(host, "more")
    without_nvdimms(host)
    lock, held = host.folder / f"state/locks/define-{host.record('db1').uuid}", host.folder / "held"
    script = f"touch {held}; while [ -e {held} ]; do sleep 0.1; done"
    with host.libvirtd.begin("flock", lock, "sh", "-c", script) as other:
        try:
            while not held.exists():
                assert other.poll() is None
            program, *arguments = [str(host.folder / word) if ".xml" in word else word for word in words.split()]
            done = host.virsh(*arguments) if program == "virsh" else host.nvdimmctl(*arguments)
        finally:
            held.unlink(missing_ok=True)
    assert done.returncode != 0
    assert "is being defined, created, started from a saved guest or released by" in done.stderr
    goes_on(host)


def without_nvdimms(host: Host) -> Path:
    file = host.folder / "plain.xml"
    text = host.xml("db1", 1).read_text()
    file.write_text(re.sub(r"<memory model='nvdimm'>.*</memory>", "", text, flags=re.DOTALL))
    return file


def with_ram(host: Host, mib: int) -> Path:
    file = host.folder / "ram.xml"
    file.write_text(host.xml("db1", 1).read_text().replace(">512<", f">{mib}<"))
    return file


def save(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")


def goes_on(host: Host) -> None:
    """Check that the saved guest was kept, and goes on."""
    assert is_saved(host)
    host.check("start", "db1")
    assert host.state("db1") == ("mapped", host.record("db1").start.domid, True)  # type: ignore[union-attr]
    assert not is_saved(host)


def test_the_ram_of_a_running_guest_is_not_lowered(host: Host) -> None:
    """Its saved guest could not go on: it would get the rest of the memory on demand."""
    host.check("start", "db1")
    for words in (("256MiB",), ("256MiB", "--live")):
        assert "populated on demand" in refused(host, "setmem", "db1", *words)
    host.check("setmem", "db1", "512MiB", "--live")
    host.check("managedsave", "db1")
    host.check("start", "db1")


@pytest.mark.parametrize("options", ['dsm="none"', 'dsm="foo"', 'cache="writeback"'])
def test_options_that_are_changed_under_the_guest_cost_no_managed_save(host: Host, options: str) -> None:
    """An earlier version passed such calls. What is no option does not keep the guest from going on."""
    file = host.xml("db1", 1)
    label = "</size><label><size unit='KiB'>128</size></label>"
    file.write_text(file.read_text().replace("</size>", label, 1))
    host.check("define", file)
    host.check("start", "db1")
    words = ("metadata", "db1", OPTIONS, "--key", "n", "--set", f"<options {options}/>", "--live")
    assert "change only with the definition" in refused(host, *words)
    direct = ("virsh", "-q", "-c", "xen+unix:///system?socket=/run/libvirt/libvirt-sock")
    done = host.libvirtd.run(*direct, *words)
    assert done.returncode == 0, done.stderr
    host.check("managedsave", "db1")
    if "none" in options:
        assert "label server" in refused(host, "start", "db1")
        assert is_saved(host)
    else:
        goes_on(host)


def test_a_guest_that_was_saved_without_nvdimms_goes_on_though_its_domain_has_one_since(host: Host) -> None:
    file = host.xml("db2", 2)
    plain = re.sub(
        "<memory model.*?</memory>", f"<emulator>{host.folder}/qemu</emulator>", file.read_text(), flags=re.DOTALL
    )
    file.write_text(plain)
    host.check("define", file)
    host.check("start", "db2")
    (host.libvirtd.xen / f"memory-{host.check('domid', 'db2')}").touch()  # which the device model writes else
    host.check("attach-device", "db2", device(host, "db2"), "--config")
    host.check("managedsave", "db2")
    host.check("start", "db2")


SAVE = "/var/lib/libvirt/libxl/save/db1.save"


WAYS = ["moved aside while libvirtd was restarted", "saved to that path"]


def save_unknown(host: Host, way: str) -> None:
    host.check("start", "db1")
    if way == "saved to that path":
        host.check("save", "db1", SAVE)
    else:
        host.check("managedsave", "db1")
        assert host.libvirtd.run("mv", SAVE, "/var/lib/libvirt/aside").returncode == 0
        host.libvirtd.stop()
        host.libvirtd.start()
        assert host.libvirtd.run("mv", "/var/lib/libvirt/aside", SAVE).returncode == 0


@pytest.mark.parametrize("way", WAYS)
def test_an_image_that_libvirt_does_not_know_of_is_removed_as_the_hint_says(host: Host, way: str) -> None:
    """virsh asks first whether there is one."""
    save_unknown(host, way)
    larger = host.xml("db1", 1)
    larger.write_text(larger.read_text().replace("<size unit='MiB'>4<", "<size unit='MiB'>8<"))
    assert host.virsh("define", larger).returncode == 1
    assert "virsh managedsave-remove" in host.nvdimmctl("unregister").stderr
    host.check("managedsave-remove", "db1")
    assert host.libvirtd.run("ls", SAVE).returncode != 0
    host.check("define", larger)


@pytest.mark.parametrize("way", WAYS)
def test_an_image_that_libvirt_does_not_know_of_is_asked_about(host: Host, way: str) -> None:
    """libvirt restores and removes what is in its folder, and says that there is no managed save."""
    save_unknown(host, way)
    assert is_saved(host), "nvdimmd answers as a start goes"
    host.libvirtd.run("mount", "-o", "remount,ro", host.folder / "pmem")
    said = refused(host, "start", "db1")
    host.libvirtd.run("mount", "-o", "remount,rw", host.folder / "pmem")
    assert "Read-only file system" in said
    unregistered = host.nvdimmctl("unregister")
    assert (unregistered.returncode, "db1" in unregistered.stderr) == (4, True), unregistered
    assert host.libvirtd.run("ls", SAVE).returncode == 0, "the saved guest is lost"
    host.check("start", "db1")
    host.check("destroy", "db1")


def test_another_state_folder_costs_no_saved_guest(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.configure(CONF.replace("{folder}/state", "{folder}/other-state"))
    try:
        refusal = host.nvdimmctl("register")
        assert (refusal.returncode, "go on with its ledger only: db1" in refusal.stderr) == (4, True), refusal
        host.libvirtd.run("cp", "-a", host.folder / "state", host.folder / "other-state")
        assert host.nvdimmctl("register").returncode == 0
    finally:
        host.configure()
        host.libvirtd.run("rm", "-r", host.folder / "other-state")
        host.nvdimmctl("register")
        host.nvdimmctl("check", "--repair")
    host.check("start", "db1")


def test_a_ledger_that_is_lost_keeps_nobody_in_its_state_folder(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.run("mv", host.folder / "state", host.folder / "gone")
    host.libvirtd.run("mkdir", "-m", "700", host.folder / "state")
    host.configure(CONF.replace("{folder}/state", "{folder}/other-state"))
    try:
        done = host.nvdimmctl("register")
        assert done.returncode == 0, done.stderr
    finally:
        host.configure()
        host.libvirtd.run("rm", "-r", host.folder / "other-state", host.folder / "state")
        host.libvirtd.run("mv", host.folder / "gone", host.folder / "state")
        host.nvdimmctl("register")
        host.nvdimmctl("check", "--repair")
    host.check("start", "db1")
