# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.errors import NotFoundError, RefusedError
from nvdimm_driver.model import (
    GIB,
    KIB,
    MIB,
    SUPERPAGE,
    Allocation,
    BackingIdentity,
    DomainSpec,
    NvdimmSpec,
    Pool,
    Record,
)
from nvdimm_driver.pools.rules import Pools
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, make_driver


def pool(name: str, *paths: object, quota: int | None = None, alignsize: int = SUPERPAGE) -> Pool:
    return Pool(name, "fsdax", tuple(map(str, paths)), quota, alignsize, 128 * KIB, False)


def domain(*nvdimms: tuple[object, int], uuid: str | None = UUID) -> DomainSpec:
    specs = tuple(NvdimmSpec(slot, str(path), size) for slot, (path, size) in enumerate(nvdimms))
    return DomainSpec("db1", uuid, GIB, None, specs)


def record(uuid: str, *nvdimms: tuple[object, int]) -> Record:
    items = tuple(Allocation(uuid, spec) for spec in domain(*nvdimms).nvdimms)
    return Record(uuid, "other", GIB, None, "", items, None)


def test_the_pool_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to("one")
    (tmp_path / "one" / "out").symlink_to(tmp_path)
    one, device = pool("one", tmp_path / "one"), pool("raw", "/dev/pmem1", "/dev/pmem2")
    pools = Pools([one, device])
    assert pools.of(f"{tmp_path}/one/new.img") == one
    assert pools.of(resolve(f"{tmp_path}/link/sub/new.img")) == one
    assert pools.of("/dev/pmem2") == device
    for outside in (f"{tmp_path}/ones", f"{tmp_path}/one/../x", f"{tmp_path}/one/out/x", "/dev/pmem3"):
        assert pools.of(resolve(outside)) is None
    assert pools.of(f"{tmp_path}/one/../x") is None, "it is not resolved"


