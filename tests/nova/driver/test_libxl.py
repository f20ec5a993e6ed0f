# SPDX-License-Identifier: Apache-2.0
"""The driver on the real libvirtd and its real libxl driver, through nvdimmd, with the real nvdimmctl: what libxl
answers, and what comes of an instance's domain. What stands in for the rest is told in bench_host.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import libvirt
import pytest
from lxml import etree
from nova import objects
from nova.compute import provider_tree, task_states
from nova.virt.libvirt import blockinfo

from nvdimm_driver.state.ledger import Ledger
from tests.integration.bench_host import NVDIMMCTL, Host
from tests.nova.driver.base import HOST, NO_DISKS, NODE, UUID, DriverTest, make_image, make_instance, make_network

EMITTED = Path(__file__).parents[2] / "data/nova/domain.xml"
VARIES = re.compile(r'<nova:package version=".*"/>|<nova:creationTime>.*</nova:creationTime>')
NAMESPACES = ["6GB:ns0", "16GB:main/ns1"]
SIZES = {"ns0": 6 << 20, "ns1": 16 << 20}
POOL = "[pool:main]\nkind = bench\npaths = {folder}/pmem\n"
COMMAND = """#!/bin/sh
exec {inside} env HOME={home} LD_LIBRARY_PATH={libraries} {python} -I -c '{code}' "$@"
"""


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with a pool and two namespaces in it, and nvdimmctl as nova-compute finds it."""
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
        conf.write_text(conf.read_text().replace("allow_any_path=true\n", "") + POOL.format(folder=host.folder))
        host.libvirtd.end("nvdimmd")
        host.start_nvdimmd()
        program = host.folder / "bin/nvdimmctl"
        program.parent.mkdir()
        program.write_text(
            COMMAND.format(
                inside=" ".join(host.libvirtd._inside()),
                home=host.libvirtd.folder / "home",
                libraries=host.libvirtd.folder / "xen-libraries",
                python=host.folder / "python/bin/python",
                code=NVDIMMCTL,
            )
        )
        program.chmod(0o755)
        yield host
    finally:
        host.libvirtd.close()


