# SPDX-License-Identifier: Apache-2.0
"""Plain virsh, through nvdimmd, to the real libvirtd and its libxl driver, as a user sees it."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.xml.rewrite import NAMESPACE
from tests.integration.bench_host import CONF, Host

NVDIMM = "<memory model='nvdimm'><source><path>{}</path></source><target><size unit='MiB'>4</size></target></memory>"
OFF = ("", None, False)


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """Return a host with the domain db1, defined and shut off."""
    shared_host.define("db1", 1)
    yield shared_host
    shared_host.clean()
    for name in shared_host.check("list", "--all", "--name").split():
        if name != "Domain-0":
            shared_host.check("undefine", name, "--managed-save")
    for row in shared_host.nvdimmctl("list", "-f", "value", "-c", "Domain").stdout.split():
        shared_host.nvdimmctl("release", "--yes", row)
    shared_host.libvirtd.run("find", shared_host.folder / "pmem", "-name", "*.img", "-delete")


def refused(host: Host, *words: str | Path) -> str:
    done = host.virsh(*words)
    assert done.returncode == 1, done
    return done.stderr


def image(host: Host, name: str) -> Path:
    return host.folder / f"pmem/{name}.img"


def nvdimms(host: Host) -> list[str]:
    return [Path(item.spec.path).name for item in host.record("db1").allocations]


def slots(host: Host) -> dict[str, int]:
    return {Path(item.spec.path).name: item.spec.slot for item in host.record("db1").allocations}


def device(host: Host, name: str) -> Path:
    file = host.folder / "device.xml"
    file.write_text(NVDIMM.format(image(host, name)))
    return file


# --- define and show ---


def test_the_user_sees_what_the_user_wrote(host: Host) -> None:
    written = host.xml("db1", 1).read_text()
    nvdimm = written[written.index("    <memory model") : written.index("    </memory>\n  </devices>")]
    nvdimm += "      <address type='dimm' slot='0'/>\n    </memory>\n"
    nvdimm = nvdimm.replace("<size unit='MiB'>4<", "<size unit='KiB'>4096<")  # as libvirt shows it
    for flags in ([], ["--inactive"], ["--security-info"], ["--migratable"]):
        shown = host.check("dumpxml", "db1", *flags)
        assert nvdimm in shown
        assert NAMESPACE not in shown
        assert "nvdimm-device-model" not in shown
    assert NAMESPACE in host.libvirtd.check("dumpxml", "db1")
    assert host.sum("db1") == hashlib.sha256(bytes(4 << 20)).hexdigest()


def test_a_mount_point_that_is_not_utf8_disturbs_nothing(host: Host) -> None:
    """As from: mount -t tmpfs none $'/run/gr\\366sse'."""
    mountinfo = host.libvirtd.folder / "run/mountinfo"
    before = mountinfo.read_bytes()
    stray = b"2 0 0:99 / /run/gr\xf6sse rw - tmpfs none rw\n3 0 0:98 / /run/a\xc2\x85b rw - tmpfs none rw\n"
    mountinfo.write_bytes(stray + before)
    try:
        host.define("db2", 2)
        host.check("start", "db2")
        host.check("destroy", "db2")
        for line in host.nvdimmctl("doctor").stdout.splitlines():
            assert "codec" not in line
        assert host.nvdimmctl("check").returncode == 0
    finally:
        mountinfo.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 256, "its name has 256 bytes, and may have 255"),
        ("missing/db2.img", "there is no folder {pmem}/missing (mount the file system that it is on"),
        ("lost+found", "{pmem}/lost+found: is a folder"),
        ("link", "{pmem}/link: is a symbolic link to {pmem}/gone, and nothing is there"),
        ("loop", "{pmem}/loop: leads through more than 40 symbolic links, or one that leads back to itself"),
        ("to-db1", "belongs to domain db1"),
        ("./db1.img", "belongs to domain db1"),
    ],
    ids=lambda text: text[:16],
)
def test_a_define_says_what_is_wrong_with_a_name(host: Host, name: str, says: str) -> None:
    pmem = host.folder / "pmem"
    host.libvirtd.run("ln", "-sfn", f"{pmem}/gone", f"{pmem}/link")
    host.libvirtd.run("ln", "-sfn", f"{pmem}/db1.img", f"{pmem}/to-db1")
    host.libvirtd.run("ln", "-sfn", "loop", f"{pmem}/loop")
    before = host.files()
    file = host.xml("db2", 2)
    file.write_text(file.read_text().replace(f"{pmem}/db2.img", f"{pmem}/{name}"))
    assert says.format(pmem=pmem) in refused(host, "define", file)
    assert host.files() == before
    assert "db2" not in host.check("list", "--all", "--name")
    host.libvirtd.run("rm", f"{pmem}/link", f"{pmem}/loop", f"{pmem}/to-db1")


def test_a_define_with_one_file_twice_is_refused(host: Host) -> None:
    more = device(host, "db1")
    more.write_text(more.read_text().replace(f"{host.folder}/pmem", f"/{host.folder}/pmem"))
    assert "the NVDIMMs in slots 0 and 1 have the same" in refused(host, "attach-device", "db1", more, "--config")
    assert nvdimms(host) == ["db1.img"]


def test_who_only_reads_sees_it_too(host: Host) -> None:
    done = host.libvirtd.run("virsh", "-q", "-r", "-c", "xen:///system", "dumpxml", "db1")
    assert "<memory model='nvdimm'" in done.stdout
    done = host.libvirtd.run("virsh", "-q", "-r", "-c", "xen:///system", "define", host.xml("db2", 2))
    assert "read only" in done.stderr
    assert "db2.img" not in host.files()


def test_edit_and_config_devices_change_the_definition(host: Host) -> None:
    editor = host.folder / "editor"
    editor.write_text(f"""#!/bin/sh\nsed -i "s|</devices>|{NVDIMM.format(image(host, "more"))}</devices>|" "$1"\n""")
    editor.chmod(0o755)
    done = host.libvirtd.run("env", f"EDITOR={editor}", "virsh", "-q", "-c", "xen:///system", "edit", "db1")
    assert done.returncode == 0, done.stderr
    assert nvdimms(host) == ["db1.img", "more.img"]
    assert slots(host) == {"db1.img": 0, "more.img": 1}
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    assert slots(host) == {"more.img": 1}
    assert "<address type='dimm' slot='1'/>" in host.check("dumpxml", "db1")
    host.check("attach-device", "db1", device(host, "db1"), "--config")
    assert slots(host) == {"db1.img": 0, "more.img": 1}
    host.check("start", "db1")
    assert "running domain db1" in refused(host, "detach-device", "db1", device(host, "db1"), "--live")


