# SPDX-License-Identifier: Apache-2.0
"""The same domain XML on KVM: what libvirt's QEMU driver makes of an NVDIMM, and what this driver does.

No guest runs: libvirtd defines domains of type ``qemu`` and prints QEMU's command line.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.errors import DeviceMissingError, UnsupportedError
from nvdimm_driver.xml.edit_devices import detach
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore, rewrite
from tests.integration.private_libvirtd import PrivateLibvirtd
from tests.waiting import HANG_SECONDS

DOMAIN = """\
<domain type='qemu'>
  <name>g</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <maxMemory slots='16' unit='GiB'>16</maxMemory>
  <memory unit='GiB'>1</memory>
  {backing}
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
  </os>
  <cpu>
    <numa>
      <cell id='0' cpus='0' memory='512' unit='MiB'/>
      <cell id='1' cpus='1' memory='512' unit='MiB'{cell}/>
    </numa>
  </cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {nvdimm}
  </devices>
</domain>
"""
NVDIMM = (
    "<memory model='nvdimm'{access}><source><path>/tmp/it's &quot;&amp;</path><alignsize unit='MiB'>2</alignsize>"
    "<pmem/></source><target><size unit='MB'>64</size><node>1</node><label><size unit='KiB'>256</size></label></target>"
    "<alias name='ua-x'/><address type='dimm' slot='3' base='0X180000000'/></memory>"
)
NVDIMM_1 = NVDIMM.format(access="")


@pytest.fixture(scope="module")
def kvm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirtd]:
    with PrivateLibvirtd(tmp_path_factory.mktemp("kvm")) as libvirtd:
        yield libvirtd


def virsh(kvm: PrivateLibvirtd, *words: str | Path) -> str:
    """Return what virsh prints, errors too."""
    command = ["virsh", "-q", "-c", kvm.uri("qemu", "/system"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    return done.stdout + done.stderr


def define(kvm: PrivateLibvirtd, folder: Path, xml: str) -> None:
    file = folder / "domain.xml"
    file.write_text(xml)
    assert virsh(kvm, "define", file).strip() == ""


def on_xen(xml: str) -> str:
    return xml.replace("type='qemu'", "type='xen'").replace("machine='pc'", "machine='xenfv'")


def domain(nvdimm: str = NVDIMM_1, backing: str = "", cell: str = "") -> str:
    return DOMAIN.format(nvdimm=nvdimm, backing=backing, cell=cell)


def memory_of(xml: str) -> list[str]:
    return re.findall(r" *<maxMemory.*?</maxMemory>| *<memory model='nvdimm'.*?</memory>", xml, re.DOTALL)


@pytest.mark.parametrize(("access", "cell", "backing"), list(itertools.product([None, "shared", "private"], repeat=3)))
def test_what_is_private_on_kvm_is_refused(
    kvm: PrivateLibvirtd, tmp_path: Path, access: str | None, cell: str | None, backing: str | None
) -> None:
    xml = domain(
        NVDIMM.format(access=f" access='{access}'" if access else ""),
        f"<memoryBacking><access mode='{backing}'/></memoryBacking>" if backing else "",
        f" memAccess='{cell}'" if cell else "",
    )
    define(kvm, tmp_path, xml)
    (made,) = re.findall(r'"mem-path":"/tmp/it.*?}', virsh(kvm, "domxml-to-native", "qemu-argv", "--domain", "g"))
    if '"share":false' in made:
        with pytest.raises(UnsupportedError, match=r"private.* is not supported on Xen"):
            extract(on_xen(xml))
    else:
        assert extract(on_xen(xml)) is not None
    # The one difference: where nothing says which, QEMU maps the file privately.
    assert ('"share"' in made) == (access is not None or cell is not None or backing is not None)


def test_an_nvdimm_is_shown_as_on_kvm(kvm: PrivateLibvirtd, tmp_path: Path) -> None:
    define(kvm, tmp_path, domain())
    shown = memory_of(virsh(kvm, "dumpxml", "--inactive", "g"))
    assert len(shown) == 2
    assert memory_of(restore(rewrite(on_xen(domain()), "/device-model"))) == shown


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("unit='MB'>64", "unit='KiB'>62500"),
        ("unit='MB'>64", "unit='MB'>63"),
        ("/tmp/it", "/tmp/at"),
        ("<node>1", "<node>0"),
        ("slot='3'", "slot='4'"),
        ("base='0X180000000'", "base='0x190000000'"),
        ("<alias name='ua-x'/>", ""),
        ("<alias name='ua-x'/>", "<alias name='nvdimm0'/>"),
        ("ua-x", "ua-y"),
        ("<pmem/>", ""),
        ("<alignsize unit='MiB'>2</alignsize>", ""),
        ("<label><size unit='KiB'>256</size></label>", ""),
        ("<memory ", "<memory access='private' "),
        ("<address type='dimm' slot='3' base='0X180000000'/>", ""),
    ],
)
def test_a_device_is_found_as_on_kvm(kvm: PrivateLibvirtd, tmp_path: Path, old: str, new: str) -> None:
    define(kvm, tmp_path, domain())
    device = NVDIMM_1.replace(old, new)
    file = tmp_path / "device.xml"
    file.write_text(device)
    said = virsh(kvm, "detach-device", "g", file, "--config").strip()
    if said:
        assert "device not found: matching memory device was not found" in said
        with pytest.raises(DeviceMissingError):
            detach(on_xen(domain()), device)
    else:
        assert "nvdimm" not in detach(on_xen(domain()), device)


@pytest.mark.parametrize("command", ["attach-device", "detach-device", "update-device"])
def test_a_domain_that_is_off_is_changed_as_on_kvm(kvm: PrivateLibvirtd, tmp_path: Path, command: str) -> None:
    """Compare with ``test_virsh.py``, which has the same words of the libxl driver."""
    define(kvm, tmp_path, domain())
    file = tmp_path / "device.xml"
    file.write_text(NVDIMM_1)
    for flags in (["--live"], ["--live", "--config"]):
        assert "Requested operation is not valid: domain is not running" in virsh(kvm, command, "g", file, *flags)
