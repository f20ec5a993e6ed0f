# SPDX-License-Identifier: Apache-2.0
"""Creation of pools, with output of ndctl 76; the lab runs the same commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvdimm_driver.backing import ndctl
from nvdimm_driver.cmd.ctl import pool_create
from nvdimm_driver.cmd.ctl.pool_create import _check_unclaimed
from nvdimm_driver.errors import BackingError, InUseError, LedgerError, NotFoundError, NvdimmError, RefusedError
from nvdimm_driver.model import GIB, MIB
from nvdimm_driver.pools.create import PoolHost, RunCommand, Wish, WriteFile, steps
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import StoredDomain
from tests.unit.test_device_claims import claims
from tests.unit.test_device_marks import A, Host

UUID = "0f7d9a52-0000-4000-8000-000000000001"
LISTED = json.dumps(
    [
        {"dev": "region0", "size": GIB, "available_size": 0, "max_available_extent": 0, "type": "pmem",
         "namespaces": [{"dev": "namespace0.0", "mode": "raw", "size": GIB, "sector_size": 512, "blockdev": "pmem0"}]},
        {"dev": "region1", "size": 512 * MIB, "available_size": 512 * MIB, "max_available_extent": 512 * MIB,
         "namespaces": [{"dev": "namespace1.0", "mode": "raw", "size": 0, "state": "disabled"}]},
    ]
)  # fmt: skip
MADE = {"dev": "namespace1.0", "mode": "fsdax", "map": "mem", "size": 510 * MIB, "uuid": UUID, "blockdev": "pmem1"}
MADE_DEVDAX = {
    "dev": "namespace1.0",
    "mode": "devdax",
    "daxregion": {"id": 1, "devices": [{"chardev": "dax1.0", "size": 508 * MIB}]},
}


def wish(**changes: object) -> Wish:
    values: dict[str, object] = {
        "name": "fast",
        "kind": "fsdax",
        "region": None,
        "namespace": None,
        "size": None,
        "file_system": "ext4",
        "mount_point": "/mnt/fast",
        "quota": "",
        "force": False,
    }
    return Wish(**{**values, **changes})  # type: ignore[arg-type]


def host(*in_use: str, systemd: bool = False, listed: str = LISTED) -> PoolHost:
    return PoolHost(ndctl.regions(listed), "mem", systemd, frozenset(in_use), "/etc/conf.d")


def run(a_wish: Wish, a_host: PoolHost, made: object = MADE, printed: str = "mnt-fast.mount\n") -> list[str]:
    """Return the steps: commands as words, files as ``path: text``."""
    todo = steps(a_wish, a_host, UUID)
    told: list[str] = []
    answer = None
    while True:
        try:
            step = todo.send(answer)  # type: ignore[arg-type]
        except StopIteration:
            return told
        if isinstance(step, WriteFile):
            told.append(f"{step.path}: {step.text}")
        else:
            told.append(" ".join(step.words))
        is_ndctl = isinstance(step, RunCommand) and step.words[0] == "ndctl"
        answer = json.dumps(made) if is_ndctl else printed


def test_a_file_system_on_a_new_namespace() -> None:
    section = "# made by 'nvdimmctl pool create'\n[pool:fast]\nkind = fsdax\npaths = /mnt/fast\nquota = 100GiB\n"
    assert run(wish(quota="100GiB"), host()) == [
        f"ndctl create-namespace -r region1 -n fast -s {512 * MIB} -m fsdax --map=mem",
        f"mkfs.ext4 -q -b 4096 -E stride=512,stripe_width=512 -m 0 -U {UUID} /dev/pmem1",
        "mkdir -p /mnt/fast",
        f"mount -t ext4 -o dax=always,nosuid,nodev,noexec UUID={UUID} /mnt/fast",
        "chmod 0700 /mnt/fast",
        f"/etc/conf.d/pool-fast.conf: {section}",
    ]


@pytest.mark.parametrize("wanted", [{}, {"namespace": "namespace1.0", "force": True}], ids=["new", "reconfigured"])
def test_nothing_is_written_over_a_running_guest_whose_namespace_is_gone(wanted: dict[str, object]) -> None:
    with pytest.raises(InUseError, match=r"region1 has memory of the running guest db1 \(domid 7\), whose namespace"):
        run(wish(**wanted), replace(host(), guests={"region1": "db1 (domid 7)"}))
    run(wish(**wanted), replace(host(), guests={"region0": "db1 (domid 7)"}))


def test_systemd_mounts_it_at_boot() -> None:
    told = run(wish(file_system="xfs"), host(systemd=True))
    assert told[1] == f"mkfs.xfs -q -m reflink=0,uuid={UUID} -d su=2m,sw=1 -l su=4k /dev/pmem1"
    assert told[3] == "systemd-escape --path --suffix=mount /mnt/fast"
    unit = told[4]
    assert unit.startswith("/etc/systemd/system/mnt-fast.mount: ")
    for line in (
        f"What=/dev/disk/by-uuid/{UUID}",
        "Where=/mnt/fast",
        "Type=xfs",
        "Options=dax=always,nosuid,nodev,noexec",
    ):
        assert f"\n{line}\n" in unit
    assert told[5:8] == ["systemctl daemon-reload", "udevadm settle", "systemctl enable --now mnt-fast.mount"]


@pytest.mark.parametrize(
    ("kind", "made", "mode", "path"),
    [("pmem", MADE, "-m raw", "/dev/pmem1"), ("devdax", MADE_DEVDAX, "-m devdax --map=mem", "/dev/dax1.0")],
)
def test_a_namespace_of_its_own(kind: str, made: object, mode: str, path: str) -> None:
    create, section = run(wish(kind=kind, size=256 * MIB), host(), made)
    assert create == f"ndctl create-namespace -r region1 -n fast -s {256 * MIB} {mode}"
    assert f"kind = {kind}\npaths = {path}\n" in section


@pytest.mark.parametrize(
    ("links", "path"),
    [
        ("disk/by-path/pmem1 disk/by-id/pmem-7b2c\n", "/dev/disk/by-id/pmem-7b2c"),
        ("disk/by-path/pmem1\n", "/dev/pmem1"),
    ],
)
def test_a_raw_namespace_by_the_link_that_no_boot_gives_to_another(links: str, path: str) -> None:
    told = run(wish(kind="pmem", size=256 * MIB), host(systemd=True), MADE, links)
    assert told[1:3] == ["udevadm settle", "udevadm info --query=symlink --name=/dev/pmem1"]
    assert f"kind = pmem\npaths = {path}\n" in told[3]


def test_a_namespace_that_there_is_needs_force() -> None:
    with pytest.raises(RefusedError, match=r"all that is on namespace0\.0 \(1 GiB, mode raw\) would be lost \(--force"):
        run(wish(namespace="namespace0.0"), host())
    told = run(wish(namespace="namespace0.0", force=True), host())
    assert told[0] == "ndctl create-namespace -f -e namespace0.0 -m fsdax --map=mem"
    assert told[1].startswith("mkfs.ext4 -q -F ")


def test_one_that_is_in_the_mode_is_not_taken_down() -> None:
    assert len(run(wish(namespace="namespace0.0", kind="pmem", force=True), host())) == 1


def test_one_that_is_in_use_is_never_taken() -> None:
    with pytest.raises(InUseError, match=r"namespace0\.0 is in use: /dev/pmem0"):
        run(wish(namespace="namespace0.0", force=True), host("namespace0.0"))


def test_an_idle_one_that_may_be_a_domains_is_never_taken() -> None:
    listed = [{"dev": "region0", "size": GIB, "namespaces": [{"dev": "namespace0.0", "mode": "raw", "size": GIB}]}]
    with pytest.raises(InUseError, match=r"namespace0\.0 is in use: a domain has it, or one that is not there now"):
        run(wish(namespace="namespace0.0", force=True), host("namespace0.0", listed=json.dumps(listed)))


def test_a_region_of_an_odd_size_is_aligned_to_2_mib_first() -> None:
    listed = json.dumps([{"dev": "region0", "size": 510 * MIB, "available_size": 510 * MIB}])
    assert run(wish(kind="pmem"), host(listed=listed))[0] == "/sys/bus/nd/devices/region0/align: 0x200000\n"


@pytest.mark.parametrize(
    ("changes", "listed", "kind", "says"),
    [
        ({"region": "region7"}, LISTED, NotFoundError, "no region region7 .*region1 .512 MiB free"),
        ({"namespace": "namespace7.0"}, LISTED, NotFoundError, "no namespace namespace7.0"),
        ({"size": GIB}, LISTED, BackingError, "no room for a namespace of 1 GiB, the largest is 512 MiB"),
        ({"region": "region0"}, LISTED, BackingError, "no room"),
        ({}, "[]", BackingError, "no region has room .*no region of persistent memory"),
        ({}, LISTED.replace('"max_available_extent": 0', '"max_available_extent": 2097152'), BackingError, "more than"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], listed: str, kind: type[NvdimmError], says: str) -> None:
    with pytest.raises(kind, match=says):
        run(wish(**changes), host(listed=listed))


@pytest.mark.parametrize("text", ["{", '{"regions": [{}]}', "[1]", '"x"', "[" * 100_000], ids=lambda text: text[:9])
def test_what_ndctl_does_not_print(text: str) -> None:
    with pytest.raises(BackingError, match=r"'ndctl list -RNi' printed .*, which is not the expected JSON"):
        ndctl.regions(text)


def test_one_region_alone() -> None:
    (region,) = ndctl.regions(json.dumps({"dev": "region0", "size": GIB, "available_size": GIB}))
    assert (region.largest_free, region.namespaces) == (GIB, ())
    assert ndctl.regions("") == ()


def test_a_namespace_that_ndctl_did_not_make() -> None:
    with pytest.raises(BackingError, match="'ndctl create-namespace' printed '', which is not the expected JSON"):
        ndctl.namespace("")


def test_a_namespace_that_libvirts_definition_gives_a_domain_is_not_reconfigured() -> None:
    """After the ledger was lost, nothing else knows whose a raw namespace is."""
    stored = [StoredDomain("owner", UUID, ("/dev/pmem0",))]
    unknown = claims(stored, pmem0="one")
    driver: Any = SimpleNamespace(definitions=SimpleNamespace(unknown=unknown), ledger=unknown.ledger)
    with pytest.raises(InUseError, match="/dev/pmem0 is in libvirt's definition of domain owner"):
        _check_unclaimed(driver, wish(kind="pmem", namespace="namespace0.0", force=True), host())
    _check_unclaimed(driver, wish(kind="pmem", namespace="namespace1.0", force=True), host())
    _check_unclaimed(driver, wish(), host())


def test_a_namespace_is_not_reconfigured_that_a_ledger_from_elsewhere_may_not_know() -> None:
    driver: Any = SimpleNamespace(definitions=SimpleNamespace(unknown=claims([])), ledger=Ledger(":memory:"))
    driver.ledger.take_over(compared=False)
    with pytest.raises(LedgerError, match="is a backup or a copy"):
        _check_unclaimed(driver, wish(kind="pmem", namespace="namespace1.0", force=True), host())
    _check_unclaimed(driver, wish(), host())


@pytest.mark.parametrize("known_by", ["ledger", "mark"])
def test_a_disabled_namespace_is_not_reconfigured_that_a_domain_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    """It has no device to look for the mark by. The ledger was lost, and the new one does not know it."""
    owner = Host(tmp_path)
    owner.define(A)
    if known_by == "mark":
        owner.lose_ledger()
        assert owner.driver().ledger.domains() == ()
        assert not owner.driver().ledger.is_from_elsewhere()
    there = {"dev": "namespace0.0", "mode": "raw", "size": GIB, "state": "disabled", "uuid": "ns-0"}
    listed = {"dev": "region0", "size": GIB, "available_size": 0, "max_available_extent": 0, "namespaces": [there]}
    monkeypatch.setattr(pool_create, "_run", lambda _: json.dumps([listed]))
    found = pool_create._host(owner.driver())
    with pytest.raises(InUseError, match=r"a domain has it.*ndctl enable-namespace namespace0.0, and then"):
        run(wish(kind="pmem", namespace="namespace0.0", force=True), found)
