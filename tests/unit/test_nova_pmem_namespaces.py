# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import BackingError, ConfigError, NotFoundError, NvdimmError, UnsupportedError
from nvdimm_driver.model import GIB, KIB, MIB, SUPERPAGE, Allocation, Intake, NvdimmSpec, Pool
from nvdimm_driver.nova import pmem_namespaces
from nvdimm_driver.nova.pmem_namespaces import Configured, Inventory, NovaNamespace, parse
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import NAMESPACE, UUID, MemoryBacking

LABELS = st.text("ABCXYZ019_", min_size=1)
NAMES = st.text("abc019.-", min_size=1)


class HostBacking(MemoryBacking):
    """Files of a test's folders.

    :ivar unwritten: bytes that a path lacks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unwritten: dict[str, int] = {}

    def handles(self, path: str) -> bool:
        return not os.path.isdir(path)

    def examine(self, spec: NvdimmSpec) -> Intake:
        return Intake("memory", False, self.unwritten.get(spec.path, 0), NAMESPACE)

    def check_labels(self, spec: NvdimmSpec) -> None:
        raise UnsupportedError(f"{spec.path}: no label server")


class Host:
    """A host with pools main and other, in folders, and raw, of two devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backing = HostBacking()
        for name in ("main", "other", "dev"):
            (folder / name).mkdir()
        self.pools = [
            Pool("main", "memory", (f"{folder}/main",), None, SUPERPAGE, 128 * KIB, False),
            Pool("other", "memory", (f"{folder}/other",), None, 16 * MIB, 128 * KIB, False),
            Pool("raw", "memory", (f"{folder}/dev/pmem1", f"{folder}/dev/pmem2"), None, SUPERPAGE, 128 * KIB, False),
        ]
        self.ledger = Ledger(":memory:")

    def add(self, path: str, size: int = 6 * GIB) -> str:
        whole = f"{self.folder}/{path}"
        self.backing.files[whole] = (100 + len(self.backing.files), size)
        return whole

    def find(self, *entries: str, served: bool = False) -> tuple[NovaNamespace, ...]:
        inventory = Inventory(Pools(self.pools), [self.backing], self.ledger, served=served)
        return inventory.find(parse(entries))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- the option ---


def test_what_nova_would_read_is_read() -> None:
    assert parse(["6GB:ns0|ns1", " 16GB:main/ns2 "]) == (
        Configured("6GB", "ns0"),
        Configured("6GB", "ns1"),
        Configured("16GB", "main/ns2"),
    )
    assert parse([]) == ()