def test_a_slot_that_is_taken_is_refused(host: Host) -> None:
    file = device(host, "more")
    file.write_text(file.read_text().replace("</memory>", "<address type='dimm' slot='0'/></memory>"))
    assert "both in slot 0" in refused(host, "attach-device", "db1", file, "--config")
    without = re.sub(r"<address type='dimm'[^>]*>", "", host.check("dumpxml", "db1"))
    both = host.folder / "both.xml"
    both.write_text(without.replace("</devices>", f"{file.read_text()}</devices>"))
    said = refused(host, "define", both)
    assert f"{image(host, 'more')}: slot 0 is taken by {image(host, 'db1')}" in said
    assert slots(host) == {"db1.img": 0}


def edit(host: Host, *sed: str) -> subprocess.CompletedProcess[str]:
    """Run 'virsh edit' with sed(1) as the editor."""
    editor = host.folder / "editor"
    scripts = " ".join(f"-e '{each}'" for each in sed)
    editor.write_text(f"""#!/bin/sh\nsed -i {scripts} "$1"\n""")
    editor.chmod(0o755)
    return host.libvirtd.run("env", f"EDITOR={editor}", "virsh", "-q", "-c", "xen:///system", "edit", "db1")


def test_a_device_is_found_as_on_kvm(host: Host) -> None:
    other = device(host, "db1")
    other.write_text(other.read_text().replace("'MiB'>4<", "'MiB'>6<"))
    said = refused(host, "detach-device", "db1", other, "--config")
    assert "device not found: the NVDIMM" in said
    assert "another size: 4096 KiB, and not 6144 KiB" in said
    assert nvdimms(host) == ["db1.img"]


@pytest.mark.parametrize("command", ["attach-device", "detach-device", "update-device"])
def test_a_live_change_of_a_domain_that_is_off_is_refused_as_on_kvm(host: Host, command: str) -> None:
    file = device(host, "more" if command == "attach-device" else "db1")
    for flags in (["--live"], ["--live", "--config"]):
        said = refused(host, command, "db1", file, *flags)
        assert "Requested operation is not valid: domain is not running" in said
    assert nvdimms(host) == ["db1.img"]


def test_a_persistent_change_of_a_domain_that_is_off_is_one_of_its_definition(host: Host) -> None:
    assert "domain is not running" in refused(host, "attach-device", "db1", device(host, "more"))
    host.check("attach-device", "db1", device(host, "more"), "--persistent")
    host.check("update-device", "db1", device(host, "more"), "--persistent")
    assert nvdimms(host) == ["db1.img", "more.img"]
    host.check("detach-device", "db1", device(host, "more"), "--persistent")
    host.check("detach-device", "db1", device(host, "db1"), "--current")
    assert host.nvdimmctl("list", "-f", "value").stdout == ""


def test_a_transient_domain_has_no_definition_to_change(host: Host) -> None:
    host.check("create", host.xml("db2", 2))
    assert "transient" in refused(host, "attach-device", "db2", device(host, "more"), "--config")
    assert host.check("list", "--all", "--transient", "--name") == "db2"
    host.check("destroy", "db2")


def limited(host: Host, *, with_nvdimm: bool = True) -> Path:
    """Return a file with the XML of db1 and a <maxMemory>."""
    file = host.xml("db1", 1)
    text = file.read_text().replace(
        "  <memory unit", "  <maxMemory slots='4' unit='GiB'>4</maxMemory>\n  <memory unit", 1
    )
    file.write_text(text if with_nvdimm else re.sub(" *<memory model.*</memory>\n", "", text, flags=re.DOTALL))
    return file


