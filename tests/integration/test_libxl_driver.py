# SPDX-License-Identifier: Apache-2.0
"""The driver under the real libvirtd and its libxl driver: the order of hooks, and the ledger after them and after the
device model. bench_host.py lists the stand-ins for the rest.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import rewrite
from tests.integration.bench_host import UUID, Host

PREPARE = ["hook prepare begin db1"]
HELP = ["device-model -help"] * 2
CLEANED_UP = ["hook stopped end db1", "hook release end db1"]
OFF = ("", None, False)


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        host.define("db1", 1)
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """Return a host with the domain db1, defined and shut off."""
    yield shared_host
    shared_host.clean()


@pytest.fixture
def running(host: Host) -> Host:
    """Return the host with db1 running."""
    host.libvirtd.check("start", "db1")
    host.libvirtd.events()
    return host


def domid(host: Host) -> int:
    """Return the domid of the running db1."""
    return int(host.libvirtd.check("domid", "db1"))


def started(number: int, how: str = "create") -> list[str]:
    """Return the events of a successful start."""
    return [
        *PREPARE,
        *HELP,
        "hook start begin db1",
        f"{how} db1 {number}",
        f"device-model {number} runs",
        f"unpause {number}",
        f"hook started begin db1 id={number}",
    ]


def ended(number: int) -> list[str]:
    """Return the events when libvirt cleans up after a domain that ran."""
    return [f"destroy {number}", f"hook stopped end db1 id={number}", "hook release end db1"]


def failed(number: int, status: int) -> list[str]:
    """Return the events of a start whose device model fails."""
    return [
        *PREPARE,
        *HELP,
        "hook start begin db1",
        f"create db1 {number}",
        f"device-model {number} exits {status}",
        f"destroy {number}",
        *CLEANED_UP,
    ]


# --- definition ---


def test_libxl_takes_the_rewritten_xml_alone_and_keeps_all_of_it(host: Host) -> None:
    written = host.xml("db2", 2)
    refused = host.libvirtd.virsh("define", written)
    assert "memory devices are not supported by this driver" in refused.stderr

    rewritten = host.folder / "db2.rewritten.xml"
    rewritten.write_text(host.nvdimmctl("rewrite", str(written)).stdout)
    host.libvirtd.check("define", rewritten)
    stored = host.folder / "db2.stored.xml"
    stored.write_text(host.libvirtd.check("dumpxml", "--inactive", "db2") + "\n")
    host.libvirtd.check("undefine", "db2")

    restored = host.nvdimmctl("restore", str(stored)).stdout
    original = written.read_text()
    nvdimm = original[original.index("    <memory model") : original.index("  </devices>")]
    assert nvdimm not in stored.read_text()
    assert nvdimm.replace("<size unit='MiB'>4<", "<size unit='KiB'>4096<") in restored  # as libvirt shows it
    assert extract(restored) == extract(original)
    assert rewrite(restored, f"{host.folder}/nvdimm-device-model") == stored.read_text()


def test_a_domain_can_be_undefined_while_it_runs(host: Host) -> None:
    host.define("db3", 3)
    host.libvirtd.check("start", "db3")
    host.libvirtd.check("undefine", "db3")
    assert host.state("db3")[0] == "mapped"
    host.libvirtd.events()
    host.libvirtd.check("destroy", "db3")
    assert [event.split()[1] for event in host.libvirtd.events()[1:]] == ["stopped", "release"]
    assert host.state("db3") == OFF


# --- start and end ---


def test_start(host: Host) -> None:
    number = host.libvirtd.next_domid()
    host.libvirtd.check("start", "db1")
    assert host.libvirtd.events() == started(number)
    assert host.state("db1") == ("mapped", number, True)
    log = host.libvirtd.device_model_log("db1")
    assert f"xc_domain_memory_mapping({number}, 0x1100" in log
    assert f"xs_write(0, /local/domain/{number}/hvmloader/acpi/address, 0xfd001000" in log


def test_destroy(running: Host) -> None:
    number = domid(running)
    running.libvirtd.check("destroy", "db1")
    assert running.libvirtd.events() == ended(number)
    assert running.state("db1") == OFF


def test_shutdown(running: Host) -> None:
    number = domid(running)
    running.libvirtd.check("shutdown", "db1")
    happened = running.libvirtd.wait_for("hook release end db1")
    assert happened == [f"ask {number} to poweroff", f"guest poweroff {number}", *ended(number)]
    assert running.state("db1") == OFF


def test_a_guest_that_suspends_and_then_powers_off(running: Host) -> None:
    """Only the power-off is an end: libvirt leaves a suspended guest to whoever suspended it."""
    number = domid(running)
    running.libvirtd.inject("db1", "suspend")
    running.libvirtd.inject("db1", "poweroff")
    happened = running.libvirtd.wait_for("hook release end db1")
    assert happened == [f"guest suspend {number}", f"guest poweroff {number}", *ended(number)]
    assert running.state("db1") == OFF


def test_a_domain_that_somebody_else_destroys(running: Host) -> None:
    number = domid(running)
    running.libvirtd.inject("db1", "death")
    happened = running.libvirtd.wait_for("hook release end db1")
    assert happened == [f"guest death {number}", *ended(number)[1:]]
    assert running.state("db1") == OFF


@pytest.mark.parametrize("what", ["reboot", "crash"])
def test_a_guest_that_is_to_start_again(running: Host, what: str) -> None:
    old = domid(running)
    running.libvirtd.inject("db1", what)
    happened = running.libvirtd.wait_for(f"hook started begin db1 id={old + 1}")
    assert happened == [f"guest {what} {old}", *ended(old), *started(old + 1)]
    assert running.state("db1") == ("mapped", old + 1, True)


def test_a_soft_reset_ends_the_guest(running: Host) -> None:
    """The guest's kernel starts another one (kexec): its device model runs again, with no hook before it."""
    number = domid(running)
    running.libvirtd.inject("db1", "soft-reset")
    happened = running.libvirtd.wait_for("hook release end db1")
    assert happened[:3] == [f"guest soft-reset {number}", f"soft-reset {number}", f"device-model {number} exits 1"]
    assert happened[3:] == ended(number)
    assert running.state("db1") == OFF
    assert "a soft reset (kexec)" in running.record("db1").fault


