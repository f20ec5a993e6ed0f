# SPDX-License-Identifier: Apache-2.0
"""What a domain keeps when a call of virsh's fails, with plain virsh through nvdimmd to the real libxl driver."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nvdimm_driver.lock_files import LockFile
from nvdimm_driver.state.ledger import Ledger
from tests.integration.bench_host import UUID, Host
from tests.integration.test_virsh import image, refused, renamed

MISSING = "<interface type='network'><source network='missing'/></interface></devices>"
"""libvirt looks for the network of a start after the driver's hook has prepared it."""


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return a host with the domain db1, defined and shut off."""
    host = Host(tmp_path_factory.mktemp("host"))  # a socket's path has to be short
    try:
        host.define("db1", 1)
        yield host
    finally:
        host.libvirtd.close()


def with_file(host: Host, name: str, *, starts: bool = True) -> Path:
    """Return the XML of db1 with another file; libvirt cannot start it unless it starts."""
    written = host.xml("db1", 1)
    text = written.read_text().replace(str(image(host, "db1")), str(image(host, name)))
    other = host.folder / f"db1-with-{name}.xml"
    other.write_text(text if starts else text.replace("</devices>", MISSING))
    return other


def stranger(host: Host) -> Path:
    """Return the XML of another domain with db1's file."""
    written = host.xml("db2", 2)
    written.write_text(written.read_text().replace(str(image(host, "db2")), str(image(host, "db1"))))
    return written


def is_immutable(host: Host, name: str) -> bool:
    return "i" in host.libvirtd.run("lsattr", image(host, name)).stdout.split()[0]


def test_a_create_that_libvirt_refuses_takes_nothing(host: Host) -> None:
    """Neither from a domain that is off, nor from one that runs; the client gets libvirt's error."""
    for runs in (False, True):
        if runs:
            host.check("start", "db1")
        before = host.record("db1")
        told = refused(host, "create", with_file(host, "new", starts=False))
        assert ("is already active" if runs else "for network:///system") in told
        assert host.record("db1") == before
        assert "new.img" not in host.files()
        assert "belongs to domain db1" in refused(host, "define", stranger(host))
        assert host.nvdimmctl("check").returncode == 0


def test_a_define_without_nvdimms_that_is_refused_leaves_the_definition_of_before(host: Host) -> None:
    """The pool's file system is read-only just now; later, the undefined domain is being wiped."""
    before, allocations = host.check("dumpxml", "db1"), host.record("db1").allocations
    plain = host.xml("db1", 1)
    plain.write_text(re.sub(r"<memory model.*?</memory>\s*", "", plain.read_text(), flags=re.DOTALL))
    host.libvirtd.run("mount", "-o", "remount,ro", host.folder / "pmem")
    try:
        assert "Read-only file system" in refused(host, "define", plain)
    finally:
        host.libvirtd.run("mount", "-o", "remount,rw", host.folder / "pmem")
    assert host.check("dumpxml", "db1") == before
    host.check("undefine", "db1")
    with LockFile(host.folder / "state/locks" / f"define-{UUID.format(1)}"):
        assert "released by" in refused(host, "define", plain)
    assert "db1" not in host.check("list", "--all", "--name")
    assert host.record("db1").allocations == allocations
    host.check("define", plain)
    assert "no domain" in host.nvdimmctl("show", "db1").stderr


def test_a_create_beside_a_definition_leaves_what_that_has(host: Host) -> None:
    (before,) = host.record("db1").allocations
    host.check("create", with_file(host, "new"))
    assert host.state("db1") == ("mapped", host.state("db1")[1], False)
    assert is_immutable(host, "new")
    host.check("destroy", "db1")
    assert "belongs to domain db1" in refused(host, "define", stranger(host))
    host.check("start", "db1")
    items = {item.spec.path: item for item in host.record("db1").allocations}
    assert items[before.spec.path] == before
    assert len(items) == 2


