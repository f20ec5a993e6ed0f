# SPDX-License-Identifier: Apache-2.0
"""Which host an instance with ``hw:pmem`` gets, and which namespaces."""

from __future__ import annotations

from typing import Any

import eventlet
from nova.scheduler.filters.numa_topology_filter import NUMATopologyFilter

from nvdimm_driver.xml.parse_domain import extract
from tests.nova.functional.base import NovaTestBase


class SchedulingTest(NovaTestBase):
    """Two hosts: the first with two small namespaces, the second with one of them and a large one."""

    def setUp(self) -> None:
        super().setUp()
        self.pmem.provision("one", "ns0", "ns1")
        self.pmem.provision("two", "ns0")
        self.pmem.provision("two", "ns1", size="32M")
        self.start_host("one", "6GB:one/ns0|one/ns1")
        self.start_host("two", "6GB:two/ns0,16GB:two/ns1")

    def host_of(self, server: dict[str, Any]) -> str:
        host: str = server["OS-EXT-SRV-ATTR:host"]
        return host

    def test_placement_knows_what_each_host_has(self) -> None:
        assert self.inventory("one") == {"6GB": 2}
        assert self.inventory("two") == {"6GB": 1, "16GB": 1}

    def test_an_instance_gets_the_host_that_has_it(self) -> None:
        server = self.create(self.make_flavor("16GB"))
        assert self.host_of(server) == "two"
        assert self.usage("two") == {"6GB": 0, "16GB": 1}
        assert self.pmem.claimed() == {str(self.pmem.path("two", "ns1")): server["id"]}
        assert self.pmem.running() == {server["id"]}

    def test_several_namespaces_of_one_host_in_the_order_of_the_flavor(self) -> None:
        server = self.create(self.make_flavor("16GB,6GB"))
        assert self.paths(server) == [str(self.pmem.path("two", "ns1")), str(self.pmem.path("two", "ns0"))]
        assert self.usage("two") == {"6GB": 1, "16GB": 1}

    def test_none_is_left(self) -> None:
        flavor = self.make_flavor("16GB")
        self.create(flavor)
        refused = self.create(flavor, "ERROR")
        assert refused["fault"]["message"] == "No valid host was found. "
        assert len(self.pmem.claimed()) == 1

    def test_no_host_has_them_all(self) -> None:
        refused = self.create(self.make_flavor("6GB,6GB,16GB"), "ERROR")
        assert refused["fault"]["message"] == "No valid host was found. "
        assert self.pmem.claimed() == {}

    def test_concurrent_creates_share_nothing(self) -> None:
        request = self._build_server(flavor_id=self.make_flavor("6GB"), image_uuid=self.IMAGE, networks="none")
        posted = list(eventlet.GreenPool().imap(self.api.post_server, [{"server": request}] * 6))
        servers = [self.settled(each["id"]) for each in posted]
        got = [path for each in servers if each["status"] == "ACTIVE" for path in self.paths(each)]
        assert sorted(got) == sorted(
            str(self.pmem.path(*place)) for place in (("one", "ns0"), ("one", "ns1"), ("two", "ns0"))
        )
        assert [each["status"] for each in servers].count("ERROR") == 3
        assert sorted(self.pmem.claimed()) == sorted(got)

    def test_a_trait_finds_the_hosts_of_this_driver(self) -> None:
        assert "CUSTOM_XEN_NVDIMM" in self._get_provider_traits(self.compute_rp_uuids["one"])
        spec = {"hw:pmem": "6GB", "trait:CUSTOM_XEN_NVDIMM": "required"}
        self.create(self._create_flavor(memory_mb=512, vcpu=1, disk=1, ephemeral=0, extra_spec=spec))

    def test_the_xml_is_what_our_define_accepts(self) -> None:
        server = self.create(self.make_flavor("6GB,16GB"))
        domain = extract(self.xml(server))
        assert domain is not None
        assert domain.ram == 512 << 20
        assert [(spec.size, spec.label_size) for spec in domain.nvdimms] == [(16 << 20, 2 << 20), (32 << 20, 2 << 20)]


class NumaFilterTest(NovaTestBase):
    """NUMATopologyFilter: every flavor with ``hw:pmem`` asks for one NUMA cell, which no host of ours offers."""

    ADDITIONAL_FILTERS = (NUMATopologyFilter.__name__,)

    def test_it_refuses_every_host(self) -> None:
        self.pmem.provision("one", "ns0")
        self.start_host("one", "6GB:one/ns0")
        self.create(self.make_flavor("6GB"), "ERROR")
        self._wait_for_log("Filter NUMATopologyFilter returned 0 hosts")
        assert self.pmem.claimed() == {}