def test_a_definition_without_nvdimms_gets_none_from_the_device_model(host: Host) -> None:
    """Who defines it past nvdimmd can name any emulator; the hook is only for domains with NVDIMMs."""
    xml = host.libvirtd.check("dumpxml", "db1", "--inactive")
    begin, end = xml.index("<metadata>"), xml.index("</metadata>") + len("</metadata>")
    other = host.folder / "without.xml"
    other.write_text(xml[:begin] + xml[end:])
    host.libvirtd.check("define", str(other))
    assert host.libvirtd.virsh("start", "db1").returncode == 1
    assert "its hook has not prepared that" in host.record("db1").fault
    assert host.state("db1") == ("", None, False)
    host.define("db1", 1)
    host.libvirtd.check("start", "db1")


def test_pause_and_balloon_have_no_hooks(running: Host) -> None:
    number = domid(running)
    for words in (("suspend", "db1"), ("resume", "db1"), ("setmem", "db1", "400M", "--live")):
        running.libvirtd.check(*words)
    assert running.libvirtd.events() == [f"pause {number}", f"unpause {number}", f"memory {number} {400 << 10}"]
    assert running.state("db1") == ("mapped", number, True)


@pytest.mark.parametrize("managed", [False, True])
def test_save_and_restore(running: Host, managed: bool) -> None:
    old = domid(running)
    file = running.folder / "saved"
    running.libvirtd.check(*(["managedsave", "db1"] if managed else ["save", "db1", str(file)]))
    assert running.libvirtd.events() == [f"save {old}", *ended(old)]
    assert running.state("db1") == OFF

    before = len(running.libvirtd.device_model_log("db1"))
    running.libvirtd.check(*(["start", "db1"] if managed else ["restore", str(file)]))
    assert running.libvirtd.events() == started(old + 1, "restore")
    assert running.state("db1") == ("mapped", old + 1, True)
    log = running.libvirtd.device_model_log("db1")[before:]
    assert f"xc_domain_memory_mapping({old + 1}, " in log
    assert "hvmloader" not in log  # its tables are in the restored memory


