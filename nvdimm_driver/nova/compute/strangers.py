# SPDX-License-Identifier: Apache-2.0
"""Find namespaces that placement may take for free, and that no instance can have: a domain of another kind has them.

It may be an instance that was deleted or has left the host while nova-compute was not there to give up its claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nova import context, exception, objects

from nvdimm_driver.nova.compute.compatibility import expect


def tell_of_strangers(rows: Iterable[Mapping[str, Any]], host: str) -> Iterator[str]:
    """Yield what to log of each namespace whose domain is not an instance of this host.

    :param rows: those of ``nvdimmctl nova inventory``.
    :param host: the name of this host in Nova.
    """
    for row in rows:
        uuid = row["Domain"]
        why = _why_strange(uuid, host) if uuid else ""
        if why:
            yield (
                f"No instance can have namespace {row['Name']}: {row['Path']} belongs to domain {uuid}, {why}. "
                "nova-compute gives it up by itself if libvirt still has that domain ('virsh list --all'), and Nova "
                "had it as an instance of this host. Otherwise, if nobody needs its bytes any more: "
                f"'nvdimmctl wipe {uuid}', then 'nvdimmctl release {uuid}'"
            )


def _why_strange(uuid: str, host: str) -> str:
    """Return in what way a domain is not an instance of this host; empty if it is one."""
    try:
        instance = objects.Instance.get_by_uuid(context.get_admin_context(read_deleted="yes"), uuid, expected_attrs=[])
    except exception.InstanceNotFound:
        return "which Nova does not know"
    if instance.deleted:
        return "which Nova has deleted"
    if instance.host != host:
        return f"which Nova has on {instance.host or 'no host'}"
    return ""


EXPECTED = (
    *expect(
        objects, {"Instance.get_by_uuid": "class method (cls, context, uuid, expected_attrs=None, use_slave=False)"}
    ),
    *expect(context, {"get_admin_context": "(read_deleted='no')"}),
    *expect(exception, {"InstanceNotFound": "class (message=None, **kwargs)"}),
)
