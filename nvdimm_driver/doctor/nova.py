# SPDX-License-Identifier: Apache-2.0
"""Check Nova's configuration, if the host has one, for what keeps instances from getting their NVDIMMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from nvdimm_driver.doctor.finding import Finding, could_not, failed, noted, passed, warned
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.nova import RELEASE
from nvdimm_driver.nova.conf import NovaConf
from nvdimm_driver.nova.pmem_namespaces import Configured, NovaNamespace, parse

DRIVER = "nvdimm_ext.XenLibvirtDriver"
URI = "xen:///system"
_NUMA_FILTER = "NUMATopologyFilter"

Find = Callable[[Sequence[Configured]], tuple[NovaNamespace, ...]]


def check(conf: NovaConf, find: Find, installed: str | None) -> Iterator[Finding]:
    """Run all checks of Nova; without a configuration of Nova, there is no finding.

    :param find: finds the configured namespaces in the pools; raises NvdimmError.
    :param installed: version of Nova; None when this Python has none.
    """
    if not conf.files:
        return
    yield _check_compute_driver(conf)
    if conf.compute_driver == DRIVER:
        yield _check_version(installed)
        yield _check_virt_type(conf.virt_type)
        yield _check_uri(conf.connection_uri)
    if conf.compute_driver == DRIVER or conf.pmem_namespaces:
        yield _check_namespaces(conf.pmem_namespaces, find)
    yield _check_filters(conf.enabled_filters)


def nova_version() -> str | None:
    """Return the version of Nova in this Python; None without one."""
    try:
        return version("nova")
    except PackageNotFoundError:
        return None


def _check_compute_driver(conf: NovaConf) -> Finding:
    name = "Nova, compute_driver"
    if conf.compute_driver == DRIVER:
        return passed(name, DRIVER)
    name_or_unset = conf.compute_driver or "not set"
    if not conf.compute_driver and not conf.pmem_namespaces:
        return noted(name, "not set: this host runs no nova-compute, or has its options elsewhere")
    return failed(
        name,
        f"{name_or_unset}: instances get no NVDIMMs on Xen",
        f"set compute_driver = {DRIVER} in [DEFAULT]; nova-compute-xen-nvdimm.conf is a sample",
    )


def _check_version(installed: str | None) -> Finding:
    name = "Nova, version"
    if installed is None:
        return noted(
            name,
            "unknown: nova-compute runs in another Python than nvdimmctl",
            "nova-compute's Python needs nvdimm_driver, too: pip install '.[nova]' in the source of nvdimm_driver",
        )
    if installed.partition(".")[0] != str(RELEASE):
        return warned(
            name,
            f"{installed}; the compute driver is made for {RELEASE}. nova-compute does not start when this Nova lacks "
            "anything that the driver depends on",
            f"install Nova {RELEASE}, or an nvdimm_driver that supports this Nova",
        )
    return passed(name, installed)


def _check_virt_type(virt_type: str) -> Finding:
    name, hint = "Nova, virt_type", "remove virt_type from [libvirt]: the compute driver sets it to xen"
    if not virt_type:
        return passed(name, "left to the compute driver, which sets it to xen")
    if virt_type == "xen":
        return warned(
            name, "xen: nova-compute reads it before it loads the compute driver, and may fail to start", hint
        )
    return failed(name, f"{virt_type}: nova-compute does not start", hint)


def _check_uri(uri: str) -> Finding:
    name = "Nova, connection_uri"
    if uri in ("", URI):
        return passed(name, URI)
    return warned(
        name,
        f"{uri}: may bypass nvdimmd; libvirt then refuses instances with NVDIMMs",
        f"set connection_uri = {URI} in [libvirt]: libvirt's clients find nvdimmd's socket first",
    )


def _check_namespaces(entries: Sequence[str], find: Find) -> Finding:
    """Check the namespaces and their labels: Nova maps labels of other case or signs to the same resource class."""
    name = "Nova, pmem_namespaces"
    if not entries:
        return noted(
            name,
            "none: Nova has no persistent memory here",
            "set pmem_namespaces in [libvirt]; nova-compute-xen-nvdimm.conf is a sample",
        )
    try:
        found = find(parse(entries))
    except NvdimmError as error:
        return could_not(name, error)
    labels = {each.label: sum(other.label == each.label for other in found) for each in found}
    owned = sum(bool(each.domain) for each in found)
    counts = ", ".join(f"{count} of {label}" for label, count in labels.items())
    return passed(name, f"{counts}; {owned} of them belong to domains")


def _check_filters(filters: Sequence[str]) -> Finding:
    name = "Nova, filters"
    if _NUMA_FILTER in filters:
        return warned(
            name,
            f"{_NUMA_FILTER} is enabled, and refuses every flavor with hw:pmem on Xen hosts: Nova gives such a flavor "
            "a NUMA cell, and Xen hosts report none",
            "remove it from enabled_filters in [filter_scheduler] where the scheduler runs; flavors with NUMA "
            "properties on KVM hosts then need host aggregates",
        )
    if not filters:
        return noted(
            name, "not set here; the scheduler, which may run elsewhere, must not enable NUMATopologyFilter for Xen"
        )
    return passed(name, f"{_NUMA_FILTER} is not enabled")