class LibxlTest(DriverTest):
    """nova-compute has been started."""

    @pytest.fixture(autouse=True)
    def _use_host(self, shared_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.bench = shared_host
        self.instances = tmp_path
        monkeypatch.setenv("PATH", f"{shared_host.folder}/bin:{os.environ['PATH']}")
        for name, size in SIZES.items():
            done = self.bench.nvdimmctl("provision", "--pool", "main", name, "--size", str(size))
            assert done.returncode == 0, done.stderr
        yield
        self.bench.clean()
        for name in self.bench.check("list", "--all", "--name").split():
            if name != "Domain-0":
                self.bench.check("undefine", name)
        for row in self.bench.nvdimmctl("list", "-f", "value", "-c", "Domain").stdout.split():
            self.bench.nvdimmctl("release", "--yes", row)
        self.bench.libvirtd.run("sh", "-c", f"rm -f {self.bench.folder}/pmem/ns*")

    def setUp(self) -> None:
        super().setUp()
        socket = self.bench.libvirtd.folder / "run/libvirt/virtxend-sock"
        self.flags(connection_uri=f"xen+unix:///system?socket={socket}", group="libvirt")
        self.flags(instances_path=str(self.instances))
        self.driver = self.make_driver(NAMESPACES)
        # What Nova's tests forbid: the thread that takes libvirt's events, the file with the host's uuid, and a look
        # at the host's addresses.
        forbidden = (self.driver._host, "_init_events"), (self.driver._host, "get_node_uuid")
        for where, name in (*forbidden, (self.driver, "_check_my_ip")):
            patch = mock.patch.object(where, name, return_value=NODE)
            patch.start()
            self.addCleanup(patch.stop)
        self.driver.init_host(HOST)

    def report(self) -> Any:
        """Return the inventory that placement gets."""
        tree = provider_tree.ProviderTree()
        tree.new_root(HOST, NODE, generation=0)
        self.driver.update_provider_tree(tree, HOST, allocations={})
        return tree.data(HOST)

    def instance(self, pmem: str = "6GB,16GB", **fields: Any) -> objects.Instance:
        """One that has all namespaces, as the claim gives them to it."""
        resources = [each for found in self.report().resources.values() for each in found]
        return make_instance(pmem, resources if pmem else [], **fields)

    def xml(self, instance: objects.Instance, **properties: str) -> str:
        image = make_image(**properties)
        disks = blockinfo.get_disk_info("xen", instance, image, NO_DISKS)
        xml: str = self.driver._get_guest_xml(
            self.context, instance, make_network(), disks, image, block_device_info=NO_DISKS
        )
        return xml

    def spawn(self, instance: objects.Instance) -> None:
        """Start it, without its disk and its network, which are not here."""
        self.driver._create_guest(self.context, self.xml(instance), instance)

    def destroy(self, instance: objects.Instance, *, disks: bool) -> None:
        with mock.patch.object(self.driver, "_unplug_vifs"), mock.patch.object(instance, "save"):
            self.driver.destroy(self.context, instance, make_network(), NO_DISKS, destroy_disks=disks)

    def path(self, name: str) -> str:
        return f"{self.bench.folder}/pmem/{name}"

    def write(self, name: str) -> None:
        """The guest has written to its persistent memory; here, to the file while it is off."""
        self.bench.libvirtd.run("sh", "-c", f"printf data | dd of={self.path(name)} conv=notrunc status=none")

    def content(self, name: str) -> bytes:
        done = self.bench.libvirtd.run("head", "-c", "4", self.path(name))
        return done.stdout.encode()

    def owners(self) -> dict[str, str]:
        """Names of the namespaces that the ledger has, and the instances that have them."""
        ledger = Ledger(f"{self.bench.folder}/state/ledger.sqlite")
        found = {Path(item.spec.path).name: record.uuid for record in ledger.domains() for item in record.allocations}
        ledger.close()
        return found

    def is_frozen(self, name: str) -> bool:
        return "i" in self.bench.libvirtd.run("lsattr", self.path(name)).stdout.split()[0]


class HostTest(LibxlTest):
    """libxl's errors, and what Nova makes of them."""

    def test_what_hosts_are_made_of(self) -> None:
        found = self.driver.get_available_resource(HOST)
        assert found["hypervisor_type"] == "Xen"
        assert found["hypervisor_version"] == 4017000
        assert found["vcpus"] == 4, "libxl has no virNodeGetCPUMap"
        assert found["memory_mb"] == 4096
        assert found["memory_mb_used"] == 1024, "Dom0's"
        assert found["numa_topology"] is None
        modes = {mode for _, virt, mode in found["supported_instances"] if virt == "xen"}
        assert modes == {"xen", "hvm"}, "Nova has no name for PVH"

    def test_dom0_is_no_instance(self) -> None:
        assert self.bench.check("list", "--name").split() == ["Domain-0"]
        assert self.driver.list_instances() == []
        assert self.driver.list_instance_uuids() == []
        assert self.driver.get_num_instances() == 0

    def test_memory_of_guests_counts(self) -> None:
        self.spawn(self.instance())
        assert self.driver._host.get_memory_mb_used() == 1024 + 512

    def test_domain_capabilities_are_those_of_xens_machines(self) -> None:
        found = self.driver._host.get_domain_capabilities()
        assert set(found["x86_64"]) == {"xenpv", "xenfv"}
        assert set(found["i686"]) == {"xenfv"}

    def test_numa_is_not_reported(self) -> None:
        """NUMATopologyFilter and claims would then want pages and cells for hw:pmem, which libxl does not tell."""
        assert not self.driver._has_numa_support()

    def test_what_placement_is_told(self) -> None:
        found = self.report()
        amounts = {name: each["total"] for name, each in found.inventory.items() if "PMEM" in name}
        assert amounts == {"CUSTOM_PMEM_NAMESPACE_6GB": 1, "CUSTOM_PMEM_NAMESPACE_16GB": 1}
        has = {"CUSTOM_XEN_NVDIMM", "COMPUTE_STORAGE_BUS_XEN", "COMPUTE_NET_VIF_MODEL_NETFRONT"}
        assert has | {"COMPUTE_GRAPHICS_MODEL_VGA"} <= found.traits
        assert not {"COMPUTE_STORAGE_BUS_VIRTIO", "COMPUTE_NET_VIF_MODEL_VIRTIO"} & found.traits

    def test_a_restart_with_a_running_instance_tells_the_same(self) -> None:
        """Else nova-compute would not start: AssignedResourceNotFound."""
        before = self.report().resources
        self.spawn(self.instance())
        assert self.is_frozen("ns0")
        self.driver = self.make_driver(NAMESPACES)
        with mock.patch.object(self.driver._host, "get_node_uuid", return_value=NODE):
            assert self.report().resources == before


class XmlTest(LibxlTest):
    """The domain XML that Nova makes."""

    def test_what_libxl_needs_is_there_and_what_it_refuses_is_not(self) -> None:
        domain = etree.fromstring(self.xml(self.instance()))
        assert domain.xpath("string(@type)") == "xen"
        assert domain.xpath("count(features/acpi)") == 1
        assert domain.xpath("count(features/apic)") == 1
        assert domain.xpath("count(iothreads | cpu/numa)") == 0
        assert domain.xpath("string(memory)") == str(512 << 10)
        assert domain.xpath("string(devices/video/model/@type)") == "vga"
        assert domain.xpath("string(devices/disk/target/@dev)") == "xvda"
        assert domain.xpath("string(devices/disk/target/@bus)") == "xen"
        assert domain.xpath("string(devices/disk/driver/@name)") == "qemu", "libxl takes it for raw otherwise"

    def test_it_is_what_the_file_has_that_the_drivers_own_tests_read(self) -> None:
        """``NOVA_XML=write`` writes the file anew."""
        for name, path, size in (("ns0", "/mnt/pmem0/ns0", 6 << 30), ("main/ns1", "/dev/dax0.0", 16 << 30)):
            namespace = self.driver._vpmems_by_name[name]
            namespace.devpath, namespace.size = path, size
        instance = self.instance()
        self.flags(instances_path="/var/lib/nova/instances")
        emitted = self.xml(instance)
        if os.environ.get("NOVA_XML") == "write":
            EMITTED.write_text(emitted)
        then, now = (VARIES.sub("", text) for text in (EMITTED.read_text(), emitted))
        assert now == then

    def test_an_image_may_choose_the_video_model(self) -> None:
        domain = etree.fromstring(self.xml(self.instance(), hw_video_model="cirrus"))
        assert domain.xpath("string(devices/video/model/@type)") == "cirrus"

    def test_a_volume_names_its_driver_too(self) -> None:
        connection = {"driver_volume_type": "local", "data": {"device_path": "/dev/sdz"}}
        disk = self.driver._get_volume_config(connection, {"bus": "xen", "dev": "xvdb", "type": "disk"})
        assert disk.driver_name == "qemu"

    def test_it_is_defined_and_comes_back_as_libvirt_shows_it(self) -> None:
        xml = self.xml(self.instance())
        guest = self.driver._host.write_instance_config(xml)
        sent, shown = (etree.fromstring(each).findall("devices/memory") for each in (xml, guest.get_xml_desc()))
        for slot, each in enumerate(sent):
            etree.SubElement(each, "address", type="dimm", slot=str(slot))
            for size in each.iter("size", "alignsize"):
                size.set("unit", size.get("unit", "KiB"))
        assert [etree.tostring(each, method="c14n") for each in _stripped(sent)] == [
            etree.tostring(each, method="c14n") for each in _stripped(shown)
        ]
        assert "nvdimm-device-model" in self.bench.libvirtd.check("dumpxml", guest.name)
        assert self.owners() == {"ns0": UUID, "ns1": UUID}

    def test_an_instance_without_pmem(self) -> None:
        self.driver._host.write_instance_config(self.xml(self.instance("")))
        assert self.owners() == {}
        assert self.driver.list_instance_uuids() == [UUID]


class LifeTest(LibxlTest):
    """An instance's persistent memory through its life."""

    def test_a_guest_starts_and_has_it(self) -> None:
        instance = self.instance()
        self.spawn(instance)
        start = self.bench.record(instance.name).start
        assert start is not None
        assert start.state == "mapped"
        assert self.owners() == {"ns0": UUID, "ns1": UUID}

    def test_a_domain_that_is_started_again_keeps_it(self) -> None:
        """Hard reboot, power on and resume at host boot all do just this (LibvirtDriver._hard_reboot)."""
        instance = self.instance(task_state=task_states.REBOOT_STARTED_HARD)
        self.driver._host.write_instance_config(self.xml(instance))
        self.write("ns0")
        self.driver.get_info(instance)
        self.spawn(instance)
        self.destroy(instance, disks=False)
        assert self.driver.list_instances() == []
        assert self.content("ns0") == b"data"
        assert self.owners() == {"ns0": UUID, "ns1": UUID}
        self.spawn(instance)
        assert self.content("ns0") == b"data"

    def test_a_deleted_one_leaves_zeros_to_the_next(self) -> None:
        instance = self.instance(task_state=task_states.DELETING)
        self.driver._host.write_instance_config(self.xml(instance))
        self.write("ns0")
        self.spawn(instance)
        self.destroy(instance, disks=True)
        assert self.content("ns0") == bytes(4)
        assert self.owners() == {}
        other = self.instance()
        other.uuid = "7c7b0e2e-4a6e-4f0e-9a3b-0000000000bb"
        self.spawn(other)
        assert self.owners() == {"ns0": other.uuid, "ns1": other.uuid}

    def test_a_nova_compute_that_dies_in_a_deletion_does_it_again(self) -> None:
        instance = self.instance(task_state=task_states.DELETING)
        self.spawn(instance)
        with (
            mock.patch.object(self.driver, "_release", side_effect=SystemExit),
            pytest.raises(SystemExit),
        ):
            self.destroy(instance, disks=True)
        assert self.owners() == {"ns0": UUID, "ns1": UUID}
        for _ in range(2):
            self.destroy(instance, disks=True)
            assert self.owners() == {}

    def test_what_another_instance_has_is_refused(self) -> None:
        """Placement may be wrong about what is free: an instance was deleted in the database while its host was off."""
        self.spawn(self.instance())
        other = self.instance()
        other.uuid = "7c7b0e2e-4a6e-4f0e-9a3b-0000000000bb"
        with pytest.raises(libvirt.libvirtError, match="belongs to domain"):
            self.spawn(other)
        assert self.owners() == {"ns0": UUID, "ns1": UUID}


def _stripped(elements: list[Any]) -> list[Any]:
    """Without what indents them."""
    parser = etree.XMLParser(remove_blank_text=True)
    return [etree.fromstring(etree.tostring(each), parser) for each in elements]