def test_the_last_nvdimm_goes_by_detaching_editing_or_redefining(host: Host) -> None:
    host.check("define", limited(host))
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    assert host.nvdimmctl("list", "-f", "value").stdout == ""
    host.check("define", limited(host))
    assert "<maxMemory slots='4' unit='KiB'>4194304</maxMemory>" in host.check("dumpxml", "db1")
    done = edit(host, "/<memory model/,/<.memory>/d")
    assert done.returncode == 0, done.stderr
    assert host.nvdimmctl("list", "-f", "value").stdout == ""
    host.check("define", limited(host))
    host.check("define", limited(host, with_nvdimm=False))
    shown = host.check("dumpxml", "db1")
    assert "nvdimm" not in shown
    assert "maxMemory" not in shown
    assert "db1.img" in host.files()


@pytest.mark.parametrize("way", ["detach", "edit", "define"])
@pytest.mark.parametrize("lost", [False, True], ids=["released", "a lost ledger"])
def test_the_last_nvdimm_goes_though_the_ledger_does_not_know_the_domain(host: Host, way: str, lost: bool) -> None:
    host.check("define", limited(host))
    if lost:
        assert host.libvirtd.run("sh", "-c", f"rm -r {host.folder}/state/* {host.folder}/state-in-use").returncode == 0
    else:
        assert host.nvdimmctl("release", "--yes", "db1").returncode == 0
    if way == "detach":
        host.check("detach-device", "db1", device(host, "db1"), "--config")
    elif way == "edit":
        assert edit(host, "/<memory model/,/<.memory>/d").returncode == 0
    else:
        host.check("define", limited(host, with_nvdimm=False))
    shown = host.check("dumpxml", "db1")
    assert "nvdimm" not in shown
    assert "maxMemory" not in shown
    host.nvdimmctl("check", "--repair")


@pytest.mark.parametrize("call", ["attach-device", "detach-device", "update-device"])
def test_another_memory_device_is_named(host: Host, call: str) -> None:
    file = host.folder / "device.xml"
    file.write_text("<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>")
    assert "<memory model='dimm'> in <devices>: on Xen, NVDIMMs are the only" in refused(host, call, "db1", file)


def test_show_has_the_base_of_the_guest_and_that_of_its_next_start(host: Host) -> None:
    bases = (0x200000000, 0x300000000)
    host.check("undefine", "db1")
    for number, base in enumerate(bases):
        file = host.xml("db1", 1)
        address = f"</target><address type='dimm' slot='0' base='{base:#x}'/>"
        file.write_text(file.read_text().replace("</target>", address))
        host.check("define", file)
        if not number:
            host.check("start", "db1")
    try:
        shown = host.nvdimmctl("show", "db1", "-f", "json").stdout
        (nvdimm,) = json.loads(shown[shown.index("{") :])["nvdimms"]
        assert (nvdimm["guest_base"], nvdimm["base"]) == bases
    finally:
        host.check("destroy", "db1")


def test_plan_has_the_xml_that_libvirt_gets(host: Host) -> None:
    file = host.xml("db2", 2)
    planned = host.nvdimmctl("plan", str(file)).stdout.partition("Backings:")[0]
    host.check("define", file)
    added = "\n".join(line[1:] for line in planned.splitlines() if line.startswith("+"))
    record = re.compile("<nvdimm:domain.*?</nvdimm:domain>", re.DOTALL)
    (mine,), (stored,) = record.findall(added), record.findall(host.libvirtd.check("dumpxml", "db2"))
    assert mine.split() == stored.split()
    host.check("undefine", "db2")


def test_define_and_edit_validate_as_on_kvm(host: Host) -> None:
    wrong = host.xml("db2", 2)
    wrong.write_text(wrong.read_text().replace("</target>", "<lable><size>128</size></lable></target>"))
    assert "XML document failed to validate against schema" in refused(host, "define", wrong, "--validate")
    assert "XML document failed to validate against schema" in refused(host, "create", wrong, "--validate")
    assert "<target> has <lable>" in refused(host, "define", wrong)
    host.check("define", host.xml("db2", 2), "--validate")
    host.check("undefine", "db2")
    done = edit(host, 's/<memory model=.nvdimm./& acces="private"/')
    assert done.stderr == "error: Failed.\n"  # what virsh says where it cannot ask
    assert "acces=" not in host.check("dumpxml", "db1")
    assert edit(host, "s/db1.img/more.img/").returncode == 0
    assert nvdimms(host) == ["more.img"]


def test_virt_xml_makes_an_nvdimm_larger(host: Host) -> None:
    def enlarge(mib: int) -> subprocess.CompletedProcess[str]:
        size = f"target.size={mib}"
        return host.libvirtd.run(
            "virt-xml", "--connect", "xen:///system", "db1", "--edit", "--memdev", size, "--define"
        )

    labelled = device(host, "db1")
    label = "</size><label><size unit='KiB'>128</size></label>"
    labelled.write_text(labelled.read_text().replace("</size>", label))
    host.check("update-device", "db1", labelled, "--config")
    write = "yes | dd of={} bs=128K count=1 seek=31 iflag=fullblock conv=notrunc"
    host.libvirtd.run("sh", "-c", write.format(image(host, "db1")))
    done = enlarge(8)
    assert done.returncode == 0, done.stderr
    assert host.record("db1").allocations[0].spec.size == 8 << 20
    content = host.libvirtd.run("tail", "-c", str(128 << 10), image(host, "db1")).stdout
    assert content == "y\n" * (64 << 10)
    host.check("start", "db1")
    assert "domain db1 runs, and its" in enlarge(16).stderr
    assert host.record("db1").allocations[0].spec.size == 8 << 20
    host.check("destroy", "db1")
    host.check("managedsave-remove", "db1")
    assert "file system has" in enlarge(1 << 30).stderr
    assert host.state("db1")[0] == ""


