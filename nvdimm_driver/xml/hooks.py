# SPDX-License-Identifier: Apache-2.0
"""The configured XML hooks: applied in order on the way into libvirt, in reverse on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvdimm_driver import plugin_loader
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.plugins import XmlHook
from nvdimm_driver.xml.rewrite import LibxlXmlHook

if TYPE_CHECKING:
    from oslo_config import cfg


class XmlHooks:
    """Several XML hooks as one.

    :param hooks: in the order in which they rewrite.
    :param device_model: absolute path of the program that rewritten domains have as their emulator.
    """

    def __init__(self, hooks: Sequence[XmlHook], device_model: str) -> None:
        self.device_model = device_model
        self._hooks = tuple(hooks)

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> XmlHooks:
        """Make the hooks that ``xml_hooks`` names; the shipped one without a search, which takes longer than its use.

        :raises ConfigError: when no installed package has a hook of that name.
        """
        hooks = [
            LibxlXmlHook() if name == "libxl" else plugin_loader.load("nvdimm_driver.xml_hooks", name, conf)
            for name in conf.xml_hooks
        ]
        return cls(hooks, conf.xen.device_model)

    def rewrite(self, xml: str) -> str:
        """Return the XML for libvirt, from domain XML as the user wrote it.

        :raises DomainXmlError: when the XML cannot be parsed or has an invalid value.
        :raises UnsupportedError: when it asks for something that Xen or this driver cannot do.
        """
        for hook in self._hooks:
            xml = hook.rewrite(xml, self.device_model)
        return xml

    def restore(self, xml: str) -> str:
        """Return the XML for the user, from domain XML as libvirt has it.

        :raises DomainXmlError: when the XML cannot be parsed, or the data that a hook keeps in it is broken.
        """
        for hook in reversed(self._hooks):
            xml = hook.restore(xml)
        return xml

    def may_restore(self, reply: bytes) -> bool:
        """Return False when no hook would change any XML in these bytes. Cheap, and raises nothing."""
        try:
            return any(hook.may_restore(reply) for hook in self._hooks)
        except NvdimmError:
            return True  # a hook is broken: restore says so