@given(st.lists(st.tuples(LABELS, NAMES), unique_by=lambda pair: pair[1]))
def test_any_label_and_name_that_may_be_come_through(pairs: list[tuple[str, str]]) -> None:
    assert parse([f"{label}:{name}" for label, name in pairs]) == tuple(Configured(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("ns0", "'ns0' has no label"),
        ("6gb:ns0", "'6gb' is not a label"),
        ("6.5GB:ns0", "'6.5GB' is not a label"),
        ("6GB-FAST:ns0", "'6GB-FAST' is not a label"),
        ("ÄB:ns0", "is not a label"),
        (":ns0", "'' is not a label"),
        ("6GB:", "'' is not a name"),
        ("6GB:ns0||ns1", "'' is not a name"),
        ("6GB:ns0| ns1", "' ns1' is not a name"),
        ("6GB:ns0|ns0", "ns0 is there twice, with labels 6GB and 6GB"),
    ],
)
def test_what_nova_would_take_wrongly_is_an_error(entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([entry])
    assert says in caught.value.message
    assert caught.value.hint


def test_a_name_has_one_label() -> None:
    with pytest.raises(ConfigError, match="ns0 is there twice, with labels 6GB and 16GB"):
        parse(["6GB:ns0", "16GB:ns0"])


# --- what it names ---


def test_a_file_is_all_that_nova_has_to_know_of_it(host: Host) -> None:
    path = host.add("main/ns0")
    (found,) = host.find("6GB:ns0")
    assert found == NovaNamespace(
        "ns0", "6GB", "CUSTOM_PMEM_NAMESPACE_6GB", "main", path, 6 * GIB, SUPERPAGE, domain=""
    )


def test_nothing_changes_when_an_instance_has_it(host: Host) -> None:
    path = host.add("main/ns0")
    (before,) = host.find("6GB:ns0")
    host.ledger.store(UUID, "instance-1", GIB, [Allocation(UUID, NvdimmSpec(0, path, 6 * GIB))])
    (after,) = host.find("6GB:ns0")
    assert after.domain == UUID
    assert {**vars(after), "domain": ""} == vars(before)


def test_a_device_that_is_gone_is_taken_while_an_instance_has_it(host: Host) -> None:
    """As when a guest has written an info block on it that dom0's kernel obeys: the others are to be had."""
    gone, other = host.add("dev/pmem1"), host.add("dev/pmem2")
    host.ledger.store(UUID, "instance-1", GIB, [Allocation(UUID, NvdimmSpec(0, gone, 6 * GIB))])
    before = host.find("6GB:pmem1|pmem2")
    del host.backing.files[gone]
    assert host.find("6GB:pmem1|pmem2") == before
    assert [(each.path, each.domain) for each in before] == [(gone, UUID), (other, "")]


def test_an_instance_has_it_by_its_resolved_path(host: Host) -> None:
    path = host.add("main/ns0")
    (host.folder / "linked").symlink_to(host.folder / "main")
    host.pools = [Pool("linked", "memory", (f"{host.folder}/linked",), None, SUPERPAGE, 128 * KIB, False)]
    host.backing.files[f"{host.folder}/linked/ns0"] = host.backing.files[path]
    host.ledger.store(UUID, "instance-1", GIB, [Allocation(UUID, NvdimmSpec(0, path, 6 * GIB))])
    assert [each.domain for each in host.find("6GB:ns0")] == [UUID]


def test_names_are_in_pools_and_pools_before_names(host: Host) -> None:
    paths = [host.add("main/a"), host.add("other/a"), host.add("other/b"), host.add("dev/pmem2")]
    found = host.find("X:main/a|other/a|b|pmem2")
    assert [each.path for each in found] == paths
    assert [each.pool for each in found] == ["main", "other", "other", "raw"]
    assert [each.name for each in found] == ["main/a", "other/a", "b", "pmem2"], "as they are configured"


def test_a_file_that_a_user_makes_in_another_pool_does_not_matter_to_a_name_with_its_pool(host: Host) -> None:
    host.add("main/ns0")
    before = host.find("6GB:main/ns0")
    host.add("other/ns0")
    assert host.find("6GB:main/ns0") == before
    with pytest.raises(ConfigError, match="ns0 is ambiguous"):
        host.find("6GB:ns0")


def test_what_is_too_large_by_a_part_of_the_alignsize_is_not_all_used(host: Host) -> None:
    host.add("main/a", 6 * GIB + 4096)
    host.add("other/b", 6 * GIB + 4 * MIB)
    assert [each.size for each in host.find("X:a|b")] == [6 * GIB, 6 * GIB]


@pytest.mark.parametrize(
    ("entry", "kind", "says"),
    [
        ("X:none", NotFoundError, "there is no none in any of the pools main, other, raw"),
        ("X:main/b", NotFoundError, "there is no b in pool main"),
        ("X:nopool/a", NotFoundError, "no pool 'nopool'"),
        ("X:a", ConfigError, "/main/a or "),
        ("X:main/sub/a", ConfigError, "neither a name in a pool nor POOL/NAME"),
        ("X:..", ConfigError, "neither a name in a pool nor POOL/NAME"),
        ("X:main/", ConfigError, "neither a name in a pool nor POOL/NAME"),
        ("X:b|other/b", ConfigError, "b and other/b are both"),
        ("X:small", BackingError, "/main/small: is too small for Nova"),
        ("X:holes", BackingError, "/main/holes: is not provisioned: 4 KiB still to be written"),
    ],
)
def test_what_nova_cannot_have_is_an_error(host: Host, entry: str, kind: type[NvdimmError], says: str) -> None:
    for path in ("main/a", "other/a", "other/b", "main/holes"):
        host.add(path)
    host.add("main/small", 2 * MIB)
    host.backing.unwritten[f"{host.folder}/main/holes"] = 4096
    with pytest.raises(kind) as caught:
        host.find(entry)
    assert says in caught.value.message
    assert caught.value.hint


def test_without_pools_it_says_how_one_is_made(host: Host) -> None:
    host.pools = []
    with pytest.raises(NotFoundError, match=r"none is configured.*'nvdimmctl pool create'"):
        host.find("X:a")


def test_labels_that_nobody_could_serve_are_found_early(host: Host) -> None:
    """Nova gives every NVDIMM a label area."""
    host.add("dev/pmem1")
    host.find("X:pmem1")
    with pytest.raises(UnsupportedError, match="no label server"):
        host.find("X:pmem1", served=True)


def test_a_link_to_another_is_found(host: Host) -> None:
    host.add("main/a")
    link = Path(host.add("other/b"))
    link.symlink_to(host.folder / "main/a")
    with pytest.raises(ConfigError, match="a and b are both"):
        host.find("X:a|b")


def test_what_domain_xml_of_nova_has() -> None:
    """nova/virt/libvirt/config.py: LibvirtConfigGuestVPMEM; tests/data/nova/domain.xml has it as it came from Nova."""
    emitted = (Path(__file__).parents[1] / "data/nova/domain.xml").read_text()
    assert f"<size>{pmem_namespaces.LABEL_SIZE // KIB}</size>\n        </label>" in emitted