def test_nvdimmctl_makes_an_nvdimm_larger(host: Host) -> None:
    file = host.xml("db1", 1)
    graphics = "</devices>", "<graphics type='vnc' autoport='yes' passwd='secret'/></devices>"
    file.write_text(file.read_text().replace(*graphics))
    host.check("define", file)
    before = host.check("dumpxml", "db1", "--inactive", "--security-info")
    for size, mib in (("4MiB", 4), ("7M", 8), ("16MiB", 16)):
        done = host.nvdimmctl("resize", "db1", size)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"db1 has {mib} MiB in slot 0, {image(host, 'db1')}\n"
        assert host.libvirtd.run("stat", "-c", "%s", image(host, "db1")).stdout == f"{mib << 20}\n"
    after = host.check("dumpxml", "db1", "--inactive", "--security-info")
    assert "passwd='secret'" in after
    assert after == before.replace(f"<size unit='KiB'>{4 << 10}<", f"<size unit='KiB'>{16 << 10}<")
    host.check("start", "db1")
    done = host.nvdimmctl("resize", "db1", "32MiB")
    assert (done.returncode, "runs, and its NVDIMM would get 32 MiB (shut" in done.stderr) == (5, True), done.stderr
    host.check("destroy", "db1")
    assert "the guest would lose its end" in host.nvdimmctl("resize", "db1", "4MiB").stderr
    assert "has no NVDIMM in slot 1" in host.nvdimmctl("resize", "db1", "32MiB", "--slot", "1").stderr
    host.check("undefine", "db1")
    assert "has no definition with" in host.nvdimmctl("resize", "db1", "32MiB").stderr


