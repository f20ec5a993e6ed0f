# SPDX-License-Identifier: Apache-2.0
"""A resize to another cell, which the policy compute:servers:resize:cross_cell lets somebody do: off by default."""

from __future__ import annotations

import os

import pytest
from nova.policies import servers as servers_policies

from tests.nova.functional.base import NovaTestBase

pytestmark = pytest.mark.thorough

DATA = b"the guest's data"


class CrossCellTest(NovaTestBase):
    LEDGERS = (("one",), ("two",))
    NUMBER_OF_CELLS = 2

    def setUp(self) -> None:
        super().setUp()
        self.policy.set_rules({servers_policies.CROSS_CELL_RESIZE: "@"}, overwrite=False)
        self.flags(pmem_namespaces="6GB:ns0", group="libvirt")
        for pmem, host in zip(self._pmems, ("one", "two"), strict=True):
            pmem.provision(host, "ns0")
        self.begin("one", "cell1")

    def begin(self, host: str, cell: str) -> None:
        os.environ["PATH"] = f"{self.pmem_of(host).bin}:{self._search_path}"
        self.start_compute(host, cell_name=cell)

    def test_it_is_refused_and_the_instance_goes_on(self) -> None:
        server = self.create(self.make_flavor("6GB"))
        self.pmem.write("one", "ns0", DATA)
        self.begin("two", "cell2")
        more = self._create_flavor(memory_mb=1024, vcpu=1, disk=1, ephemeral=0, extra_spec={"hw:pmem": "6GB"})
        self.api.post_server_action(server["id"], {"resize": {"flavorRef": more}})
        self.wait_until(lambda: self.api.get_server(server["id"])["OS-EXT-STS:task_state"] is None)
        found = self.api.get_server(server["id"])
        assert (found["status"], found["OS-EXT-SRV-ATTR:host"]) == ("ACTIVE", "one"), found
        assert self.pmem.read("one", "ns0").startswith(DATA)
        assert list(self.pmem.claimed().values()) == [server["id"]]
