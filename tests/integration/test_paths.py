# SPDX-License-Identifier: Apache-2.0
"""What a user can put at a backing's path, or in the way to it, on real ext4 and XFS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.errors import InUseError, RefusedError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty
from tests.unit.doubles import OTHER_UUID


@pytest.fixture(scope="module")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FileSystem]]:
    mounted = {kind: FileSystem(tmp_path_factory.mktemp(kind), kind) for kind in MKFS}
    yield mounted
    for each in mounted.values():
        run("umount", each.root)


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def mallory(path: str | Path) -> DomainSpec:
    """Return the domain of a user who may define domains and owns folders, in the pool too."""
    return DomainSpec("mallory", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, str(path), SIZE),))


# --- the way in: paths are resolved once ---


@pytest.mark.parametrize(
    "path",
    [
        "{link}/own.img",
        "{pool}/folder/link.img",
        "{pool}/folder/../folder/own.img",
        "/{pool}//folder///own.img",
        "{pool}/folder/./own.img",
        "/proc/self/root{pool}/folder/own.img",
        "/proc/self/cwd/own.img",
    ],
)
def test_the_ledger_has_what_a_path_led_to_when_it_was_defined(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    folder = Path(host.path("folder"))
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    if path.endswith("link.img"):
        (folder / "own.img").write_bytes(DATA)
        (folder / "link.img").symlink_to("own.img")
    monkeypatch.chdir(folder)
    host.driver.define(mallory(path.format(link=link, pool=host.fs.root)))
    (item,) = host.record(OTHER_UUID).allocations
    assert item.spec.path == f"{folder}/own.img"
    assert item.identity
    link.unlink()
    link.symlink_to("/etc")
    monkeypatch.chdir("/")
    host.driver.prepare(host.domain("folder/own.img", OTHER_UUID))


@pytest.mark.parametrize("way", ["link", "..", "/proc/self/root"])
def test_a_path_that_leads_out_of_the_pools_is_refused(host: Host, tmp_path: Path, way: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(DATA)
    Path(host.path("link")).symlink_to(victim)
    up = "/.." * host.path("").count("/")
    path = {
        "link": host.path("link"),
        "..": f"{host.fs.root}{up}{victim}",
        "/proc/self/root": f"/proc/self/root{victim}",
    }
    with pytest.raises(RefusedError, match="victim is in none of the host's pools"):
        host.driver.define(mallory(path[way]))
    assert host.driver.ledger.find_domain(OTHER_UUID) is None


@pytest.mark.parametrize("way", ["link", "prefix", ".."])
def test_another_domains_file_is_refused_whatever_its_path(host: Host, tmp_path: Path, way: str) -> None:
    host.define("a.img")
    (tmp_path / "link").symlink_to(host.path("a.img"))
    (tmp_path / "prefix").symlink_to(host.fs.root)
    Path(host.path("folder")).mkdir()
    path = {"link": f"{tmp_path}/link", "prefix": f"{tmp_path}/prefix/a.img", "..": host.path("folder/../a.img")}[way]
    with pytest.raises(InUseError, match=r"a\.img belongs to domain x"):
        host.driver.define(mallory(path))