def test_an_nvdimm_goes_through_a_pipe(host: Host) -> None:
    host.configure(CONF + "[pool:main]\npaths = {folder}/pmem\n")
    host.libvirtd.run("sh", "-c", f"yes | dd of={image(host, 'db1')} bs=4096 count=300 iflag=fullblock conv=notrunc")
    python = host.folder / "python/bin/python"
    nvdimmctl = f"{python} -I -c 'import sys; from nvdimm_driver.cmd.nvdimmctl import main; sys.exit(main())'"
    pipe = f"set -o pipefail; {nvdimmctl} send db1 | {nvdimmctl} receive --name moved.img"
    done = host.libvirtd.run("bash", "-c", pipe)
    assert (done.returncode, done.stderr) == (0, "xs_open(0)\n"), done  # what xen_stand_in.c prints
    assert "<address type='dimm' slot='0'/>" in done.stdout.replace('"', "'")
    sums = host.libvirtd.run("sha256sum", image(host, "db1"), image(host, "moved")).stdout.split()
    assert sums[0] == sums[2]
    done = host.libvirtd.run("bash", "-c", pipe)
    assert done.returncode == 5
    assert "moved.img: exists already" in done.stderr
    listed = host.libvirtd.run("bash", "-c", f"{nvdimmctl} receive --name moved.img --sums").stdout.split()
    assert len(listed) == 4
    done = host.libvirtd.run("bash", "-c", f"{nvdimmctl} receive --name other.img </dev/null")
    assert (done.returncode, "nothing came" in done.stderr) == (5, True)
    done = host.libvirtd.run("bash", "-c", f"{nvdimmctl} send db1 | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 5
    assert done.stderr.endswith("nvdimmctl: the stream cannot be written: Broken pipe (what does 'receive' say?)\n")
    host.configure()


def test_an_nvdimm_gets_smaller_only_on_purpose(host: Host) -> None:
    host.libvirtd.run("sh", "-c", f"yes | dd of={image(host, 'db1')} bs=4096 count=1024 iflag=fullblock conv=notrunc")
    before = host.sum("db1")
    smaller = device(host, "db1")
    smaller.write_text(smaller.read_text().replace("'MiB'>4<", "'MiB'>2<"))
    said = refused(host, "update-device", "db1", smaller, "--config")
    assert "has 4 MiB and would have 2 MiB: the guest would lose its end (keep size, label and alignsize; to" in said
    labelled = device(host, "db1")
    label = "</size><label><size unit='KiB'>128</size></label>"
    labelled.write_text(labelled.read_text().replace("</size>", label))
    assert "the end of the guest's data, 128 KiB at 0x3e0000, is in use" in refused(
        host, "update-device", "db1", labelled, "--config"
    )
    assert host.record("db1").allocations[0].spec.size == 4 << 20

    host.nvdimmctl("export", "db1", str(host.folder / "saved.img"))
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    smaller = device(host, "db1")
    smaller.write_text(smaller.read_text().replace("'MiB'>4<", "'MiB'>2<"))
    host.check("attach-device", "db1", smaller, "--config")
    assert host.record("db1").allocations[0].spec.size == 2 << 20
    assert host.sum("db1") == before == hashlib.sha256((host.folder / "saved.img").read_bytes()).hexdigest()
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"


@pytest.mark.parametrize("kind", ["kvm", "qemu"])
def test_a_type_that_was_left_in_is_named(host: Host, kind: str) -> None:
    file = host.xml("db2", 2)
    file.write_text(file.read_text().replace("type='xen'", f"type='{kind}'"))
    for command in ("define", "create"):
        assert f"(the domain is of type '{kind}'; for Xen, write <domain type='xen'>)" in refused(host, command, file)
    assert f"it is of type '{kind}': write <domain type='xen'>" in host.nvdimmctl("plan", str(file)).stderr


def test_another_memory_device_is_named_by_define_and_plan(host: Host) -> None:
    file = host.xml("db2", 2)
    dimm = "<memory model='dimm'><target><size>524288</size><node>0</node></target></memory>"
    file.write_text(file.read_text().replace("</devices>", f"{dimm}</devices>"))
    assert "<memory model='dimm'> in <devices>: on Xen, NVDIMMs are the only memory devices" in refused(
        host, "define", file
    )
    assert "<memory model='dimm'> in <devices>" in host.nvdimmctl("plan", str(file)).stderr


def test_a_definition_without_nvdimms_gives_them_up(host: Host) -> None:
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    assert host.nvdimmctl("list", "-f", "value").stdout == ""
    assert "nvdimm" not in host.check("dumpxml", "db1")
    assert "db1.img" in host.files()


def test_what_cannot_be_is_refused_before_libvirt_hears_of_it(host: Host) -> None:
    wrong = host.xml("db2", 2)
    wrong.write_text(wrong.read_text().replace("model='nvdimm'", "model='nvdimm' access='private'"))
    assert "access='private' is not supported on Xen" in refused(host, "define", wrong)
    thief = host.xml("db2", 2)
    thief.write_text(thief.read_text().replace("db2.img", "db1.img"))
    assert "db1.img belongs to domain db1" in refused(host, "define", thief)
    forged = host.xml("db2", 2)
    forged.write_text(host.nvdimmctl("rewrite", str(forged)).stdout)
    assert "nvdimm_driver's own metadata" in refused(host, "define", forged)
    forged.write_text(forged.read_text().replace(NAMESPACE, NAMESPACE.replace(":", "&#58;")))
    assert "nvdimm_driver's own metadata" in refused(host, "define", forged)
    assert host.check("list", "--all", "--name").split() == ["Domain-0", "db1"]
    assert "db2.img" not in host.files()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<domain ", "<x:domain xmlns:x='urn:x' "),
        ("<domain ", "<!DOCTYPE domain [<!ENTITY n 'urn:nvdimm'>]><domain "),
    ],
    ids=["prefix", "entity"],
)
def test_metadata_that_only_libvirt_would_find_are_refused(host: Host, old: str, new: str) -> None:
    file = host.xml("db2", 2)
    text = host.nvdimmctl("rewrite", str(file)).stdout.replace(old, new, 1)
    if "ENTITY" in new:
        file.write_text(text.replace(NAMESPACE, "&n;" + NAMESPACE[10:]))
    else:
        file.write_text(text.replace("</domain>", "</x:domain>"))
    refused(host, "define", file)
    assert "db2" not in host.check("list", "--all", "--name")
    host.libvirtd.check("define", file)  # without nvdimmd, libvirt takes it
    assert "nvdimm-device-model" in host.libvirtd.check("dumpxml", "db2")


def test_xml_in_latin_1_is_taken_as_libvirt_takes_it(host: Host) -> None:
    file = host.xml("db2", 2)
    text = file.read_text().replace("<memory ", "<title>Größe</title><memory ", 1)
    file.write_bytes(b"<?xml version='1.0' encoding='ISO-8859-1'?>\n" + text.encode("latin-1"))
    host.check("define", file)
    assert host.check("desc", "--title", "db2") == "Größe"
    assert "db2.img" in host.check("dumpxml", "db2")


def test_a_size_that_does_not_fit_leaves_nothing(host: Host) -> None:
    large = host.xml("db2", 2)
    large.write_text(large.read_text().replace("<size unit='MiB'>4<", "<size unit='GiB'>4<"))
    assert "make room, or ask for less" in refused(host, "define", large)
    assert host.check("list", "--all", "--name").split() == ["Domain-0", "db1"]
    assert "db2.img" not in host.files()


def test_metadata_of_ours_is_out_of_reach(host: Host) -> None:
    uri = ("--uri", NAMESPACE)
    assert "own" in refused(host, "metadata", "db1", *uri, "--key", "x", "--set", "<domain/>", "--config")
    ours = f"<nvdimm:domain xmlns:nvdimm='{NAMESPACE.replace(':', '&#58;')}'/>"
    other = ("metadata", "db1", "--uri", "urn:other", "--key", "x", "--config")
    assert "own" in refused(host, *other, "--set", ours)
    assert "own" in refused(host, "metadata", "db1", *uri, "--remove", "--config")
    assert host.virsh("metadata", "db1", *uri).stdout.strip() == "", "an error in libvirt 9.0, an empty line in 11.3"
    host.check(*other, "--set", "<domain/>")
    assert host.check("metadata", "db1", "--uri", "urn:other", "--config") == "<domain/>"
    assert nvdimms(host) == ["db1.img"]


