# SPDX-License-Identifier: Apache-2.0
"""Base of the tests of the compute driver."""

from __future__ import annotations

from typing import Any

import os_vif
from nova import context, objects, test
from nova.network import model as network_model
from nova.tests.unit import fake_instance
from nova.virt import nvdimm_ext

UUID = "7c7b0e2e-4a6e-4f0e-9a3b-0000000000aa"
IMAGE = "70a599e0-31e7-49b7-b260-868f441e862b"
PORT = "3a08dba0-acc9-4a2d-b13d-566faec1bc3f"
NODE = "11111111-2222-3333-4444-555555555555"
HOST = "xen1"
NO_DISKS: dict[str, Any] = {
    "root_device_name": None,
    "block_device_mapping": [],
    "swap": None,
    "ephemerals": [],
    "image": [],
}


class DriverTest(test.NoDBTestCase):
    """nova's configuration for a Xen host."""

    def setUp(self) -> None:
        super().setUp()
        self.context = context.get_admin_context()
        self.flags(host=HOST, compute_driver="nvdimm_ext.XenLibvirtDriver")
        self.flags(virt_type="xen", group="libvirt")
        os_vif.initialize()

    def _clear_attrs(self) -> None:
        """pytest 9 reads the attributes of a test after its cleanups; ``nova.test.TestCase`` deletes them."""

    def make_driver(self, pmem_namespaces: list[str]) -> nvdimm_ext.XenLibvirtDriver:
        self.flags(pmem_namespaces=pmem_namespaces, group="libvirt")
        return nvdimm_ext.XenLibvirtDriver(None)


def make_flavor(pmem: str) -> objects.Flavor:
    return objects.Flavor(
        id=1,
        name="pmem.small",
        flavorid="pmem.small",
        memory_mb=512,
        vcpus=1,
        root_gb=1,
        ephemeral_gb=0,
        swap=0,
        extra_specs={"hw:pmem": pmem} if pmem else {},
    )


def make_instance(pmem: str, resources: list[Any], **fields: Any) -> objects.Instance:
    """An instance that has been claimed on the host, to the extent that drivers look at it."""
    given: dict[str, Any] = {"host": HOST, "task_state": None, "deleted": False, "vm_mode": None, "os_type": None}
    instance = fake_instance.fake_instance_obj(
        context.get_admin_context(),
        id=1,
        uuid=UUID,
        display_name="db 1",
        image_ref=IMAGE,
        kernel_id="",
        ramdisk_id="",
        root_gb=1,
        ephemeral_gb=0,
        **(given | fields),
    )
    instance.flavor = make_flavor(pmem)
    instance.resources = objects.ResourceList(objects=resources)
    instance.pci_devices = objects.PciDeviceList(objects=[])
    instance.pci_requests = objects.InstancePCIRequests(requests=[])
    instance.system_metadata = {}
    for name in ("migration_context", "numa_topology", "vcpu_model", "trusted_certs", "device_metadata"):
        setattr(instance, name, None)
    return instance


def make_image(**properties: str) -> objects.ImageMeta:
    properties = {"hw_architecture": "x86_64", **properties}
    return objects.ImageMeta.from_dict(
        {"id": IMAGE, "name": "debian", "disk_format": "qcow2", "properties": properties}
    )


def make_network() -> network_model.NetworkInfo:
    network = network_model.Network(id=PORT, bridge="br-int", subnets=[])
    vif = network_model.VIF(
        id=PORT, address="fa:16:3e:00:00:01", type="ovs", ovs_interfaceid=PORT, devname="tap1", network=network
    )
    return network_model.NetworkInfo([vif])
