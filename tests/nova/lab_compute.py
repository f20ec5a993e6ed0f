# SPDX-License-Identifier: Apache-2.0
"""nova's compute driver, told on stdin what to do: each line is an order, and has one line of JSON on stdout as answer.

Real: nova's libvirt driver with ours on top, its image cache, its objects in an SQLite database, libvirt-python, and
the nvdimmctl on PATH. Around it there is nothing: no Glance (the image is in the cache), no Neutron, no scheduler.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from nova import monkey_patch

monkey_patch.patch(backend="threading")

import nova.conf  # noqa: E402
import nova.privsep  # noqa: E402
from nova import config, context, objects  # noqa: E402
from nova.compute import task_states, vm_states  # noqa: E402
from nova.db import migration  # noqa: E402
from nova.network import model as network  # noqa: E402
from nova.virt import driver as virt_driver  # noqa: E402
from nova.virt import fake  # noqa: E402

IMAGE, KERNEL, RAMDISK = (f"{number:08x}-0000-4000-8000-000000000000" for number in range(1, 4))


class Compute:
    """A host with one instance at most."""

    def __init__(self) -> None:
        self.context = context.RequestContext("user", "project", is_admin=True, auth_token="token")
        self.driver = virt_driver.load_compute_driver(fake.FakeVirtAPI(), "nvdimm_ext.XenLibvirtDriver")
        self.driver.init_host(nova.conf.CONF.host)

    def inventory(self) -> dict[str, list[dict[str, Any]]]:
        """Return the namespaces of the host, by resource class."""
        found = self.driver._vpmems_by_rc
        return {
            name: [{"name": item.name, "path": item.devpath, "size": item.size} for item in items]
            for name, items in found.items()
        }

    def spawn(self, uuid: str, labels: str, names: list[str], ram_mib: int, command_line: str) -> str:
        """Start an instance that was given these namespaces; returns libvirt's name of it."""
        flavor = objects.Flavor(
            context=self.context,
            id=1,
            flavorid="pmem",
            name="pmem",
            memory_mb=ram_mib,
            vcpus=1,
            root_gb=0,
            ephemeral_gb=0,
            swap=0,
            extra_specs={"hw:pmem": labels},
        )
        self.instance = objects.Instance(
            context=self.context,
            uuid=uuid,
            user_id="user",
            project_id="project",
            display_name="pmem",
            host=nova.conf.CONF.host,
            node=nova.conf.CONF.host,
            compute_id=1,
            image_ref=IMAGE,
            kernel_id=KERNEL,
            ramdisk_id=RAMDISK,
            root_device_name=None,
            memory_mb=ram_mib,
            vcpus=1,
            root_gb=0,
            ephemeral_gb=0,
            vm_state=vm_states.BUILDING,
            task_state=task_states.SPAWNING,
            flavor=flavor,
            old_flavor=None,
            new_flavor=None,
            system_metadata={
                "image_disk_format": "raw",
                "image_container_format": "bare",
                "image_kernel_id": KERNEL,
                "image_ramdisk_id": RAMDISK,
                "image_os_command_line": command_line,
            },
            metadata={},
            info_cache=objects.InstanceInfoCache(context=self.context, network_info=network.NetworkInfo([])),
        )
        self.instance.create()
        self.instance.resources = self._resources(names)
        self.driver.spawn(
            self.context,
            self.instance,
            self.instance.image_meta,
            [],
            None,
            {},
            network_info=network.NetworkInfo([]),
            block_device_info=self._block_devices(),
        )
        self.instance.vm_state, self.instance.task_state = vm_states.ACTIVE, None
        self.instance.save()
        name: str = self.instance.name
        return name

    def hard_reboot(self) -> None:
        self.instance.task_state = task_states.REBOOTING_HARD
        self.driver.reboot(
            self.context, self.instance, network.NetworkInfo([]), "HARD", block_device_info=self._block_devices()
        )
        self.instance.task_state = None

    def delete(self) -> None:
        self.instance.task_state = task_states.DELETING
        self.driver.destroy(self.context, self.instance, network.NetworkInfo([]), self._block_devices())
        self.instance.destroy()

    def _block_devices(self) -> Any:
        return virt_driver.get_block_device_info(self.instance, objects.BlockDeviceMappingList(objects=[]))

    def _resources(self, names: list[str]) -> Any:
        """Return the resources that the resource tracker gives an instance when it is claimed."""
        found = {item.name: (name, item) for name, items in self.driver._vpmems_by_rc.items() for item in items}
        return objects.ResourceList(
            objects=[
                objects.Resource(
                    provider_uuid="00000000-0000-4000-8000-0000000000ff",
                    resource_class=found[name][0],
                    identifier=name,
                    metadata=found[name][1],
                )
                for name in names
            ]
        )


def main() -> None:
    objects.register_all()
    config.parse_args(sys.argv, init_rpc=False)
    nova.privsep.sys_admin_pctxt.set_client_mode(False)  # this process is root
    migration.db_sync()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what nova prints is no answer
    compute = Compute()
    print(json.dumps({"result": None}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(compute, order.pop("do"))(**order)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
