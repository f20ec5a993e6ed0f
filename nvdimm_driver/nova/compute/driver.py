"""Nova's libvirt driver, on Xen, with persistent memory from the operator's pools.

Each override says which method of Nova's it is, and why. Versions: Nova 34, libvirt 9.0 and later.
"""

from __future__ import annotations

import time
from typing import Any

import nova.conf
from nova import exception, objects
from nova.compute import task_states
from nova.virt import hardware
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import vif as libvirt_vif
from oslo_log import log as logging

from nvdimm_driver.nova.compute import command
from nvdimm_driver.nova.compute.host import XenHost
from nvdimm_driver.nova.compute.patches import accept_xen

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF
TRAIT = "CUSTOM_XEN_NVDIMM"
"""What placement knows a host by whose guests can have NVDIMMs on Xen."""
_REBUILDING = (task_states.REBUILDING, task_states.REBUILD_BLOCK_DEVICE_MAPPING, task_states.REBUILD_SPAWNING)

accept_xen()  # before anybody reads the options


class XenLibvirtDriver(driver.LibvirtDriver):
    """nova.virt.libvirt.driver.LibvirtDriver on Xen.

    :cvar DYING_SECONDS: how long a domain that was destroyed may need until Xen has it no more.
    """

    DYING_SECONDS = 30

    # LibvirtDriver.__init__ makes its own Host, and gives it to the driver of VIFs.
    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self._host = XenHost(
            self._uri(),
            read_only,
            lifecycle_event_handler=self.emit_event,
            conn_event_handler=self._handle_conn_event,
        )
        self.vif_driver = libvirt_vif.LibvirtGenericVIFDriver(self._host)

    # LibvirtDriver._uri: its default is qemu:///system.
    @staticmethod
    def _uri() -> str:
        return CONF.libvirt.connection_uri or "xen:///system"

    # LibvirtDriver.init_host: would go on with whatever nova.conf says, and fail later.
    def init_host(self, host: str) -> None:
        if CONF.libvirt.virt_type != "xen":
            raise exception.InvalidConfiguration(
                f"compute_driver is nvdimm_ext.XenLibvirtDriver, and [libvirt] virt_type is {CONF.libvirt.virt_type}: "
                "leave it out"
            )
        super().init_host(host)

    # LibvirtDriver._do_quality_warnings: would say that virt_type xen is deprecated and about to be removed.
    def _do_quality_warnings(self) -> None:
        pass

    # --- guests ---

    # LibvirtDriver._has_numa_support: with it, NUMATopologyFilter and claims would refuse every flavor that has
    # hw:pmem, in which Nova sees a wish for one NUMA cell, whose memory and pages a Xen host does not report.
    def _has_numa_support(self) -> bool:
        return False

    # LibvirtDriver._set_features: only qemu and kvm get ACPI and APIC there. Without ACPI a guest finds no NVDIMM.
    def _set_features(self, guest: Any, os_type: str, image_meta: Any, flavor: Any) -> None:
        super()._set_features(guest, os_type, image_meta, flavor)
        guest.add_feature(vconfig.LibvirtConfigGuestFeatureACPI())
        guest.add_feature(vconfig.LibvirtConfigGuestFeatureAPIC())

    # LibvirtDriver._get_guest_iothread: libxl refuses <iothreads>.
    def _get_guest_iothread(self) -> None:
        return None

    # LibvirtDriver._guest_add_usb_root_controller: where nothing needs USB, it says so with a model that
    # libxl refuses.
    def _guest_add_usb_root_controller(self, guest: Any, flavor: Any, image_meta: Any) -> None:
        if self._guest_needs_usb(guest, image_meta):
            super()._guest_add_usb_root_controller(guest, flavor, image_meta)

    # LibvirtDriver._get_video_type: its default, virtio, is QEMU's; libxl has vga, cirrus and xen.
    def _get_video_type(self, image_meta: Any) -> str:
        return image_meta.properties.get("hw_video_model") or "vga"

    # LibvirtDriver._get_guest_config: what only its pieces that are not methods decide.
    def _get_guest_config(self, *args: Any, **kwargs: Any) -> Any:
        guest = super()._get_guest_config(*args, **kwargs)
        for device in guest.devices:
            if isinstance(device, vconfig.LibvirtConfigGuestDisk):
                _name_disk_driver(device)
        return guest

    # LibvirtDriver._get_volume_config: of a disk that is attached.
    def _get_volume_config(self, connection_info: Any, disk_info: Any) -> Any:
        disk = super()._get_volume_config(connection_info, disk_info)
        _name_disk_driver(disk)
        return disk

    # --- what placement is told ---

    # LibvirtDriver.static_traits: Nova adds and removes these.
    @property
    def static_traits(self) -> dict[str, bool]:
        return {**super().static_traits, TRAIT: True}

    # LibvirtDriver._get_vpmems_on_host: asks ndctl, which knows of device-dax alone.
    def _get_vpmems_on_host(self) -> dict[str, Any]:
        try:
            found = command.rows("nova", "inventory", "--pmem-namespaces", ",".join(CONF.libvirt.pmem_namespaces))
        except command.CommandFailed as error:
            raise exception.GetPMEMNamespacesFailed(reason=str(error)) from error
        return {
            row["Name"]: objects.LibvirtVPMEMDevice(
                name=row["Name"], devpath=row["Path"], size=row["Size"], align=row["Align"]
            )
            for row in found
        }

    # --- the bytes of persistent memory ---

    # LibvirtDriver._get_ordered_vpmems: a label that a flavor writes otherwise than nova.conf is in the same resource
    # class and has its allocation; the instance would boot without the device.
    def _get_ordered_vpmems(self, instance: Any, flavor: Any) -> list[Any]:
        found: list[Any] = super()._get_ordered_vpmems(instance, flavor)
        labels = hardware.get_vpmems(flavor)
        if len(found) != len(labels):
            raise exception.InvalidInput(
                reason=f"flavor {flavor.name} asks for hw:pmem={','.join(labels)}, and instance {instance.uuid} has "
                f"{', '.join(f'{each.name} ({each.label})' for each in found) or 'none'}: write labels in the flavor "
                "as they are in [libvirt] pmem_namespaces of the host"
            )
        return found

    # LibvirtDriver._get_vpmems: raises KeyError for an instance that was evacuated from here: its resources are those
    # of its new host.
    def _get_vpmems(self, instance: Any, prefix: str | None = None) -> list[Any]:
        resources = self._get_vpmem_resources(self._get_resources(instance, prefix=prefix))
        names = [resource.identifier for resource in resources]
        return [self._vpmems_by_name[name] for name in names if name in self._vpmems_by_name]

    # LibvirtDriver._cleanup_vpmems: Nova zeroes here, also when an instance is only to be started again. What is
    # to be zeroed is known better by the ledger; _cleanup has it done when the instance goes.
    def _cleanup_vpmems(self, vpmems: list[Any]) -> None:
        del vpmems

    # LibvirtDriver._cleanup: the end of a domain, for one reason or another.
    def _cleanup(
        self, context: Any, instance: Any, network_info: Any, block_device_info: Any = None, **kwargs: Any
    ) -> None:
        goes = leaves_host(instance, CONF.host, destroys_disks=kwargs.get("cleanup_instance_disks", False))
        if goes:
            self._wipe(instance)
        super()._cleanup(context, instance, network_info, block_device_info, **kwargs)
        if goes:
            self._release(instance)

    # LibvirtDriver.cleanup_lingering_instance_resources: of an instance that was deleted while it moved.
    def cleanup_lingering_instance_resources(self, instance: Any) -> None:
        super().cleanup_lingering_instance_resources(instance)
        self._wipe(instance)
        self._release(instance)

    def _wipe(self, instance: Any) -> None:
        """Overwrite all that the ledger has of an instance. Can be repeated; nothing when it has none."""

        def tell(line: str) -> None:
            LOG.info("%s", line, instance=instance)

        last = time.monotonic() + self.DYING_SECONDS
        while True:
            try:
                command.run("wipe", "--yes", "--progress", instance.uuid, tell=tell)
            except command.CommandFailed as error:
                if error.status == command.NOT_FOUND:
                    return
                if error.status == command.IN_USE and time.monotonic() < last:
                    time.sleep(1)
                    continue
                raise exception.VPMEMCleanupFailed(dev=f"of instance {instance.uuid}", error=error) from error
            LOG.info("Its persistent memory is all zeros", instance=instance)
            return

    def _release(self, instance: Any) -> None:
        """Give up an instance's claims, so that the next one can have its namespaces. Can be repeated."""
        try:
            command.run("release", "--yes", instance.uuid)
        except command.CommandFailed as error:
            if error.status != command.NOT_FOUND:
                raise exception.VPMEMCleanupFailed(dev=f"of instance {instance.uuid}", error=error) from error

    # --- what would lose persistent memory ---

    # LibvirtDriver.check_can_live_migrate_destination, _source: memory that is mapped is not in the stream, and
    # neither Xen nor libvirt refuses that by itself.
    def check_can_live_migrate_destination(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_live_migration(instance)
        return super().check_can_live_migrate_destination(context, instance, *args, **kwargs)

    def check_can_live_migrate_source(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_live_migration(instance)
        return super().check_can_live_migrate_source(context, instance, *args, **kwargs)

    # LibvirtDriver.migrate_disk_and_power_off: the first of a resize and of a cold migration that the host hears.
    # Nova takes other namespaces for the resized instance, on the same host, too, and copies nothing.
    def migrate_disk_and_power_off(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        if has_pmem(instance):
            raise exception.InstanceFaultRollback(
                exception.MigrationPreCheckError(
                    reason=f"instance {instance.uuid} has persistent memory (hw:pmem), which a resize or a cold "
                    "migration would lose: copy its data inside the guest to a new instance"
                )
            )
        return super().migrate_disk_and_power_off(context, instance, *args, **kwargs)


def has_pmem(instance: Any) -> bool:
    """Whether an instance's flavor gives it persistent memory."""
    return bool(hardware.get_vpmems(instance.flavor))


def leaves_host(instance: Any, host: str, *, destroys_disks: bool) -> bool:
    """Whether an instance whose domain ends will not be started on this host again.

    :param destroys_disks: what Nova says of its disks.
    """
    if instance.deleted:
        return True
    if instance.host is not None and instance.host != host:
        return True  # it was evacuated; its disks may be shared with its new host
    if instance.task_state == task_states.RESIZE_REVERTING:
        return True  # what the larger flavor had here: instances that had some before are not resized
    return destroys_disks and instance.task_state not in _REBUILDING


def _refuse_live_migration(instance: Any) -> None:
    if has_pmem(instance):
        raise exception.MigrationPreCheckError(
            reason=f"instance {instance.uuid} has persistent memory (hw:pmem), which stays on its host"
        )


def _name_disk_driver(disk: Any) -> None:
    """Nova names a disk's driver for qemu and kvm alone, and libxl takes a disk without one for raw."""
    disk.driver_name = "qemu"
