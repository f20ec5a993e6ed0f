# SPDX-License-Identifier: Apache-2.0
"""Checks of Nova's configuration, where there is one."""

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
    """Check Nova's configuration on a host whose nova-compute uses the compute driver.

    :param find: looks for configured namespaces in the pools; raises NvdimmError.
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
    """Return the version of the Nova that this Python has; None without Nova."""
    try:
        return version("nova")
    except PackageNotFoundError:
        return None


def _check_compute_driver(conf: NovaConf) -> Finding:
    name = "Nova, compute_driver"
    if conf.compute_driver == DRIVER:
        return passed(name, DRIVER)
    told = conf.compute_driver or "not set"
    if not conf.compute_driver and not conf.pmem_namespaces:
        return noted(name, "not set: this host runs no nova-compute, or has its options elsewhere")
    return failed(
        name,
        f"{told}: instances get no NVDIMMs on Xen",
        f"compute_driver = {DRIVER} in [DEFAULT]; the sample is nova-compute-xen-nvdimm.conf",
    )


def _check_version(installed: str | None) -> Finding:
    name = "Nova, version"
    if installed is None:
        return noted(
            name,
            "cannot be told: nova-compute has another Python than nvdimmctl",
            "the environment that nova-compute runs in needs nvdimm_driver, too: pip install '.[nova]' in its source",
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
    name, hint = "Nova, virt_type", "leave virt_type out of [libvirt]: the compute driver makes it xen"
    if not virt_type:
        return passed(name, "left to the compute driver, which makes it xen")
    if virt_type == "xen":
        return warned(
            name, "xen: nova-compute reads it before it loads the compute driver, and may not start by that", hint
        )
    return failed(name, f"{virt_type}: nova-compute does not start", hint)


def _check_uri(uri: str) -> Finding:
    name = "Nova, connection_uri"
    if uri in ("", URI):
        return passed(name, URI)
    return warned(
        name,
        f"{uri}: may go past nvdimmd, and libvirt then refuses instances with NVDIMMs",
        f"connection_uri = {URI} in [libvirt]; libvirt's clients find nvdimmd's socket first",
    )


def _check_namespaces(entries: Sequence[str], find: Find) -> Finding:
    """Check the configured namespaces and their labels, as Nova maps different labels to one resource class."""
    name = "Nova, pmem_namespaces"
    if not entries:
        return noted(
            name, "none: Nova has no persistent memory here", "name some, as nova-compute-xen-nvdimm.conf does"
        )
    try:
        found = find(parse(entries))
    except NvdimmError as error:
        return could_not(name, error)
    labels = {each.label: sum(other.label == each.label for other in found) for each in found}
    owned = sum(bool(each.domain) for each in found)
    told = ", ".join(f"{count} of {label}" for label, count in labels.items())
    return passed(name, f"{told}; domains have {owned}")


def _check_filters(filters: Sequence[str]) -> Finding:
    name = "Nova, filters"
    if _NUMA_FILTER in filters:
        return warned(
            name,
            f"{_NUMA_FILTER} is enabled, and refuses every flavor with hw:pmem on Xen hosts: Nova takes such a flavor "
            "for one with a NUMA cell, and Xen hosts report none",
            "take it out of enabled_filters in [filter_scheduler] where the scheduler runs; flavors with NUMA "
            "properties on KVM hosts then need host aggregates",
        )
    if not filters:
        return noted(
            name, "not set here; the scheduler, which may run elsewhere, must not enable NUMATopologyFilter for Xen"
        )
    return passed(name, f"{_NUMA_FILTER} is not enabled")