# --- starts that fail ---


def test_a_prepare_that_fails(host: Host) -> None:
    host.fail("xc_get_machine_memory_map", errno.EPERM)
    done = host.libvirtd.virsh("start", "db1")
    assert done.returncode == 1
    assert "Hook script execution failed" in done.stderr
    assert "nvdimm-driver: xc_get_machine_memory_map: EPERM" in done.stderr
    assert host.libvirtd.events() == PREPARE
    assert host.state("db1") == OFF
    assert "xc_get_machine_memory_map: EPERM" in host.record("db1").fault


def test_a_device_model_that_fails(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    number, before = host.libvirtd.next_domid(), len(host.libvirtd.log())
    done = host.libvirtd.virsh("start", "db1")
    assert done.stderr.endswith("internal error: libxenlight failed to create new domain 'db1'\n")
    assert host.libvirtd.events() == failed(number, 1)
    assert host.state("db1") == OFF
    reason = f"xc_domain_memory_mapping: EPERM (Operation not permitted): domain {number}"
    assert host.record("db1").fault.startswith(reason)
    assert f"nvdimm-driver: domain db1 did not start: {reason}" in host.libvirtd.log()[before:]

    host.clean()
    host.libvirtd.check("start", "db1")
    assert host.record("db1").fault == ""


def test_a_qemu_that_fails_behind_a_device_model_that_did_not(host: Host) -> None:
    host.fail_qemu()
    number = host.libvirtd.next_domid()
    assert host.libvirtd.virsh("start", "db1").returncode == 1
    assert host.libvirtd.events() == failed(number, 1)
    assert host.state("db1") == OFF
    assert host.record("db1").fault == ""


def test_a_guest_whose_reboot_fails_stays_off(running: Host) -> None:
    old = domid(running)
    running.fail("xc_domain_memory_mapping", errno.EPERM)
    running.libvirtd.inject("db1", "reboot")
    first = running.libvirtd.wait_for("hook release end db1")
    second = running.libvirtd.wait_for("hook release end db1")
    assert first + second == [f"guest reboot {old}", *ended(old), *failed(old + 1, 1)]
    assert running.libvirtd.check("domstate", "db1") == "shut off"
    assert running.state("db1") == OFF
    assert "EPERM" in running.record("db1").fault


def test_a_network_that_is_not_there(host: Host) -> None:
    """When a step right after the prepare hook fails, libvirt does not run the release hook either."""
    host.libvirtd.check("attach-interface", "db1", "network", "nowhere", "--config")
    try:
        assert host.libvirtd.virsh("start", "db1").returncode == 1
    finally:
        host.libvirtd.check("detach-interface", "db1", "network", "--config")
    assert host.libvirtd.events() == PREPARE
    assert host.state("db1") == ("prepared", None, True)

    host.libvirtd.check("start", "db1")
    assert host.state("db1") == ("mapped", domid(host), True)


@pytest.mark.parametrize("script", ["10-other", "90-other"])
def test_another_hook_that_refuses_what_ours_has_prepared(host: Host, script: str) -> None:
    """All scripts run, even after one that failed, and no release follows: the start stays prepared."""
    host.script(script, "[ $2 != prepare ] || { echo not today >&2; exit 3; }\n")
    assert "not today" in host.libvirtd.virsh("start", "db1").stderr
    assert host.libvirtd.events() == PREPARE
    assert host.state("db1") == ("prepared", None, True)

    host.clean()
    host.libvirtd.check("start", "db1")
    assert host.state("db1") == ("mapped", domid(host), True)


def test_another_start_hook_that_fails(host: Host) -> None:
    host.script("60-other", "[ $2 != start ] || { echo not today >&2; exit 3; }\n")
    assert "not today" in host.libvirtd.virsh("start", "db1").stderr
    assert host.libvirtd.events() == [*PREPARE, *HELP, "hook start begin db1", *CLEANED_UP]
    assert host.state("db1") == OFF


def test_another_started_hook_that_fails(host: Host) -> None:
    host.script("60-other", "[ $2 != started ] || { echo not today >&2; exit 3; }\n")
    number = host.libvirtd.next_domid()
    assert "not today" in host.libvirtd.virsh("start", "db1").stderr
    assert host.libvirtd.events() == [*started(number), f"destroy {number}", *CLEANED_UP]
    assert host.state("db1") == OFF


def test_a_start_that_fails_later_has_no_reason_of_an_earlier_one(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    host.libvirtd.virsh("start", "db1")
    host.clean()
    host.script("60-other", "[ $2 != start ] || exit 3\n")
    before = len(host.libvirtd.log())
    assert host.libvirtd.virsh("start", "db1").returncode == 1
    assert "did not start" not in host.libvirtd.log()[before:]
    assert host.record("db1").fault == ""


# --- libvirtd and the host ---


def test_libvirtd_is_restarted_under_a_guest(running: Host) -> None:
    number = domid(running)
    running.libvirtd.restart()
    assert running.libvirtd.events() == [f"hook reconnect begin db1 id={number}"]
    assert running.libvirtd.check("domstate", "db1") == "running"
    assert running.state("db1") == ("mapped", number, True)
    running.libvirtd.check("destroy", "db1")
    assert running.libvirtd.events() == ended(number)
    assert running.state("db1") == OFF


def test_the_file_system_is_in_use_until_the_guest_has_ended(running: Host) -> None:
    """By a process that outlives libvirtd."""
    pmem, holders, uuid = str(running.folder / "pmem"), Holders(running.folder / "state"), UUID.format(1)
    before = holders.find(uuid)
    assert len(before) == 1
    running.libvirtd.restart()
    assert holders.find(uuid) == before
    assert "busy" in running.libvirtd.run("umount", pmem).stderr
    running.libvirtd.check("destroy", "db1")
    assert holders.find(uuid) == []


def test_a_guest_that_ends_while_libvirtd_is_away(running: Host) -> None:
    number = domid(running)
    running.libvirtd.stop()
    running.libvirtd.forget_domains()
    running.libvirtd.start()
    assert running.libvirtd.events() == ended(number)[1:]
    assert running.state("db1") == OFF


def test_a_reconnect_that_fails_takes_nothing_from_the_guest(running: Host) -> None:
    """After it, libvirt considers the guest shut off and runs the hooks of its end, but the guest keeps running."""
    number = domid(running)
    running.script("60-other", "[ $2 != reconnect ] || exit 3\n")
    running.libvirtd.restart()
    assert running.libvirtd.events() == [f"hook reconnect begin db1 id={number}", *ended(number)[1:]]
    assert running.libvirtd.check("domstate", "db1") == "shut off"
    assert running.state("db1") == ("mapped", number, True)
    running.forget_guests()


def test_a_start_that_is_refused_takes_nothing_from_a_guest_that_libvirt_forgot(running: Host) -> None:
    number = domid(running)
    running.libvirtd.stop()
    (running.libvirtd.folder / "run/libvirt/libxl/db1.xml").unlink()
    running.libvirtd.start()
    assert running.libvirtd.events() == []
    try:
        assert f"as domid {number}, which Xen still has" in running.libvirtd.virsh("start", "db1").stderr
        assert running.state("db1") == ("mapped", number, True)
    finally:
        running.forget_guests()


def test_autostart_after_a_power_failure(running: Host) -> None:
    """Autostart runs once in each boot of the host; the starts of the boot before are put away first."""
    running.libvirtd.check("autostart", "db1")
    number, before = domid(running), len(running.log())
    try:
        running.reboot()
        assert running.libvirtd.events() == started(1)
        assert running.state("db1") == ("mapped", 1, True)
        assert f"event=put-away domain=db1 uuid={UUID.format(1)} domid={number}" in running.log()[before:]

        running.libvirtd.check("destroy", "db1")
        running.libvirtd.restart()
        assert running.libvirtd.events() == ended(1)
        assert running.state("db1") == OFF
    finally:
        running.libvirtd.check("autostart", "db1", "--disable")
