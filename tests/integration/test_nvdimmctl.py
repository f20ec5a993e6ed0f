# SPDX-License-Identifier: Apache-2.0
"""nvdimmctl as a user runs it on any Linux machine, with the ACPI tables of a real QEMU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
GUEST = PROJECT / "etc/examples/guest.xml"
HOST = PROJECT / "etc/examples/host.json"


def nvdimmctl(*arguments: object, text: str | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("nvdimmctl")), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_plan_says_all_that_would_happen() -> None:
    out = nvdimmctl("plan", GUEST, "--host", HOST).stdout
    for line in (
        "-  <maxMemory slots='2' unit='GiB'>2</maxMemory>",
        "+    <emulator>/usr/libexec/xen/bin/nvdimm-device-model</emulator>",
        "  slot 0: /mnt/pmem0/pmem-guest.img: 64 MiB, label 0 B; fsdax on namespace0.0 (pmem0): create, write 64 MiB",
        "  0x1100000000 - 0x1103ffffff: slot 0, handle 0x1, 64 MiB",
        "  cache: uncached: no hypervisor is asked",
        "Mapping calls: 2 extents, 48 entries of 2 MiB, 0 of 4 KiB, 2 memory_mapping hypercalls",
        "SPA range 2: persistent memory, base 0x1100000000, length 0x4000000",
        'Name (_HID, "ACPI0012"',
    ):
        assert line in out


def test_plan_gives_advice_on_the_room_for_pci_bars() -> None:
    def advice(old: str, new: str) -> str:
        xml = GUEST.read_text()
        assert old in xml
        return nvdimmctl("plan", "-", "--host", HOST, text=xml.replace(old, new, 1)).stdout

    device = "<hostdev mode='subsystem' type='pci'><source><address bus='1'/></source></hostdev>"
    base = "<address type='dimm' slot='0' base='0x100000000'/>"
    assert "hvmloader puts" not in advice("", "")
    assert "  advice: 64 GiB are free between the RAM and the NVDIMMs: " in advice("<devices>", f"<devices>{device}")
    assert "  advice: 0 B are free between the RAM and the NVDIMMs: " in advice("</target>", f"</target>{base}")


def test_plan_says_which_devices_do_not_reach_the_nvdimms() -> None:
    """The example has none of these: it is what a database's host begins with."""
    xml = GUEST.read_text()
    assert "QEMU emulates" not in nvdimmctl("plan", "-", "--host", HOST, text=xml).stdout
    other = xml.replace("dev='xvda' bus='xen'", "dev='sda' bus='scsi'")
    assert other != xml
    assert "  advice: QEMU emulates lsi53c895a and " in nvdimmctl("plan", "-", "--host", HOST, text=other).stdout
    virtio = xml.replace("<domain ", "<domain xmlns:xen='http://libvirt.org/schemas/domain/xen/1.0' ").replace(
        "</domain>",
        "<xen:commandline><xen:arg value='-device'/><xen:arg value='virtio-blk-pci'/></xen:commandline></domain>",
    )
    assert "  advice: QEMU emulates virtio-blk-pci and " in nvdimmctl("plan", "-", "--host", HOST, text=virtio).stdout


def test_plan_json_has_raw_numbers() -> None:
    plan = json.loads(nvdimmctl("plan", "--json", GUEST, "--host", HOST).stdout)
    assert plan["cost"] == {"superpage_entries": 48, "page_entries": 0, "hypercalls": 2}
    assert [item["base"] for item in plan["layout"]["nvdimms"]] == [0x1100000000, 0x1140000000]
    assert plan["mappings"][1] == {"gfn": 0x1140000, "mfn": 412316860416 >> 12, "frames": 8192}
    assert bytes.fromhex(plan["tables"][0])[:4] == b"NFIT"


def test_rewrite_and_restore_are_filters() -> None:
    rewritten = nvdimmctl("rewrite", GUEST).stdout
    assert "<emulator>/usr/libexec/xen/bin/nvdimm-device-model</emulator>" in rewritten
    restored = nvdimmctl("restore", "-", text=rewritten).stdout
    assert nvdimmctl("rewrite", "-", text=restored).stdout == rewritten
    plain = "<domain type='xen'><name>a</name></domain>\n"
    assert nvdimmctl("rewrite", "-", text=plain).stdout == plain