def test_a_file_does_not_stay_frozen_for_a_start_that_never_came(host: Host) -> None:
    host.check("define", with_file(host, "db1", starts=False))
    refused(host, "start", "db1")
    assert is_immutable(host, "db1"), "libvirt does not say that the start is over"
    host.check("define", with_file(host, "new"))
    host.check("start", "db1")
    assert not is_immutable(host, "db1")
    assert is_immutable(host, "new")


def test_the_restore_of_an_older_guest_leaves_what_the_definition_has(host: Host) -> None:
    host.check("start", "db1")
    host.check("save", "db1", host.folder / "saved")
    host.check("define", with_file(host, "new"))
    (before,) = host.record("db1").allocations
    host.check("restore", host.folder / "saved")
    assert host.state("db1")[0] == "mapped"
    assert {item.spec.path for item in host.record("db1").allocations} == {
        str(image(host, "db1")),
        str(image(host, "new")),
    }
    host.check("destroy", "db1")
    host.check("start", "db1")
    items = {item.spec.path: item for item in host.record("db1").allocations}
    assert items[before.spec.path] == before


def without_file(host: Host) -> Path:
    """Return the XML of db1 without its NVDIMM."""
    written = host.xml("db1", 1)
    text = written.read_text()
    other = host.folder / "db1-without.xml"
    other.write_text(text[: text.index("    <memory model=")] + text[text.index("  </devices>") :])
    return other


def start_again(host: Host) -> str:
    """Start db1 as a client does that does not ask before if it runs; return libvirt's error."""
    code = "import libvirt; libvirt.open('xen:///system').lookupByName('db1').create()"
    done = host.libvirtd.run(host.folder / "python/bin/python", "-c", code)
    assert done.returncode
    return done.stderr


@pytest.mark.parametrize("why", ["it runs", "a network is missing"])
def test_a_start_that_fails_takes_nothing_from_a_domain_that_is_defined_without(host: Host, why: str) -> None:
    plain = without_file(host)
    if why != "it runs":
        plain.write_text(plain.read_text().replace("</devices>", MISSING))
    host.check("define", plain)
    host.check("create", with_file(host, "db1"))
    before = host.record("db1").allocations
    if why == "it runs":
        assert "already running" in start_again(host)
        assert host.record("db1").allocations == before
    host.check("destroy", "db1")
    if why != "it runs":
        refused(host, "start", "db1")
    assert host.record("db1").allocations == before
    assert "belongs to domain db1" in refused(host, "define", stranger(host))