# --- life ---


def test_start_and_destroy(host: Host) -> None:
    host.check("start", "db1")
    state, domid, frozen = host.state("db1")
    assert (state, frozen) == ("mapped", True)
    assert int(host.check("domid", "db1")) == domid
    host.check("destroy", "db1")
    assert host.state("db1") == OFF


def test_a_start_that_fails_in_the_device_model_says_why(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    said = refused(host, "start", "db1")
    assert "libxenlight failed to create new domain 'db1': xc_domain_memory_mapping: EPERM" in said
    assert host.state("db1") == OFF


def test_a_qemu_that_is_not_there_is_named(host: Host) -> None:
    qemu = host.folder / "qemu"
    qemu.rename(host.folder / "away")
    try:
        assert f"cannot run {qemu}: No such file" in refused(host, "create", host.xml("db2", 2))
    finally:
        (host.folder / "away").rename(qemu)


def test_a_start_that_fails_for_another_reason_is_not_blamed_on_us(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    refused(host, "start", "db1")
    host.clean_up()
    host.script("10-other", "[ $2 != start ] || exit 3\n")
    assert "EPERM" not in refused(host, "start", "db1")


def test_save_restore_and_managed_save(host: Host) -> None:
    host.check("start", "db1")
    saved = host.folder / "saved"
    host.check("save", "db1", saved)
    assert host.state("db1") == OFF
    host.check("restore", saved)
    assert host.state("db1")[0] == "mapped"
    host.check("managedsave", "db1")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"


def test_a_saved_guest_goes_on_only_with_what_it_had(host: Host) -> None:
    host.check("start", "db1")
    saved = host.folder / "saved"
    host.check("save", "db1", saved)
    host.check("start", "db1")
    host.check("destroy", "db1")
    said = refused(host, "restore", saved)
    assert "libxenlight failed to restore domain 'db1': the saved guest cannot go on: since it was saved" in said
    assert host.state("db1") == OFF
    host.check("start", "db1")
    host.check("save", "db1", saved)
    host.check("restore", saved)


def test_a_restore_that_is_refused_leaves_the_slots_to_the_definition(host: Host) -> None:
    """The image has the NVDIMM in slot 1 that was detached, and the definition has another one there by now."""
    host.check("attach-device", "db1", device(host, "old"), "--config")
    host.check("start", "db1")
    host.check("save", "db1", host.folder / "saved")
    host.check("start", "db1")
    host.check("destroy", "db1")
    host.check("detach-device", "db1", device(host, "old"), "--config")
    host.check("attach-device", "db1", device(host, "new"), "--config")
    before = {item.spec.slot: item.spec.path for item in host.record("db1").allocations}
    assert "cannot go on" in refused(host, "restore", host.folder / "saved")
    after = {item.spec.slot: item.spec.path for item in host.record("db1").allocations}
    assert before.items() <= after.items(), after
    assert host.state("db1") == OFF


def test_a_managed_save_is_not_lost_when_it_cannot_go_on(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.run("touch", image(host, "db1"))
    said = refused(host, "start", "db1")
    assert "the saved guest cannot go on" in said
    assert f"{image(host, 'db1')} was written on the host at" in said
    assert "managed save" in refused(host, "attach-device", "db1", device(host, "more"), "--config")
    assert "Managed save:   yes" in host.check("dominfo", "db1")
    host.check("managedsave-remove", "db1")
    host.check("start", "db1")


def test_a_managed_save_is_not_lost_when_its_backing_cannot_be_frozen(host: Host) -> None:
    """libvirt removes it before the hook is asked; each cause is soon mended, and the guest's memory would be gone."""
    host.check("start", "db1")
    host.check("managedsave", "db1")
    looked = host.folder / "looked"
    script = f"exec 9<>{image(host, 'db1')}; echo open; until [ -e {looked} ]; do sleep 0.1; done"
    with host.libvirtd.begin("sh", "-c", script) as program:
        assert program.stdout
        assert program.stdout.readline()
        assert "may write it" in refused(host, "start", "db1")
        looked.touch()
    host.libvirtd.run("mount", "-o", "remount,ro", host.folder / "pmem")
    try:
        assert "Read-only file system" in refused(host, "start", "db1")
    finally:
        host.libvirtd.run("mount", "-o", "remount,rw", host.folder / "pmem")
    assert "Managed save:   yes" in host.check("dominfo", "db1")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"


def test_a_definition_that_changes_under_the_guest_does_not_cost_its_managed_save(host: Host) -> None:
    host.check("start", "db1")
    host.check("attach-device", "db1", device(host, "more"), "--config")
    host.check("managedsave", "db1")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    assert slots(host) == {"db1.img": 0, "more.img": 1}
    host.check("destroy", "db1")
    host.check("start", "db1")
    assert "more.img" in host.check("dumpxml", "db1")


def test_claims_that_were_kept_for_a_saved_guest_go_with_it(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    host.check("managedsave-remove", "db1")
    assert slots(host) == {"db1.img": 0}
    refused(host, "start", "db1")  # the bench has no device model for a domain without NVDIMMs
    assert slots(host) == {"db1.img": 0}, "nothing says that its guest runs without"


def test_a_boot_that_is_forced_asks_nothing_of_the_managed_save(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.run("touch", image(host, "db1"))
    assert "the saved guest cannot go on" in refused(host, "start", "db1")
    host.check("start", "db1", "--force-boot")
    assert host.state("db1")[0] == "mapped"


def test_a_saved_guest_keeps_what_its_definition_loses(host: Host) -> None:
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.check("detach-device", "db1", device(host, "db1"), "--config")
    assert "nvdimm" not in host.check("dumpxml", "db1")
    assert slots(host) == {"db1.img": 0}
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"


def test_a_transient_domain(host: Host) -> None:
    file = host.xml("db2", 2)
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "<uuid>" not in line))
    host.check("create", file)
    assert host.state("db2")[0] == "mapped"
    assert "<memory model='nvdimm'" in host.check("dumpxml", "db2")
    uuid = host.check("domuuid", "db2")
    host.check("destroy", "db2")
    host.check("create", file)
    assert host.check("domuuid", "db2") == uuid


def test_a_transient_domain_that_does_not_start_leaves_nothing(host: Host) -> None:
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    assert "EPERM" in refused(host, "create", host.xml("db2", 2))
    assert "db2.img" not in host.files()
    assert "db2" not in host.nvdimmctl("list", "-f", "value").stdout


def test_undefine_keeps_the_bytes_for_the_next_definition(host: Host) -> None:
    host.libvirtd.run("sh", "-c", f"yes | dd of={image(host, 'db1')} bs=4096 count=1024 iflag=fullblock conv=notrunc")
    before = host.sum("db1")
    host.check("undefine", "db1")
    assert "db1.img belongs to domain db1" in refused(host, "define", renamed(host))
    without_uuid = host.xml("db1", 1)
    without_uuid.write_text(re.sub(" *<uuid>.*\n", "", without_uuid.read_text()))
    uuid = host.record("db1").uuid
    host.check("define", without_uuid)
    assert host.check("domuuid", "db1") == uuid
    assert "already exists with uuid" in refused(host, "define", without_uuid)
    assert host.sum("db1") == before != hashlib.sha256(bytes(4 << 20)).hexdigest()
    assert f"INFO event=undefined domain=db1 uuid={uuid} domid=- kept=" in host.nvdimmd_log()


def renamed(host: Host) -> Path:
    file = host.xml("db2", 2)
    file.write_text(file.read_text().replace("db2.img", "db1.img"))
    return file


def test_memory_stays_clear_of_the_nvdimms(host: Host) -> None:
    assert "NVDIMMs, 4 MiB in all, do not fit" in refused(host, "setmaxmem", "db1", "5000000G", "--config")
    assert "populated on demand" in refused(host, "setmem", "db1", "256M", "--config")
    host.check("setmaxmem", "db1", "1G", "--config")
    host.check("setmem", "db1", "1G", "--config")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    host.check("setmaxmem", "db1", "1G", "--config")
    assert "would not start again after a reboot" in refused(host, "setmaxmem", "db1", "1536M", "--config")
    domid = host.libvirtd.next_domid()
    host.libvirtd.inject("db1", "reboot")
    host.libvirtd.wait_for(f"hook started begin db1 id={domid}")
    assert host.state("db1")[0] == "mapped"


def test_no_guest_with_numa_cells_starts_with_other_ram_than_theirs(host: Host) -> None:
    file = host.xml("db1", 1)
    cell = "<cpu><numa><cell id='0' cpus='0' memory='512' unit='MiB'/></numa></cpu><features>"
    file.write_text(file.read_text().replace("<features>", cell))
    host.check("define", file)
    assert "change the cells" in refused(host, "setmaxmem", "db1", "1G", "--config")
    host.libvirtd.check("setmaxmem", "db1", "1G", "--config")
    assert "<memory> is 1048576 KiB, and the NUMA cells have 524288 KiB" in refused(host, "start", "db1")
    assert "and the NUMA cells have" in host.record("db1").fault
    host.check("setmaxmem", "db1", "512M", "--config")
    host.check("start", "db1")
    host.check("managedsave", "db1")
    image = "/var/lib/libvirt/libxl/save/db1.save"
    saved_by_an_earlier_version = "s|<memory unit=.KiB.>524288<|<memory unit='KiB'>999424<|"
    host.libvirtd.run("sed", "--in-place", "--binary", saved_by_an_earlier_version, image)
    assert "and the NUMA cells have" in refused(host, "start", "db1")
    assert host.libvirtd.run("test", "-e", image).returncode == 0, "libvirt removes it before it calls the hook"
    host.check("managedsave-remove", "db1")


def test_current_memory_above_memory_does_not_come_back_when_the_ram_is_raised(host: Host) -> None:
    """As after a 'virsh edit' that lowers <memory> alone; libvirt takes <memory> for it."""
    file = host.xml("db1", 1)
    current = "</memory><currentMemory unit='MiB'>768</currentMemory>\n  <vcpu"
    file.write_text(file.read_text().replace("</memory>\n  <vcpu", current, 1))
    host.check("define", file)
    host.check("start", "db1")
    assert "would not start again after a reboot" in refused(host, "setmaxmem", "db1", "768M", "--config")
    host.check("destroy", "db1")
    host.check("setmaxmem", "db1", "1G", "--config")
    host.check("setmem", "db1", "1G", "--config")
    assert "<currentMemory unit='KiB'>1048576</currentMemory>" in host.check("dumpxml", "--inactive", "db1")
    host.check("start", "db1")


def test_a_start_that_is_refused_for_its_xml_is_a_failed_start(host: Host) -> None:
    """An autostart or a reboot has nobody who sees the error."""
    host.check("setmaxmem", "db1", "1G", "--config")
    assert "<currentMemory> is" in host.libvirtd.virsh("start", "db1").stderr
    assert "<currentMemory> is" in host.record("db1").fault
    events = host.nvdimmctl("monitor", "--no-follow", "--event", "start-failed").stdout
    assert json.loads(events.splitlines()[-1])["domain"] == "db1"
    assert "event=hook-failed" not in host.log()


def test_ram_that_reaches_an_nvdimm_moves_it_at_the_next_start(host: Host) -> None:
    before = bases(host)
    host.check("setmaxmem", "db1", "100G", "--config")
    host.check("setmem", "db1", "100G", "--config")
    assert bases(host) == before
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    assert bases(host)[0] > 164 << 30 > before[0]
    assert "domain db1 runs: RAM of 200 GiB reaches" in refused(host, "setmaxmem", "db1", "200G", "--live")


def test_the_base_that_is_shown_is_the_one_that_counts(host: Host) -> None:
    file = host.folder / "based.xml"
    plain = host.check("dumpxml", "db1", "--inactive")
    for base in ("0x1400000000", "0x1800000000"):
        file.write_text(
            plain.replace("<address type='dimm' slot='0'/>", f"<address type='dimm' slot='0' base='{base}'/>")
        )
        host.check("define", file)
        assert f"base='{base}'" in host.check("dumpxml", "db1")
        assert [hex(found) for found in bases(host)] == [base]
    host.check("start", "db1")
    assert "overlaps the guest's RAM of 200 GiB" in refused(host, "setmaxmem", "db1", "200G", "--config")


def bases(host: Host) -> list[int]:
    return [item.base or 0 for item in host.record("db1").allocations]


def test_migration_is_refused(host: Host) -> None:
    host.check("start", "db1")
    assert "domain db1 has NVDIMMs, and cannot be migrated" in refused(
        host, "migrate", "db1", "xen:///system", "--live"
    )


def test_xl_gets_the_device_model(host: Host) -> None:
    native = host.check("domxml-to-native", "xen-xl", "--domain", "db1")
    assert f'device_model_override = "{host.folder}/nvdimm-device-model"' in native


# --- nvdimmd comes and goes ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nvdimmd_ends_and_comes_back_under_a_guest(host: Host, number: int) -> None:
    host.check("start", "db1")
    before = host.state("db1")
    host.libvirtd.end("nvdimmd", number)
    if number == signal.SIGTERM:  # a crash leaves the socket, which systemd would keep open
        assert NAMESPACE in host.check("dumpxml", "db1")
    host.start_nvdimmd()
    assert host.state("db1") == before
    assert "<memory model='nvdimm'" in host.check("dumpxml", "db1")


def test_libvirt_python_works_with_it_and_hears_events(host: Host) -> None:
    code = (
        "import libvirt, sys\n"
        "libvirt.virEventRegisterDefaultImpl()\n"
        "c = libvirt.open('xen:///system')\n"
        "seen = []\n"
        "c.domainEventRegister(lambda c, d, event, detail, o: seen.append((d.name(), event)), None)\n"
        "d = c.lookupByName('db1')\n"
        "d.create()\n"
        "while ('db1', libvirt.VIR_DOMAIN_EVENT_STARTED) not in seen: libvirt.virEventRunDefaultImpl()\n"
        "print(d.XMLDesc())\n"
    )
    done = host.libvirtd.run(host.folder / "python/bin/python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert "<memory model='nvdimm'" in done.stdout


def test_virt_install_makes_a_guest_with_an_nvdimm(host: Host) -> None:
    command = ["virt-install", "--connect", "xen:///system", "--name", "db9", "--hvm", "--import", "--memory", "256"]
    command += ["--disk", "none", "--network", "none", "--graphics", "none", "--noautoconsole", "--osinfo", "generic"]
    command += ["--memdev", f"nvdimm,access=shared,source.path={image(host, 'db9')},target.size=4"]
    command += ["--boot", f"emulator={host.folder}/qemu"]
    done: subprocess.CompletedProcess[str] = host.libvirtd.run(*command)
    assert done.returncode == 0, host.libvirtd.report(f"{done.stdout}{done.stderr}")
    assert host.state("db9")[0] == "mapped"


@pytest.mark.parametrize("name", ["-incoming", "-help", "-xen-domid", "--version"])
def test_a_domain_that_is_called_like_an_option_gets_its_tables(host: Host, name: str) -> None:
    file = host.xml("db2", 2)
    file.write_text(file.read_text().replace("<name>db2<", f"<name>{name}<"))
    host.check("define", file)
    uuid = re.findall("<uuid>(.*)</uuid>", file.read_text())[0]
    host.check("start", uuid)
    said = host.libvirtd.device_model_log(name)
    assert "hvmloader/acpi/address" in said
    assert "event=started" in said
    host.check("destroy", uuid)
    host.check("undefine", uuid)
    host.nvdimmctl("release", "--yes", uuid)
