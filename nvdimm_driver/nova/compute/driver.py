# SPDX-License-Identifier: Apache-2.0
"""Nova's libvirt driver on Xen, with persistent memory from the operator's pools.

It needs libvirt 9.0 or later, and the Nova release in nvdimm_driver.nova.RELEASE. ``@overrides`` has the signature of
the method of Nova that an override replaces, and the docstring says why.

:raises nova.exception.InvalidConfiguration: when it is imported and does not support the installed Nova.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import nova.conf
from nova import exception, objects
from nova.compute import task_states, vm_states
from nova.virt import hardware
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import vif as libvirt_vif
from oslo_log import log as logging

from nvdimm_driver.nova.compute import command, patches, strangers
from nvdimm_driver.nova.compute import host as xen_host
from nvdimm_driver.nova.compute.compatibility import ASSIGNED, check_nova, expect, overridden, overrides

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF
TRAIT = "CUSTOM_XEN_NVDIMM"
"""The trait by which placement finds the Xen hosts whose guests can have NVDIMMs."""
_DONE = " is all zeros"
"""The end of what nvdimmctl prints for each path that it has wiped."""
_REBUILDING = (task_states.REBUILDING, task_states.REBUILD_BLOCK_DEVICE_MAPPING, task_states.REBUILD_SPAWNING)


class XenLibvirtDriver(driver.LibvirtDriver):
    """nova.virt.libvirt.driver.LibvirtDriver on Xen, which keeps the persistent memory of instances.

    :cvar DYING_SECONDS: how long Xen may take to remove a destroyed domain.
    """

    DYING_SECONDS = 30

    @overrides("(self, virtapi, read_only=False)")
    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        """Use XenHost instead of Nova's Host, which Nova makes here and gives to the VIF driver."""
        super().__init__(virtapi, read_only)
        self._host = xen_host.XenHost(
            self._uri(),
            read_only,
            lifecycle_event_handler=self.emit_event,
            conn_event_handler=self._handle_conn_event,
        )
        self.vif_driver = libvirt_vif.LibvirtGenericVIFDriver(self._host)

    @staticmethod
    @overrides("static ()")
    def _uri() -> str:
        """Return the URI of libvirt; Nova's default is qemu:///system."""
        return CONF.libvirt.connection_uri or "xen:///system"

    @overrides("(self, host)")
    def init_host(self, host: str) -> None:
        """Refuse another virt_type than xen, which Nova finds wrong too late; log what no instance can have."""
        if CONF.libvirt.virt_type != "xen":
            raise exception.InvalidConfiguration(
                f"compute_driver is nvdimm_ext.XenLibvirtDriver, and [libvirt] virt_type is {CONF.libvirt.virt_type}: "
                "leave it out"
            )
        super().init_host(host)
        if CONF.libvirt.pmem_namespaces:
            for line in strangers.tell_of_strangers(_inventory(), host):
                LOG.warning(line)

    @overrides("(self)")
    def _do_quality_warnings(self) -> None:
        """Log nothing; Nova would warn that virt_type xen is deprecated and will be removed."""

    # --- guests ---

    @overrides("(self)")
    def _has_numa_support(self) -> bool:
        """Return False, so that a claim does not refuse every flavor that has hw:pmem.

        Nova takes such a flavor for one that needs a NUMA cell, and a Xen host does not report the memory and the pages
        of its cells.
        """
        return False

    @overrides("(self, guest, os_type, image_meta, flavor)")
    def _set_features(self, guest: Any, os_type: str, image_meta: Any, flavor: Any) -> None:
        """Add ACPI, without which a guest finds no NVDIMM, and APIC; Nova adds them for qemu and kvm alone."""
        super()._set_features(guest, os_type, image_meta, flavor)
        guest.add_feature(vconfig.LibvirtConfigGuestFeatureACPI())
        guest.add_feature(vconfig.LibvirtConfigGuestFeatureAPIC())

    @overrides("(self)")
    def _get_guest_iothread(self) -> None:
        """Return None, for no <iothreads>: libxl refuses the element."""
        return None

    @overrides("(self, guest, flavor, image_meta)")
    def _guest_add_usb_root_controller(self, guest: Any, flavor: Any, image_meta: Any) -> None:
        """Add a controller only for a guest that needs USB.

        For a guest that does not, Nova adds one of the model "none", which libxl refuses.
        """
        if self._guest_needs_usb(guest, image_meta):
            super()._guest_add_usb_root_controller(guest, flavor, image_meta)

    @overrides("(self, image_meta)")
    def _get_video_type(self, image_meta: Any) -> str:
        """Return the image's video model, or vga. Nova's default is virtio; libxl has vga, cirrus and xen."""
        return image_meta.properties.get("hw_video_model") or "vga"

    @overrides(
        "(self, instance, network_info, image_meta, disk_info, rescue=None, block_device_info=None, context=None, "
        "mdevs=None, accel_info=None, share_info=None, old_guest=None)"
    )
    def _get_guest_config(self, *args: Any, **kwargs: Any) -> Any:
        """Name the driver of each disk that a guest starts with; Nova makes these disks in several places."""
        guest = super()._get_guest_config(*args, **kwargs)
        for device in guest.devices:
            if isinstance(device, vconfig.LibvirtConfigGuestDisk):
                _name_disk_driver(device)
        return guest

    @overrides("(self, connection_info, disk_info)")
    def _get_volume_config(self, connection_info: Any, disk_info: Any) -> Any:
        """Name the driver of a disk that is attached to a guest."""
        disk = super()._get_volume_config(connection_info, disk_info)
        _name_disk_driver(disk)
        return disk

    # --- what placement is told ---

    @property
    @overrides("property")
    def static_traits(self) -> dict[str, bool]:
        """Return Nova's traits of the host and ours; Nova keeps those in placement the same."""
        return {**super().static_traits, TRAIT: True}

    @overrides("(self)")
    def _get_vpmems_on_host(self) -> dict[str, Any]:
        """Return the host's namespaces by name, from nvdimmctl.

        Nova asks ndctl, which knows of device-dax alone.
        """
        return {
            row["Name"]: objects.LibvirtVPMEMDevice(
                name=row["Name"], devpath=row["Path"], size=row["Size"], align=row["Align"]
            )
            for row in _inventory()
        }

    # --- the bytes of persistent memory ---

    @overrides("(self, instance, flavor)")
    def _get_ordered_vpmems(self, instance: Any, flavor: Any) -> list[Any]:
        """Refuse an instance that would boot without one of its devices.

        A flavor may write a label in another way than nova.conf does, such as 6gb for 6GB. Both are the same resource
        class, so the instance has its allocation, but Nova finds no device by the label and goes on without one.
        """
        found: list[Any] = super()._get_ordered_vpmems(instance, flavor)
        labels = hardware.get_vpmems(flavor)
        if len(found) != len(labels):
            raise exception.InvalidInput(
                reason=f"flavor {flavor.name} asks for hw:pmem={','.join(labels)}, and instance {instance.uuid} has "
                f"{', '.join(f'{each.name} ({each.label})' for each in found) or 'none'}: write labels in the flavor "
                "as they are in [libvirt] pmem_namespaces of the host"
            )
        return found

    @overrides("(self, instance, prefix=None)")
    def _get_vpmems(self, instance: Any, prefix: str | None = None) -> list[Any]:
        """Return those of an instance's devices that this host has.

        Nova raises KeyError for an instance that was evacuated from here, whose resources are those of its new host.
        """
        resources = self._get_vpmem_resources(self._get_resources(instance, prefix=prefix))
        names = [resource.identifier for resource in resources]
        return [self._vpmems_by_name[name] for name in names if name in self._vpmems_by_name]

    @overrides("(self, vpmems)")
    def _cleanup_vpmems(self, vpmems: list[Any]) -> None:
        """Do nothing; Nova writes zeros here, also when the instance is about to start again, as in a hard reboot.

        _cleanup writes the zeros when the instance leaves the host, to all that the ledger has of it.
        """
        del vpmems

    @overrides(
        "(self, context, instance, image_meta, injected_files, admin_password, allocations, network_info=None, "
        "block_device_info=None, power_on=True, accel_info=None)"
    )
    def spawn(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Start a new instance with nothing but zeros in its persistent memory."""
        if begins_with_zeros(instance, CONF.host):
            self._wipe_unclaimed(instance, _paths(self._get_vpmems(instance)))
        return super().spawn(context, instance, *args, **kwargs)

    @overrides(
        "(self, context, migration, instance, disk_info, network_info, image_meta, resize_instance, allocations, "
        "block_device_info=None, power_on=True, share_info=None)"
    )
    def finish_migration(self, context: Any, migration: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Start a resized instance with zeros, as spawn does: what had bytes before is not resized."""
        self._wipe_unclaimed(instance, _paths(self._get_vpmems(instance)))
        return super().finish_migration(context, migration, instance, *args, **kwargs)

    @overrides(
        "(self, context, instance, network_info, block_device_info=None, destroy_vifs=True, "
        "cleanup_instance_dir=False, cleanup_instance_disks=False, destroy_secrets=True)"
    )
    def _cleanup(
        self, context: Any, instance: Any, network_info: Any, block_device_info: Any = None, **kwargs: Any
    ) -> None:
        """Wipe and release the persistent memory of an instance that leaves the host.

        Nova calls this when a domain ends, also when the instance is about to start again. It undefines the domain
        last: while a domain is defined, Nova finds it after a restart, and calls this again.
        """
        goes = leaves_host(instance, CONF.host, destroys_disks=kwargs.get("cleanup_instance_disks", False))
        wiped = self._give_up_or_tell(instance) if goes else set()
        super()._cleanup(context, instance, network_info, block_device_info, **kwargs)
        if goes and instance.host == CONF.host:
            self._wipe_unknown(instance, wiped)

    @overrides("(self, instance)")
    def cleanup_lingering_instance_resources(self, instance: Any) -> None:
        """Wipe and release the persistent memory of an instance that was deleted while it moved."""
        super().cleanup_lingering_instance_resources(instance)
        self._give_up(instance)

    def _give_up_or_tell(self, instance: Any) -> set[str]:
        """Do what :meth:`_give_up` does. What cannot be wiped of one that is elsewhere stays claimed, and is logged.

        Nova starts on no host where an evacuated instance cannot be cleaned up: one bad device would stop all of them.
        """
        try:
            return self._give_up(instance)
        except exception.VPMEMCleanupFailed as error:
            if instance.deleted or instance.host in (None, CONF.host):
                raise
            LOG.error(
                "Its namespaces stay claimed, and no instance can have them: %s. When that is mended: 'nvdimmctl wipe "
                "%s', then 'nvdimmctl release %s'",
                error,
                instance.uuid,
                instance.uuid,
                instance=instance,
            )
            return set()

    def _give_up(self, instance: Any) -> set[str]:
        """Wipe and release what the ledger has of an instance, and return its paths. It can be repeated."""
        wiped = self._wipe(instance)
        self._release(instance)
        return wiped

    def _wipe(self, instance: Any) -> set[str]:
        """Write zeros to all persistent memory that the ledger has of an instance, and return its paths.

        It can be repeated, and does nothing when the ledger has none.
        """
        last = time.monotonic() + self.DYING_SECONDS
        while True:
            try:
                return _wiped(instance, instance.uuid)
            except command.CommandFailed as error:
                if error.status == command.NOT_FOUND:
                    return set()
                if error.status == command.IN_USE and time.monotonic() < last:
                    time.sleep(1)
                    continue
                raise exception.VPMEMCleanupFailed(dev=f"of instance {instance.uuid}", error=error) from error

    def _release(self, instance: Any) -> None:
        """Give up an instance's claims, so that another instance can have its namespaces. It can be repeated."""
        try:
            command.run("release", "--yes", instance.uuid)
        except command.CommandFailed as error:
            if error.status != command.NOT_FOUND:
                raise exception.VPMEMCleanupFailed(dev=f"of instance {instance.uuid}", error=error) from error

    def _wipe_unknown(self, instance: Any, wiped: set[str]) -> None:
        """Write zeros to what Nova says that an instance has, and the ledger does not know: it may be lost, or older.

        What another domain has by now is left alone: the next instance that is to get it is refused, or gets zeros.

        :param wiped: paths of what the ledger knew, and is wiped.
        """
        for path in _paths(self._get_vpmems(instance)):
            if path in wiped:
                continue
            try:
                self._wipe_unclaimed(instance, [path])
            except command.CommandFailed as error:
                if error.status != command.IN_USE:
                    raise exception.VPMEMCleanupFailed(dev=f"of instance {instance.uuid}", error=error) from error
                LOG.warning("%s was not wiped: %s", path, error, instance=instance)

    def _wipe_unclaimed(self, instance: Any, paths: Iterable[str]) -> None:
        """Write zeros to namespaces that no domain has; nvdimmctl reads all of them, and writes what is not zeros.

        Neither the ledger nor this process can say what is in such a namespace. Its last owner may have been lost with
        an earlier ledger, released without a wipe, or defined again without it, and need not be an instance.

        :raises CommandFailed: when a domain has one, or it cannot be wiped.
        """
        for path in paths:
            _wiped(instance, "--unclaimed", path)

    # --- what would lose persistent memory ---

    @overrides(
        "(self, context, instance, src_compute_info, dst_compute_info, block_migration=False, disk_over_commit=False)"
    )
    def check_can_live_migrate_destination(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse an instance with persistent memory.

        Mapped memory is not in the migration stream, and neither Xen nor libvirt refuses such a migration.
        """
        _refuse_live_migration(instance)
        return super().check_can_live_migrate_destination(context, instance, *args, **kwargs)

    @overrides("(self, context, instance, dest_check_data, block_device_info=None)")
    def check_can_live_migrate_source(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse an instance with persistent memory, as check_can_live_migrate_destination does."""
        _refuse_live_migration(instance)
        return super().check_can_live_migrate_source(context, instance, *args, **kwargs)

    @overrides(
        "(self, context, instance, dest, flavor, network_info, block_device_info=None, timeout=0, retry_interval=0)"
    )
    def migrate_disk_and_power_off(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse to resize or to cold-migrate an instance with persistent memory.

        Nova gives the resized instance other namespaces, on the same host, too, and copies nothing. It calls no other
        method of the driver before this one.
        """
        if has_pmem(instance):
            raise exception.InstanceFaultRollback(exception.MigrationPreCheckError(reason=_lost_by_a_resize(instance)))
        return super().migrate_disk_and_power_off(context, instance, *args, **kwargs)

    @overrides("(self, instance, timeout=0, retry_interval=0)")
    def power_off(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse a resize to another cell, which calls this first, and not :meth:`migrate_disk_and_power_off`."""
        if instance.task_state == task_states.RESIZE_MIGRATING and has_pmem(instance):
            raise exception.InstancePowerOffFailure(reason=_lost_by_a_resize(instance))
        return super().power_off(instance, *args, **kwargs)


def _inventory() -> list[dict[str, Any]]:
    """Return what nvdimmctl says of the configured namespaces.

    :raises GetPMEMNamespacesFailed: when one is missing, or an instance could not use it.
    """
    configured = ",".join(CONF.libvirt.pmem_namespaces)
    try:
        return command.rows("nova", "inventory", "--pmem-namespaces", configured)
    except command.CommandFailed as error:
        raise exception.GetPMEMNamespacesFailed(reason=str(error)) from error


def has_pmem(instance: Any) -> bool:
    """Return True if an instance's flavor gives it persistent memory."""
    return bool(hardware.get_vpmems(instance.flavor))


def begins_with_zeros(instance: Any, host: str) -> bool:
    """Return True if a spawn starts an instance that has no bytes on this host yet: not if it is built again here."""
    if instance.host != host:
        return True  # it is evacuated to this host
    return instance.task_state not in (*_REBUILDING, task_states.RESIZE_REVERTING)


def leaves_host(instance: Any, host: str, *, destroys_disks: bool) -> bool:
    """Return True if an instance will not start on this host again after its domain has ended.

    :param destroys_disks: True if Nova destroys the instance's disks.
    """
    if instance.deleted:
        return True
    if instance.host is not None and instance.host != host:
        return True  # it was evacuated; its disks may be shared with its new host
    if instance.vm_state == vm_states.SHELVED_OFFLOADED:
        return True  # a start here that failed; no host is its own
    if instance.task_state in (task_states.RESIZE_FINISH, task_states.RESIZE_REVERTING):
        return True  # what it had of the larger flavor, which failed or is undone: what had some before is not resized
    return destroys_disks and instance.task_state not in _REBUILDING


def _paths(devices: Iterable[Any]) -> list[str]:
    """Return the paths of namespaces as the ledger has them."""
    return [os.path.realpath(device.devpath) for device in devices]


def _wiped(instance: Any, *what: str) -> set[str]:
    """Have nvdimmctl write zeros, and return the paths of what is all zeros now. Progress is in the log.

    :raises CommandFailed: as :func:`.command.run` does.
    """

    def tell(line: str) -> None:
        LOG.info("%s", line, instance=instance)

    printed = command.run("wipe", "--yes", "--progress", *what, tell=tell)
    for line in printed.splitlines():
        tell(line)
    return {line.removesuffix(_DONE) for line in printed.splitlines() if line.endswith(_DONE)}


def _lost_by_a_resize(instance: Any) -> str:
    return (
        f"instance {instance.uuid} has persistent memory (hw:pmem), which a resize or a cold migration would lose: "
        "copy its data inside the guest to a new instance"
    )


def _refuse_live_migration(instance: Any) -> None:
    """Raise MigrationPreCheckError for an instance with persistent memory."""
    if has_pmem(instance):
        raise exception.MigrationPreCheckError(
            reason=f"instance {instance.uuid} has persistent memory (hw:pmem), which stays on its host"
        )


def _name_disk_driver(disk: Any) -> None:
    """Name a disk's driver: Nova does so for qemu and kvm alone, and libxl takes a disk without one for raw."""
    disk.driver_name = "qemu"


_FIELD = "property"
_NOVA_ERROR = "class (message=None, **kwargs)"
EXPECTED = (
    *overridden(XenLibvirtDriver, driver.LibvirtDriver),
    *expect(
        driver.LibvirtDriver,
        {
            "_host": ASSIGNED,
            "vif_driver": ASSIGNED,
            "_vpmems_by_name": ASSIGNED,
            "emit_event": "(self, event)",
            "_handle_conn_event": "(self, enabled, reason)",
            "_guest_needs_usb": "(self, guest, image_meta)",
            "_get_resources": "(self, instance, prefix=None)",
            "_get_vpmem_resources": "(self, resources)",
        },
    ),
    *expect(libvirt_vif, {"LibvirtGenericVIFDriver": "class (host=None)"}),
    *expect(hardware, {"get_vpmems": "(flavor)"}),
    *expect(
        vconfig,
        {
            "LibvirtConfigGuest.add_feature": "(self, dev)",
            "LibvirtConfigGuest.devices": ASSIGNED,
            "LibvirtConfigGuestDisk.driver_name": ASSIGNED,
            "LibvirtConfigGuestFeatureACPI": "class (**kwargs)",
            "LibvirtConfigGuestFeatureAPIC": "class (**kwargs)",
        },
    ),
    *expect(objects, {f"LibvirtVPMEMDevice.{name}": _FIELD for name in ("name", "label", "devpath", "size", "align")}),
    *expect(
        objects,
        {f"Instance.{name}": _FIELD for name in ("uuid", "flavor", "host", "vm_state", "task_state", "deleted")},
    ),
    *expect(objects, {"Resource.identifier": _FIELD}),
    *expect(task_states, dict.fromkeys(("RESIZE_FINISH", "RESIZE_MIGRATING", "RESIZE_REVERTING"), "str")),
    *expect(vm_states, {"SHELVED_OFFLOADED": "str"}),
    *expect(
        exception,
        {
            "InvalidConfiguration": _NOVA_ERROR,
            "InstancePowerOffFailure": _NOVA_ERROR,
            "InvalidInput": _NOVA_ERROR,
            "GetPMEMNamespacesFailed": _NOVA_ERROR,
            "VPMEMCleanupFailed": _NOVA_ERROR,
            "MigrationPreCheckError": _NOVA_ERROR,
            "InstanceFaultRollback": "class (inner_exception=None)",
        },
    ),
    *strangers.EXPECTED,
    *xen_host.EXPECTED,
    *patches.EXPECTED,
    *command.EXPECTED,
)
"""Every name of Nova that this package depends on."""

# nova-compute imports this module when it starts, just before it makes the driver.
check_nova(EXPECTED)
patches.accept_xen()
