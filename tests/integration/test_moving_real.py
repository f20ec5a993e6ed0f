# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs that go from one host to another as a stream: from real ext4 to real XFS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from random import Random
from typing import Any
from unittest import mock

import pytest

from nvdimm_driver.contents import copying, streams
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, NvdimmError, RefusedError
from nvdimm_driver.model import MIB
from tests.integration.crash_world import LABEL, SIZE, World, X, quiet, quietly
from tests.integration.loop_pmem import FileSystem
from tests.integration.test_crash_walk import DOMID

MAGIC = b"nvdimm_driver stream 1\n"


@pytest.fixture(scope="module")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FileSystem, FileSystem]]:
    one, other = (FileSystem(tmp_path_factory.mktemp(kind), kind) for kind in ("ext4", "xfs"))
    yield one, other
    one.close()
    other.close()


@pytest.fixture
def here(file_systems: tuple[FileSystem, FileSystem]) -> World:
    """The host with a domain of two NVDIMMs, the first with bytes in its first half and labels."""
    world = World(file_systems[0].memory / "state", file_systems[0])
    world.reset()
    world.do(partial(world.define, world.domain(X, "x0", "x1")))
    write(world, "x0", 0, b"x0's own bytes".ljust(MIB, b"."))
    write(world, "x0", SIZE - LABEL, b"labels")
    write(world, "x1", MIB, b"x1's own bytes")
    return world


@pytest.fixture
def there(file_systems: tuple[FileSystem, FileSystem]) -> World:
    world = World(file_systems[1].memory / "state", file_systems[1])
    world.reset()
    return world


def write(world: World, name: str, offset: int, content: bytes) -> None:
    with open(world.path(name), "r+b") as file:
        file.seek(offset)
        file.write(content)


def sent(world: World, *names: str, running: bool = False, have: Sequence[str] = ()) -> bytes:
    """Return the stream of the domain's NVDIMMs."""
    out = BytesIO()

    def send(driver: XenNvdimmDriver) -> None:
        record = driver.ledger.find_domain(X)
        assert record
        items = [item for item in record.allocations if os.path.basename(item.spec.path) in names]
        driver.exporter.send([(item.spec, item) for item in items], out, quiet, running=running, have=have)

    world.do(send)
    return out.getvalue()


def received(world: World, stream: bytes) -> list[int | None]:
    """Receive a stream; return the slots of its NVDIMMs."""

    def receive(driver: XenNvdimmDriver) -> list[int | None]:
        source = BytesIO(stream)
        nvdimms, is_whole = streams.read_header(source)
        paths = [world.path(each.name) for each in nvdimms]
        driver.importer.receive(source, nvdimms, paths, quietly, is_whole=is_whole)
        return [each.slot for each in nvdimms]

    return world.do(receive)


def sums(world: World, name: str) -> list[str]:
    return world.do(lambda driver: list(driver.importer.sums(world.path(name))))


def test_a_domain_that_has_run_meanwhile_does_not_arrive_in_part(here: World, there: World) -> None:
    """Its first NVDIMM would be of before the run, and the second of after it."""
    real, out = streams.write, BytesIO()
    calls: list[object] = []

    def runs_before_the_second(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) == 2:
            here.start(here.domain(X, "x0", "x1"), DOMID)
            here.xen().call("destroy", DOMID)
            here.do(lambda driver: driver.release(X))
        return real(*arguments)

    def send(driver: XenNvdimmDriver) -> None:
        record = driver.ledger.find_domain(X)
        assert record
        with mock.patch.object(streams, "write", runs_before_the_second):
            driver.exporter.send([(item.spec, item) for item in record.allocations], out, quiet, running=False)

    had = there.names()
    with pytest.raises(NvdimmError):
        here.do(send)
    with pytest.raises(NvdimmError):
        received(there, out.getvalue())
    assert {name for name in there.names() if not name.endswith(".partial")} == had


def test_what_is_behind_a_stream_is_not_dropped_without_a_word(here: World, there: World) -> None:
    stream = sent(here, "x0")
    with pytest.raises(BackingError, match="more comes than the stream says"):
        received(there, stream + stream)
    assert "x0" not in there.names()
    assert received(there, stream) == [0]


def test_what_is_gone_before_it_gets_its_name_has_not_come(here: World, there: World) -> None:
    stream, real = sent(here, "x0"), copying.verify

    def verify(*arguments: Any) -> None:
        real(*arguments)
        os.unlink(there.path(".x0.partial"))

    with mock.patch.object(copying, "verify", verify), pytest.raises(NotFoundError, match="is not there any more"):
        received(there, stream)
    assert "x0" not in there.names()