def test_a_second_start_takes_nothing_from_a_guest_that_was_saved(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.check("define", without_file(host))
    host.check("start", "db1")
    assert "already running" in start_again(host)
    host.check("managedsave", "db1")
    assert "belongs to domain db1" in refused(host, "define", stranger(host))
    host.check("start", "db1")


@pytest.mark.parametrize("how", ["redefined", "detached", "redefined again"])
def test_what_a_saved_guest_has_is_no_other_domains_though_its_definition_gave_it_up_before(
    host: Host, how: str, tmp_path: Path
) -> None:
    """It was given up while the guest ran, and the guest saved then: another domain could take it at once."""
    host.check("start", "db1")
    if how == "redefined again":
        host.check("managedsave", "db1")
        host.check("define", without_file(host))
        host.check("start", "db1")
    if how == "detached":
        text = host.xml("db1", 1).read_text()
        device = tmp_path / "device.xml"
        device.write_text(text[text.index("<memory model=") : text.index("  </devices>")])
        host.check("detach-device", "db1", device, "--config")
    else:
        host.check("define", without_file(host))
    host.check("managedsave", "db1")
    assert "domain db1" in refused(host, "define", stranger(host))
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    host.check("destroy", "db1")


def test_a_restore_that_fails_takes_nothing_from_a_domain_whose_start_fails_meanwhile(host: Host) -> None:
    """It gave up what each domain had that failed since, if that was new; and told its reason."""
    host.check("start", "db1")
    host.check("save", "db1", host.folder / "saved")
    comes, goes = host.libvirtd.folder / "run/comes", host.libvirtd.folder / "run/goes"
    os.mkfifo(comes)
    os.mkfifo(goes)
    host.script("60-slow", '[ "$1 $2" != "db1 start" ] || { echo >/run/comes; read line </run/goes; exit 1; }\n')
    restoring = host.libvirtd.begin("virsh", "-q", "-c", "xen:///system", "restore", str(host.folder / "saved"))
    comes.read_text()
    host.check("define", host.xml("db2", 2))
    host.libvirtd.run("ln", image(host, "db2"), host.folder / "pmem/second-name")
    assert "hard links" in refused(host, "start", "db2")
    host.libvirtd.run("rm", host.folder / "pmem/second-name")
    host.check("undefine", "db2")
    before = host.record("db2").allocations
    goes.write_text("\n")
    said = restoring.communicate()[1]
    assert restoring.returncode == 1
    assert "hard links" not in said
    assert host.record("db2").allocations == before


def test_a_restore_that_another_hook_refuses_puts_back_what_the_domain_had(host: Host) -> None:
    host.check("start", "db1")
    host.check("save", "db1", host.folder / "saved")
    host.check("define", with_file(host, "other"))
    before = host.record("db1")
    host.script("60-no", '[ "$2" != start ] || exit 1\n')
    refused(host, "restore", host.folder / "saved")
    assert host.record("db1") == before
    host.check("define", stranger(host))


START = """\
import sys
from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, Packer
with Connection("/run/libvirt/virtxend-sock", timeout=600) as connection:
    connection.call(Procedure.DOMAIN_CREATE, bytes(Packer().domain(DomainRef(sys.argv[2], sys.argv[1], -1))))
"""


def test_a_clients_name_of_a_saved_domain_leads_nvdimmd_to_no_file(host: Host) -> None:
    """libvirt goes by the uuid. With a FIFO there, eight such calls took all threads."""
    host.check("start", "db1")
    host.check("managedsave", "db1")
    os.mkfifo(host.libvirtd.folder / "run/evil.save")
    name = "../../../../../../../run/evil"
    done = host.libvirtd.run(host.folder / "python/bin/python", "-c", START, UUID.format(1), name)
    assert done.returncode == 0, done.stderr
    assert host.state("db1")[0] == "mapped"


def test_an_error_of_libvirts_has_no_reason_of_an_earlier_start(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    assert "xc_domain_memory_mapping" in refused(host, "start", "db1")
    host.clean_up()
    other = with_file(host, "db1")
    other.write_text(
        other.read_text().replace(
            "</devices>", "<disk type='file' device='disk'><target dev='xvda' bus='nonsense'/></disk></devices>"
        )
    )
    said = refused(host, "create", other)
    assert "nonsense" in said
    assert "xc_domain_memory_mapping" not in said


def test_wipe_and_release_say_that_there_is_a_saved_guest(host: Host) -> None:
    host.check("start", "db1")
    host.check("destroy", "db1")
    for command in (("wipe", "db1"), ("release", "db1")):
        assert "saved guest" not in host.nvdimmctl(*command).stderr, "it asks, and gets no answer"
    host.check("start", "db1")
    host.check("managedsave", "db1")
    for command in (("wipe", "db1"), ("release", "db1"), ("wipe", str(image(host, "db1")))):
        done = host.nvdimmctl(*command)
        assert "db1 has a saved guest (virsh managedsave), which cannot go on" in done.stderr
        assert command[0] == "release" or "(of domain db1) with zeros?" in done.stdout + done.stderr
    host.libvirtd.stop()
    assert "libvirt cannot be asked whether db1 has a saved guest" in host.nvdimmctl("release", "db1").stderr
    assert len(host.record("db1").allocations) == 1


def test_a_create_that_libvirt_refuses_leaves_an_import_that_no_guest_has_had(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The domain kept it until it is wiped, because it had run with another file before."""
    folder = tmp_path_factory.mktemp("host")  # as above
    host = Host(folder, f"[pool:main]\nkind = bench\npaths = {folder}/pmem\nwipe_on_release = true\n")
    try:
        host.define("db1", 1)
        host.check("start", "db1")
        host.check("destroy", "db1")
        before = host.record("db1")
        source = folder / "source"
        source.write_bytes(b"imported" * (4 << 17))
        done = host.nvdimmctl("import", str(source), "--name", "other.img", "--label-size", "0")
        assert done.returncode == 0, done.stderr
        imported = host.sum("other")
        assert "Failed to create domain" in refused(host, "create", with_file(host, "other", starts=False))
        assert host.record("db1") == before
        assert host.sum("other") == imported
    finally:
        host.libvirtd.close()


def test_what_is_kept_until_it_is_wiped_does_not_count_beside_ram(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The definition has another NVDIMM at the same address, and then none."""
    folder = tmp_path_factory.mktemp("host")  # as above
    host = Host(folder, f"[pool:main]\nkind = bench\npaths = {folder}/pmem\nwipe_on_release = true\n")
    try:
        file = host.xml("db1", 1)
        text = file.read_text().replace("</memory>\n  </devices>", "<address/></memory></devices>")
        for name, slot in (("db1", 0), ("new", 1)):
            address = f"<address type='dimm' slot='{slot}' base='0x1400000000'/>"
            file.write_text(text.replace("<address/>", address).replace("db1.img", f"{name}.img"))
            host.check("define", file)
        assert len(host.record("db1").allocations) == 2
        host.check("setmaxmem", "db1", "1G", "--config")
        assert "overlaps the guest's RAM" in refused(host, "setmaxmem", "db1", "200G", "--config")
        assert "populated on demand" in refused(host, "setmem", "db1", "512M", "--config")
        host.check("setmem", "db1", "1G", "--config")
        start, end = text.index("<memory model"), text.index("</devices>")
        file.write_text(text[:start] + text[end:])
        host.check("define", file)
        assert len(host.record("db1").allocations) == 2
        host.check("setmaxmem", "db1", "200G", "--config")
        host.check("setmem", "db1", "256M", "--config")
    finally:
        host.libvirtd.close()


def test_a_saved_guest_of_another_domain_with_a_former_name_keeps_no_claim(host: Host) -> None:
    host.check("undefine", "db1")
    other = stranger(host)
    text = other.read_text().replace("<name>db2<", "<name>db1<")
    other.write_text(text.replace(str(image(host, "db1")), str(image(host, "other"))))
    host.check("define", other)
    host.check("start", "db1")
    host.check("managedsave", "db1")
    plain = host.xml("old", 1)
    plain.write_text(re.sub(r"<memory model.*?</memory>\s*", "", plain.read_text(), flags=re.DOTALL))
    host.check("define", plain)
    third = host.xml("db3", 3)
    third.write_text(third.read_text().replace(str(image(host, "db3")), str(image(host, "db1"))))
    host.check("define", third)
    assert "Managed save:   yes" in host.check("dominfo", "db1")
    assert "/other.img" in host.nvdimmctl("list").stdout


@pytest.mark.parametrize("verb", ["define", "create"])
def test_another_domain_of_an_undefined_ones_name_gives_up_none_of_its_nvdimms(host: Host, verb: str) -> None:
    before = host.record("db1").allocations
    host.check("undefine", "db1")
    new = with_file(host, "other")
    new.write_text(re.sub(" *<uuid>.*\n", "", new.read_text()))
    host.check(verb, new)
    with closing(Ledger(str(host.folder / "state/ledger.sqlite"))) as ledger:
        record = ledger.find_domain(UUID.format(1))
    assert record
    assert record.allocations == before
    assert "belongs to domain db1" in refused(host, "define", renamed(host))