def test_a_pool_whose_path_others_have_turned_keeps_no_file_from_the_other_pools(tmp_path: Path) -> None:
    """Who has a folder above that of a pool can put a chain of links in its place, longer than Python's stack."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to("two")
    for number in range(1, 1200):
        (tmp_path / f"{number}").symlink_to(f"{number - 1}")
    for turned in ("two", "1199"):
        pools = Pools([one := pool("one", tmp_path / "one"), pool("two", tmp_path / turned)])
        assert pools.of(f"{tmp_path}/one/new.img") == one


def test_a_path_outside_is_refused_unless_any_may_be_had() -> None:
    with pytest.raises(RefusedError, match=r"/srv/a is in none .*pools are: main \(/mnt/pmem0\)"):
        Pools([pool("main", "/mnt/pmem0")]).check(domain(("/mnt/pmem0/a", MIB * 2), ("/srv/a", 2 * MIB)), [])
    with pytest.raises(RefusedError, match="none is configured: 'nvdimmctl pool create'"):
        Pools([]).check(domain(("/srv/a", 2 * MIB)), [])
    Pools([], any_path=True).check(domain(("/srv/a", 2 * MIB)), [])


def test_a_quota_counts_other_domains_and_not_what_the_domain_had() -> None:
    pools = Pools([pool("main", "/mnt/pmem0", quota=10 * MIB)])
    others = [record(OTHER_UUID, ("/mnt/pmem0/b", 4 * MIB), ("/mnt/pmem1/c", GIB)), record(UUID, ("/mnt/pmem0/a", GIB))]
    pools.check(domain(("/mnt/pmem0/a", 6 * MIB)), others)
    with pytest.raises(RefusedError, match="pool main: domains have 4 MiB of its quota of 10 MiB; 8 MiB more"):
        pools.check(domain(("/mnt/pmem0/a", 4 * MIB), ("/mnt/pmem0/d", 4 * MIB)), others)


def test_a_quota_counts_what_the_domain_keeps_besides() -> None:
    pools = Pools([pool("main", "/mnt/pmem0", quota=10 * MIB)])
    wanted = domain(("/mnt/pmem0/a", 6 * MIB))
    kept = NvdimmSpec(1, "/mnt/pmem0/b", 4 * MIB)
    pools.check(wanted, [], [kept])
    with pytest.raises(RefusedError, match="domains have 6 MiB of its quota of 10 MiB; 6 MiB more"):
        pools.check(wanted, [], [kept, NvdimmSpec(2, "/mnt/pmem0/c", 2 * MIB)])


def test_domains_keep_what_they_have_when_pools_change(tmp_path: Path) -> None:
    """Also when a start has to adapt the ledger, here to other RAM."""
    large = Pool("main", "memory", ("/mnt/pmem0",), None, SUPERPAGE, 0, False)
    backing, mapper = MemoryBacking(), RecordingMapper()
    had = domain(("/mnt/pmem0/a", 6 * MIB))
    make_driver(tmp_path, backing, mapper, pools=Pools([large])).define(had)
    for pools in ([], [replace(large, quota=4 * MIB)], [replace(large, alignsize=16 * MIB)]):
        driver = make_driver(tmp_path, backing, mapper, pools=Pools(pools))
        driver.define(had)
        driver.prepare(replace(had, ram=had.ram + GIB * (2 + len(pools))))
        driver.release(UUID)
        for wanted in (domain(("/mnt/pmem0/a", 8 * MIB)), domain(("/mnt/pmem0/a", 6 * MIB), ("/mnt/pmem0/b", 2 * MIB))):
            with pytest.raises(RefusedError, match=r"quota of 4 MiB|in none of the host's pools|not a multiple"):
                driver.define(wanted)


def test_sizes_are_multiples_of_the_pools_alignsize() -> None:
    with pytest.raises(RefusedError, match="/mnt/pmem0/a: 6 MiB is not a multiple of 4 MiB"):
        Pools([pool("main", "/mnt/pmem0", alignsize=4 * MIB)]).check(domain(("/mnt/pmem0/a", 6 * MIB)), [])


def test_a_pool_by_name() -> None:
    main = pool("main", "/mnt/pmem0")
    assert Pools([main]).named("main") == main
    with pytest.raises(NotFoundError, match="no pool 'other'"):
        Pools([main]).named("other")


def test_the_place_of_a_name(tmp_path: Path) -> None:
    folder, devices = pool("main", tmp_path), pool("raw", "/dev/pmem1", "/dev/pmem2")
    pools = Pools([folder, devices])
    assert pools.place(folder, "a.img") == f"{tmp_path}/a.img"
    assert pools.place(devices, "pmem2") == "/dev/pmem2"
    with pytest.raises(NotFoundError, match=r"pool raw has no device 'pmem3' .it has pmem1, pmem2"):
        pools.place(devices, "pmem3")
    pools.check_place(f"{tmp_path}/a")
    with pytest.raises(RefusedError, match="in none of the host's pools"):
        pools.check_place("/srv/a")


def test_a_device_of_a_pool_by_its_link(tmp_path: Path) -> None:
    (tmp_path / "pmem-7b2c").symlink_to("pmem1")
    (tmp_path / "pmem1").touch()
    raw = pool("raw", tmp_path / "pmem-7b2c")
    assert {Pools([raw]).place(raw, name) for name in ("pmem-7b2c", "pmem1")} == {f"{tmp_path}/pmem1"}


def device(path: str, start: int = 0, size: int = 8 * MIB, **noted: object) -> Allocation:
    identity = BackingIdentity("pmem", "7b2c", start, 0, 0, size)
    return replace(Allocation(UUID, NvdimmSpec(0, path, 2 * MIB), identity), **noted)  # type: ignore[arg-type]


def test_a_device_is_overwritten_as_the_pool_says_that_its_domain_got_it_from() -> None:
    kept, wiped = pool("kept", "/dev/pmem1"), replace(pool("wiped", "/dev/pmem2"), wipe_on_release=True)
    pools, only_kept, only_wiped = Pools([kept, wiped]), Pools([kept]), Pools([wiped])
    secret, precious = pools.noted(device("/dev/pmem2")), pools.noted(device("/dev/pmem1"))
    assert [(each.pool, each.wipes) for each in (secret, precious)] == [("wiped", True), ("kept", False)]
    for item, wipes in ((secret, True), (precious, False)):
        path = {"/dev/pmem1": "/dev/pmem2", "/dev/pmem2": "/dev/pmem1"}[item.spec.path]
        renamed = device(path, pool=item.pool, wipes=item.wipes)  # by a boot, which a repair has followed
        assert [each.wipes(renamed, renamed.identity) for each in (pools, only_kept, only_wiped)] == [wipes] * 3
        defined = pools.noted(device(path), [item])
        assert (defined.pool, defined.wipes) == (item.pool, wipes)
    assert not Pools([kept, replace(wiped, wipe_on_release=False)]).wipes(secret, secret.identity), "not any more"


def test_the_pool_of_a_device_that_a_boot_has_renamed(tmp_path: Path) -> None:
    """Its earlier name is that of its pool where that has it itself, and not where a link leads to it by now."""
    (tmp_path / "by-id").symlink_to("/dev/pmem1")
    named, linked = pool("named", "/dev/pmem1"), pool("linked", tmp_path / "by-id")
    other = pool("other", "/dev/pmem2")
    renamed = device("/dev/pmem2", renamed_from="/dev/pmem1")
    assert Pools([named, other]).noted(renamed).pool == "named"
    assert Pools([linked, other]).noted(renamed).pool == "other"


def test_a_device_that_is_larger_than_what_its_domain_had_may_have_bytes_to_be_overwritten() -> None:
    kept, wiped = pool("kept", "/dev/pmem1p1"), replace(pool("wiped", "/dev/pmem1"), wipe_on_release=True)
    part = device("/dev/pmem1p1", 2 * MIB, 4 * MIB, pool="kept")
    assert Pools([kept, wiped]).noted(device("/dev/pmem1"), [part]).wipes