def test_a_domain_arrives_with_its_bytes_and_labels(here: World, there: World) -> None:
    stream = sent(here, "x0", "x1")
    assert len(stream) < SIZE + 2 * MIB, "zeros take no room"
    assert received(there, stream) == [0, 1]
    assert [there.content(name) for name in ("x0", "x1")] == [here.content(name) for name in ("x0", "x1")]
    there.do(partial(there.define, there.domain(X, "x0", "x1")))
    there.start(there.domain(X, "x0", "x1"), DOMID)
    assert there.repair() == []
    assert here.kept().keys() == {(X, "x0"), (X, "x1")}, "it keeps its own"


@pytest.mark.parametrize("seed", range(8))
def test_what_is_cut_off_goes_on_and_sends_only_the_rest(here: World, there: World, seed: int) -> None:
    stream = sent(here, "x0")
    end = Random(seed).randrange(len(stream) - 1)
    with pytest.raises((BackingError, RefusedError)):
        received(there, stream[:end])
    assert there.names() <= {".x0.partial"}
    rest = sent(here, "x0", have=sums(there, "x0"))
    assert len(rest) <= len(stream)
    received(there, rest)
    assert there.names() == {"x0"}
    assert there.content("x0") == here.content("x0")


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_that_is_turned_on_the_way_is_noticed(here: World, there: World, seed: int) -> None:
    stream = bytearray(sent(here, "x0"))
    stream[Random(seed).randrange(stream.index(b"\n", len(MAGIC)) + 1, len(stream))] ^= 1 << seed
    with pytest.raises(NvdimmError):
        received(there, bytes(stream))
    assert there.names() == {".x0.partial"}
    received(there, sent(here, "x0", have=sums(there, "x0")))
    assert there.content("x0") == here.content("x0")


def test_a_guest_is_off_for_what_it_has_changed_only(here: World, there: World) -> None:
    domain = here.domain(X, "x0", "x1")
    here.start(domain, DOMID)
    with pytest.raises(InUseError, match="send it while it changes with --running"):
        sent(here, "x0")
    received(there, sent(here, "x0", running=True))
    assert there.names() == {".x0.partial"}, "it waits for the rest"
    here.xen().call("destroy", DOMID)
    here.do(lambda driver: driver.release(X))
    write(here, "x0", SIZE - LABEL, b"newer")
    rest = sent(here, "x0", have=sums(there, "x0"))
    assert len(rest) < MIB + 1024
    received(there, rest)
    assert there.content("x0") == here.content("x0")


def test_a_guest_that_has_run_meanwhile_ends_the_stream(
    here: World, there: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streams.write

    def meanwhile(*rest: object) -> str:
        digest = whole(*rest)  # type: ignore[arg-type]
        here.start(here.domain(X, "x0", "x1"), DOMID)
        return digest

    monkeypatch.setattr(streams, "write", meanwhile)
    out = BytesIO()

    def send(driver: XenNvdimmDriver) -> None:
        record = driver.ledger.find_domain(X)
        assert record
        driver.exporter.send([(record.allocations[0].spec, record.allocations[0])], out, quiet, running=False)

    with pytest.raises(InUseError):
        here.do(send)
    with pytest.raises(BackingError, match="ended before all of it was there"):
        received(there, out.getvalue())
    assert there.names() == {".x0.partial"}


def test_nothing_that_is_there_is_overwritten(here: World, there: World) -> None:
    there.defined("x0")
    before, stream = there.content("x0"), sent(here, "x0")
    with pytest.raises(InUseError):
        received(there, stream)
    there.do(lambda driver: driver.forget(X))
    with pytest.raises(RefusedError, match="exists already"):
        received(there, stream)
    assert there.content("x0") == before


@pytest.mark.parametrize(
    "nvdimm",
    [
        {"name": "../x0"},
        {"name": "/etc/passwd"},
        {"name": ".."},
        {"name": ""},
        {"name": "a\nb"},
        {"name": 1},
        {"size": -SIZE},
        {"size": 0},
        {"size": 1 << 80},
        {"size": SIZE + 1},
        {"size": "2 MiB"},
        {"size": True},
        {"label_size": -1},
        {"label_size": SIZE},
        {"slot": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_another_host_is_not_trusted(there: World, nvdimm: dict[str, object]) -> None:
    known = {"name": "x0", "size": SIZE, "label_size": 0, "slot": 0}
    header = json.dumps({"whole": True, "nvdimms": [known | nvdimm]}).encode()
    with pytest.raises((RefusedError, BackingError)):
        received(there, MAGIC + header + b"\n" + b"Z" * 2)
    assert there.names() == set()


@pytest.mark.parametrize("stream", [b"", b"\n", MAGIC, MAGIC + b"{}\n", MAGIC + b"[" * 100_000, b"\x7fELF" * 1000])
def test_what_is_no_stream_is_refused(there: World, stream: bytes) -> None:
    with pytest.raises(RefusedError, match="stream"):
        received(there, stream)
    assert there.names() == set()
