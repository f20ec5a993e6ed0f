# SPDX-License-Identifier: Apache-2.0
"""What nova-compute logs at its start of namespaces that no instance can have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from nova import exception, objects

from nvdimm_driver.nova.compute.strangers import tell_of_strangers
from tests.nova.driver.base import HOST, UUID

ROWS = [
    {"Name": "ns0", "Path": "/mnt/pmem0/ns0", "Domain": UUID},
    {"Name": "ns1", "Path": "/mnt/pmem0/ns1", "Domain": ""},
]


def told(monkeypatch: pytest.MonkeyPatch, found: Any) -> list[str]:
    get = mock.Mock(side_effect=[found])
    monkeypatch.setattr(objects.Instance, "get_by_uuid", get)
    lines = list(tell_of_strangers(ROWS, HOST))
    ((context, uuid), _) = get.call_args
    assert (context.read_deleted, uuid) == ("yes", UUID)
    return lines


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (exception.InstanceNotFound(instance_id=UUID), "which Nova does not know"),
        (SimpleNamespace(deleted=True, host=HOST), "which Nova has deleted"),
        (SimpleNamespace(deleted=False, host="xen2"), "which Nova has on xen2"),
        (SimpleNamespace(deleted=False, host=None), "which Nova has on no host"),
    ],
)
def test_a_claim_of_no_instance_here_is_told(monkeypatch: pytest.MonkeyPatch, found: Any, why: str) -> None:
    (line,) = told(monkeypatch, found)
    assert line.startswith(f"No instance can have namespace ns0: /mnt/pmem0/ns0 belongs to domain {UUID}, {why}. ")
    assert line.endswith(f"'nvdimmctl wipe {UUID}', then 'nvdimmctl release {UUID}'")


def test_that_of_an_instance_here_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, SimpleNamespace(deleted=False, host=HOST)) == []
