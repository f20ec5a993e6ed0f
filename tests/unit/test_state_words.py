# SPDX-License-Identifier: Apache-2.0
"""Words that name domains, also those of users who name their domains after others."""

from __future__ import annotations

import shlex

import pytest

from nvdimm_driver.errors import NotFoundError, UsageError
from nvdimm_driver.model import Record, Start
from nvdimm_driver.state.words import find_named, find_with_slot, word_for
from tests.unit.doubles import OTHER_UUID, UUID

GONE = "7c7b0e2e-4a6e-4f0e-9a3b-000000000009"


def domain(name: str, uuid: str = UUID, domid: int | None = None) -> Record:
    start = None if domid is None else Start(uuid, "mapped", domid, "b", 0, ())
    return Record(uuid, name, 0, None, "", (), start)


@pytest.mark.parametrize("word", [UUID, UUID.upper(), UUID.replace("-", "")])
def test_a_uuid_is_never_the_name_of_another(word: str) -> None:
    records = (domain(word, OTHER_UUID), domain("victim"))
    for order in (records, records[::-1]):
        assert find_named(order, word).name == "victim"
        assert find_with_slot(order, f"{word}:3") == (records[1], 3)
    with pytest.raises(NotFoundError):
        find_named(records[:1], word)


def test_a_domain_by_name_or_id() -> None:
    records = (domain("db1", domid=7), domain("None", OTHER_UUID))
    assert find_named(records, "db1") == find_named(records, "7") == records[0]
    assert find_named(records, "None") == records[1]
    for word in ("db2", "8", GONE, ""):
        with pytest.raises(NotFoundError, match="no domain"):
            find_named(records, word)


@pytest.mark.parametrize("name", ["db1", "7"])
def test_a_word_for_two_domains_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"2 domains: {UUID} \(named db1\), {OTHER_UUID} \(named {name}\)"):
        find_named((domain("db1", domid=7), domain(name, OTHER_UUID)), name)


def test_a_domain_with_a_slot() -> None:
    one, other = domain("db1"), domain("db1:0", OTHER_UUID)
    assert find_with_slot((one,), "db1") == (one, None)
    assert find_with_slot((one,), "db1:0") == (one, 0)
    assert find_with_slot((other,), "db1:0") == (other, None)
    assert find_with_slot((one, other), "db1:1") == (one, 1)
    with pytest.raises(UsageError, match="'db1:0' is a domain, and a slot of domain db1"):
        find_with_slot((one, other), "db1:0")
    with pytest.raises(NotFoundError, match="no domain 'db2'"):
        find_with_slot((one,), "db2:0")


@pytest.mark.parametrize("name", ["db1", "a b", "7", UUID, UUID.upper(), "-y", "/mnt/a", "db1:0", "ü'"])
def test_what_a_hint_says_names_that_domain(name: str) -> None:
    records = (domain("db1", OTHER_UUID, domid=7), domain(name, GONE))
    (word,) = shlex.split(word_for(name, GONE))
    if name != "db1":
        assert find_named(records, word).uuid == GONE
    assert word in (GONE, name)
    assert not word.startswith(("-", "/"))
