# SPDX-License-Identifier: Apache-2.0
"""Add ``xen`` to Nova's tables and functions for each virt_type, which no subclass can override.

Nova had all of this until change 3a390c2c82 (23.0.0), and keeps Xen's disk buses still, in order to refuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import nova.conf
from nova.conf import libvirt as options
from nova.network import model as network_model
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import vif as libvirt_vif
from oslo_config import cfg, types

from nvdimm_driver.nova.compute.compatibility import Expected, expect

CONF = nova.conf.CONF
VIRT_TYPE = "xen"
# libxl: tools/libs/light/libxl_dm.c gives these names to QEMU; netfront is the guest's own driver, without emulation.
VIF_MODELS = [
    network_model.VIF_MODEL_NETFRONT,
    network_model.VIF_MODEL_NE2K_PCI,
    network_model.VIF_MODEL_PCNET,
    network_model.VIF_MODEL_RTL8139,
    network_model.VIF_MODEL_E1000,
]


def accept_xen() -> None:
    """Make Nova accept ``virt_type = xen`` in this process. It can be repeated."""
    _accept_option()
    libvirt_vif.SUPPORTED_VIF_MODELS[VIRT_TYPE] = VIF_MODELS
    for function, wrap in WRAPPED:
        original = getattr(function.owner, function.path)
        if not hasattr(original, "__wrapped__"):
            setattr(function.owner, function.path, wrap(original))


def _accept_option() -> None:
    """Make xen a value of ``[libvirt] virt_type``, and its default.

    oslo.config converts a value when it is read, by the type that the option has then. nova-compute reads all options
    before it loads the driver (nova/cmd/compute.py, with native threads and ``log_options``): it refuses a xen that is
    written out there, and accepts the default.
    """
    (option,) = (each for each in options.libvirt_general_opts if each.name == "virt_type")
    if VIRT_TYPE not in option.type.choices:
        option.type = types.String(choices=[*option.type.choices.items(), (VIRT_TYPE, None)])
        cfg.set_defaults(options.libvirt_general_opts, virt_type=VIRT_TYPE)


def _with_xen_bus(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with Xen's own bus for a disk whose image names none.

    Guests boot from that bus, too: libxl shows the first four disks of HVM guests as IDE disks until a guest's driver
    takes over, CD-ROM drives for good (libxl_dm.c). It counts xvda and hda as the same disk, so a CD-ROM drive is on
    the bus of the disks.
    """

    @wraps(original)
    def get_disk_bus_for_device_type(
        instance: Any, virt_type: str, image_meta: Any, device_type: str = "disk"
    ) -> str | None:
        if virt_type != VIRT_TYPE or image_meta.properties.get(f"hw_{device_type}_bus") is not None:
            bus: str | None = original(instance, virt_type, image_meta, device_type)
            return bus
        if device_type == "cdrom":
            return get_disk_bus_for_device_type(instance, virt_type, image_meta)
        return VIRT_TYPE if device_type == "disk" else None

    return get_disk_bus_for_device_type


def _with_xen_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the bus xen for a disk whose name begins with xvd."""

    @wraps(original)
    def get_disk_bus_for_disk_dev(virt_type: str, disk_dev: str) -> str:
        bus: str = VIRT_TYPE if disk_dev.startswith("xvd") else original(virt_type, disk_dev)
        return bus

    return get_disk_bus_for_disk_dev


def _with_xen_prefix(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the prefix xvd for the names of disks on the bus xen."""

    @wraps(original)
    def get_dev_prefix_for_disk_bus(disk_bus: str) -> str | None:
        if disk_bus == VIRT_TYPE and not CONF.libvirt.disk_prefix:
            return "xvd"
        prefix: str | None = original(disk_bus)
        return prefix

    return get_dev_prefix_for_disk_bus


def _options() -> SimpleNamespace:
    """Return Nova's options of a libvirt host as the attributes of one object."""
    name = "nova.conf.libvirt.libvirt_general_opts"
    return SimpleNamespace(__name__=name, **{each.name: each for each in getattr(options, "libvirt_general_opts", ())})


WRAPPED = (
    (
        Expected(blockinfo, "get_disk_bus_for_device_type", "(instance, virt_type, image_meta, device_type='disk')"),
        _with_xen_bus,
    ),
    (Expected(blockinfo, "get_disk_bus_for_disk_dev", "(virt_type, disk_dev)"), _with_xen_name),
    (Expected(blockinfo, "get_dev_prefix_for_disk_bus", "(disk_bus)"), _with_xen_prefix),
)
"""Each function of Nova that accept_xen replaces, and what makes the new one of it."""
EXPECTED = (
    *(function for function, _ in WRAPPED),
    *expect(libvirt_vif, {"SUPPORTED_VIF_MODELS": "dict"}),
    *expect(options, {"libvirt_general_opts": "list"}),
    *expect(_options(), {"virt_type": "StrOpt"}),
)