def test_xml_is_read_in_the_encoding_that_it_declares(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    text = GUEST.read_text().replace("<name>", "<title>f\xf6</title><name>")
    file.write_bytes(b"<?xml version='1.0' encoding='ISO-8859-1'?>\n" + text.encode("latin-1"))
    assert "<title>f\xf6</title>" in nvdimmctl("rewrite", file).stdout
    assert "slot 0: /mnt/pmem0/pmem-guest.img" in nvdimmctl("plan", file, "--host", HOST).stdout
    file.write_bytes(text.encode("latin-1"))
    said = nvdimmctl("plan", file, "--host", HOST, status=1).stderr
    assert f"{file}: the XML is not UTF-8" in said
    assert "(declare its encoding, as in <?xml" in said


def test_acpi_dump_in_three_forms(tmp_path: Path) -> None:
    dump = nvdimmctl("acpi", "dump", GUEST, "--host", HOST).stdout
    (tmp_path / "dump").write_text(dump)
    subprocess.run(["acpixtract", "-a", "dump"], cwd=tmp_path, check=True, capture_output=True)
    written = nvdimmctl("acpi", "dump", GUEST, "--host", HOST, "-o", tmp_path / "out").stdout.split()
    assert written == [f"{tmp_path}/out/nfit.dat", f"{tmp_path}/out/ssdt1.dat"]
    assert (tmp_path / "nfit.dat").read_bytes() == (tmp_path / "out/nfit.dat").read_bytes()
    assert "Region mapping: handle 0x1" in nvdimmctl("acpi", "dump", GUEST, "--host", HOST, "--decode").stdout


def test_acpi_dump_all_has_the_whole_harvested_set() -> None:
    dump = nvdimmctl("acpi", "dump", GUEST, "--host", HOST, "--all").stdout
    signatures = [line.split()[0] for line in dump.splitlines() if "@" in line[:8]]
    assert {"NFIT", "SSDT", "DSDT", "FACP", "APIC"} <= set(signatures)
    assert signatures.count("SSDT") == 2, "ours, and QEMU's own"


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (("access='shared'", "access='private'"), 1, "access='private'"),
        (("hvm</type>", "xenpvh</type>"), 1, "xenpvh"),
        (("<size unit='MiB'>64</size>", "<size unit='MiB'>0</size>"), 1, "size"),
        (("/dev/pmem1", "/dev/pmem0"), 1, "/dev/pmem0: namespace0.0 is in mode fsdax"),
        (("<size unit='MiB'>32</size>", "<size unit='TiB'>32</size>"), 1, "do not fit namespace1.0"),
        (("</domain>", ""), 1, "XML"),
    ],
)
def test_wrong_input_is_told_on_stderr(change: tuple[str, str], status: int, says: str) -> None:
    xml = GUEST.read_text().replace(*change)
    assert xml != GUEST.read_text()
    done = nvdimmctl("plan", "-", "--host", HOST, text=xml, status=status)
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.startswith("nvdimmctl: ")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "/nonexistent.json" in nvdimmctl("plan", GUEST, "--host", "/nonexistent.json", status=3).stderr
    assert "/nonexistent.xml" in nvdimmctl("rewrite", "/nonexistent.xml", status=3).stderr
    assert "/nonexistent.conf" in nvdimmctl("--config-file", "/nonexistent.conf", "list", status=1).stderr
    conf = tmp_path / "c.conf"
    conf.write_text(f"[DEFAULT]\nstate_dir={tmp_path}/none\n")
    assert "nvdimmctl register" in nvdimmctl("--config-file", conf, "list", status=1).stderr


def test_a_domain_without_nvdimms_has_no_plan() -> None:
    done = nvdimmctl("plan", "-", "--host", HOST, text="<domain type='xen'><name>a</name></domain>", status=1)
    assert "not a Xen domain with NVDIMMs" in done.stderr


@pytest.mark.parametrize("option", ["--log-file={}", "--log-f={}"])
@pytest.mark.parametrize("command", ["plan", "host", "nova inventory --pmem-namespaces"])
def test_no_option_writes_a_file(tmp_path: Path, command: str, option: str) -> None:
    """Whoever may run one command as root could write any file with cliff's own ``--log-file``."""
    file = tmp_path / "file"
    done = nvdimmctl(*command.split(), option.format(file), status=2)
    assert "usage: nvdimmctl" in done.stderr
    assert not file.exists()


def test_no_option_is_abbreviated(tmp_path: Path) -> None:
    assert "usage: nvdimmctl" in nvdimmctl("list", f"--config={tmp_path}", status=2).stderr


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["help", "nope"], 2, "'nope' is not a nvdimmctl command"),
        (["plan", "/dev/zero"], 1, "nvdimmctl: /dev/zero: has more than 4 MiB, which is all that libvirt takes"),
        (["plan", GUEST, "--host", "/dev/full"], 1, "nvdimmctl: /dev/full: "),
    ],
)
def test_what_is_typed_wrong_is_told_in_one_line(words: list[object], status: int, says: str) -> None:
    done = nvdimmctl(*words, status=status)
    assert (done.stdout or done.stderr).startswith(says) or says in done.stdout


def test_without_a_command_the_help_is_named() -> None:
    done = nvdimmctl("--config-file", "/dev/null", text="", status=2)
    assert done.stderr.endswith("nvdimmctl: there is no command: 'nvdimmctl --help' lists all\n")


@pytest.mark.parametrize("words", [["plan", GUEST, "--host", HOST], ["rewrite", GUEST]])
@pytest.mark.parametrize(
    ("to", "says"),
    [(">/dev/full", "nvdimmctl: No space left on device\n"), (">&-", "nvdimmctl: Bad file descriptor\n")],
)
def test_output_that_cannot_be_written_is_an_error(words: list[object], to: str, says: str) -> None:
    command = [str(Path(sys.executable).with_name("nvdimmctl")), *map(str, words)]
    done = subprocess.run(["sh", "-c", f'"$@" {to}', "-", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, says)


def test_the_traceback_of_an_error_is_shown_on_demand() -> None:
    command = [str(Path(sys.executable).with_name("nvdimmctl")), "--debug", "plan", "/dev/zero"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" in done.stderr
