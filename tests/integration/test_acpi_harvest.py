# SPDX-License-Identifier: Apache-2.0
"""Tables from real QEMUs: Debian's qemu-system-x86 (TCG) and qemu-system-xen (qtest). Both must be installed."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.acpi.aml import named_integers
from nvdimm_driver.acpi.cache import TableCache, key_of
from nvdimm_driver.acpi.machine import arguments
from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.acpi.tables import (
    ControlRegion,
    Nfit,
    PlatformCapabilities,
    RegionMapping,
    SpaRange,
    Structure,
    verify_table,
)
from nvdimm_driver.acpi.verify import DSM_ADDRESS
from nvdimm_driver.errors import AcpiError, ConfigError
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, SUPERPAGE, GuestLayout, NvdimmSpec, Placement

XEN_QEMU = "/usr/libexec/xen-qemu-system-i386"
PLAIN_QEMU = "/usr/bin/qemu-system-x86_64"
TIB = 1024 * GIB


def layout(*nvdimms: Placement) -> GuestLayout:
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms)


def row(count: int) -> GuestLayout:
    return layout(*(Placement(slot, (68 + slot) * GIB, (slot % 7 + 1) * 16 * MIB) for slot in range(count)))


LAYOUTS = {
    "1": row(1),
    "2": row(2),
    "8": row(8),
    "256": row(256),
    "right above 4 GiB": layout(Placement(0, 4 * GIB, GIB)),
    "base and size of one page": layout(Placement(0, 5 * GIB + PAGE, PAGE)),
    "1 TiB at 8 GiB": layout(Placement(0, 8 * GIB, TIB)),
    "1 TiB at 1 TiB, where AMD has HyperTransport": layout(Placement(0, 1012 * GIB, TIB)),
    "16 TiB at 64 TiB": layout(Placement(0, 64 * TIB, 16 * TIB)),
    "up to the limit": layout(Placement(0, (1 << 48) - GIB, GIB)),
    "slots with gaps": layout(Placement(2, 68 * GIB, GIB), Placement(9, 70 * GIB, GIB)),
    "last slot": layout(Placement(255, 68 * GIB, GIB)),
    "labels": layout(
        Placement(0, 68 * GIB, 64 * MIB - 128 * KIB, 128 * KIB),
        Placement(1, 70 * GIB, 64 * MIB, 256 * KIB),
        Placement(2, 72 * GIB, 64 * MIB, 2 * MIB),
        Placement(3, 74 * GIB, 64 * MIB, 129 * KIB),
    ),
    "labels of NVDIMMs that touch": layout(
        Placement(0, 0x100000000, 510 * MIB, 128 * KIB, label_gap=2 * MIB - 128 * KIB),
        Placement(1, 0x11FE00000, 510 * MIB, 128 * KIB, label_gap=2 * MIB - 128 * KIB),
    ),
    "nodes": layout(Placement(0, 68 * GIB, GIB, node=1), Placement(1, 70 * GIB, GIB, 128 * KIB, 0)),
    "last node": layout(Placement(0, 68 * GIB, GIB, node=127)),
    "flushed from the caches": replace(row(2), persistence_domain="cpu_cache"),
    "flushed, nobody knows from where": replace(row(2), persistence_domain=""),
}


@pytest.fixture(params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def asked(request: pytest.FixtureRequest) -> GuestLayout:
    found = request.param
    assert isinstance(found, GuestLayout)
    return found


def by_handle(table: bytes) -> dict[int, Sequence[Structure]]:
    """Return the NFIT's structures by NVDIMM handle; the platform's are under 0."""
    nfit = Nfit.parse(table)
    ranges = {found.index: found for found in nfit.of(SpaRange)}
    controls = {found.index: found for found in nfit.of(ControlRegion)}
    joined: dict[int, Sequence[Structure]] = {
        found.handle: (found, ranges[found.spa_index], controls[found.control_index])
        for found in nfit.of(RegionMapping)
    }
    assert len(nfit.structures) == 3 * len(joined) + len(nfit.of(PlatformCapabilities))
    joined[0] = nfit.of(PlatformCapabilities)
    return joined


def test_both_qemus_give_the_same_bytes_and_native_the_same_structures(asked: GuestLayout) -> None:
    xen = QemuAcpiBuilder([XEN_QEMU]).build(asked)
    plain = QemuAcpiBuilder([PLAIN_QEMU]).build(asked)
    native = NativeAcpiBuilder().build(asked)
    assert xen == plain
    assert by_handle(native.tables[0]) == by_handle(xen.tables[0])
    assert native.tables[1] == xen.tables[1]


def test_everything_of_the_machine_is_there_for_reference() -> None:
    tables = QemuAcpiBuilder([XEN_QEMU]).build(row(2))
    headers = [verify_table(table) for table in tables.reference]
    assert sorted(header.signature for header in headers) == [
        *(b"APIC", b"DSDT", b"FACP", b"HPET", b"SRAT", b"SSDT", b"WAET")
    ]
    assert [header.oem_table_id for header in headers if header.signature == b"SSDT"] == [b"NVDIMM\0\0"]


@pytest.mark.parametrize(
    "spec",
    [
        NvdimmSpec(0, "/p", 64 * MIB),
        NvdimmSpec(0, "/p", 64 * MIB, 128 * KIB),
        NvdimmSpec(0, "/p", 64 * MIB, 129 * KIB),
        NvdimmSpec(0, "/p", 64 * MIB, 128 * KIB, alignsize=SUPERPAGE),
    ],
)
def test_size_that_the_driver_computes_is_what_qemu_shows(spec: NvdimmSpec) -> None:
    placement = Placement(0, 68 * GIB, spec.visible_size, spec.label_size)
    nfit = Nfit.parse(QemuAcpiBuilder([XEN_QEMU]).build(layout(placement)).tables[0])
    assert [found.length for found in nfit.of(SpaRange)] == [spec.visible_size]


def test_label_too_small_for_qemu_is_its_error() -> None:
    with pytest.raises(AcpiError, match=r"label-size.* required at least 0x20000"):
        QemuAcpiBuilder([XEN_QEMU]).build(layout(Placement(0, 68 * GIB, GIB, 64 * KIB)))


@pytest.mark.parametrize("name", ["1", "256", "labels", "slots with gaps", "nodes"])
def test_ssdt_for_a_label_server_is_qemus_own(name: str) -> None:
    """It has the guest's page for requests as MEMA. Without a label area to serve, the SSDT is the driver's own."""
    asked = replace(LAYOUTS[name], dsm="qemu")
    xen, plain = (QemuAcpiBuilder([binary]).build(asked) for binary in (XEN_QEMU, PLAIN_QEMU))
    assert xen == plain
    ssdts = [table for table in xen.reference if table[:4] == b"SSDT"]
    if asked.label_clients:
        assert ssdts == []
        assert named_integers(xen.tables[1], "MEMA") == (0xFD000000,)
        with pytest.raises(ConfigError, match="builder is 'native'"):
            NativeAcpiBuilder().build(asked)
    else:
        assert len(ssdts) == 1
        assert xen.tables[1] == NativeAcpiBuilder().build(asked).tables[1]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach; pytest's own is its user's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_what_a_qemu_has_given_is_kept_for_the_next_time(tmp_path: Path, open_folder: Path) -> None:
    """A build from the cache starts no QEMU; another layout or a replaced QEMU does."""
    once, record = open_folder / "once", open_folder / "starts"
    script = f'#!/bin/sh\necho >>{record}\nexec {XEN_QEMU} "$@"\n'
    once.write_text(script)
    once.chmod(0o755)
    record.touch()
    record.chmod(0o666)
    builder = QemuAcpiBuilder([str(once)], cache=TableCache(tmp_path / "cache"))
    first = builder.build(row(2))
    starts = record.read_text()
    assert builder.build(row(2)) == first
    assert record.read_text() == starts
    assert builder.build(replace(row(2), dsm="aml")) == first
    assert record.read_text() == starts
    assert builder.build(row(3)) != first
    once.write_text(script + "\n")
    assert builder.build(row(2)) == first
    assert len(record.read_text()) == 3 * len(starts)


def test_second_qemu_is_taken_when_the_first_fails(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert QemuAcpiBuilder([str(broken), PLAIN_QEMU]).build(row(1)) == QemuAcpiBuilder([XEN_QEMU]).build(row(1))


def test_nothing_is_left_behind() -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    QemuAcpiBuilder([XEN_QEMU]).build(row(1))
    QemuAcpiBuilder([PLAIN_QEMU]).build(row(1))
    assert set(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_wrong_tables_in_the_cache_are_made_anew(tmp_path: Path) -> None:
    """Whole tables, but of another layout."""
    cache = TableCache(tmp_path / "cache")
    builder = QemuAcpiBuilder([XEN_QEMU], cache=cache)
    right, other = builder.build(row(2)), builder.build(row(3))
    one, three = (key_of(XEN_QEMU, [*arguments(each), hex(DSM_ADDRESS)]) for each in (row(2), row(3)))
    wrong = cache.get(three)
    assert wrong is not None
    cache.put(one, wrong)
    assert builder.build(row(2)) == right
    assert builder.build(row(3)) == other
    kept = cache.get(one)
    assert kept is not None
    assert {*right.tables} & {*kept}
