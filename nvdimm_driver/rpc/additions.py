# SPDX-License-Identifier: Apache-2.0
"""The sum of what calls that are under way add to the XML of a domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nvdimm_driver.xml.client_xml import Added


class Additions:
    """The additions of all clients' calls, by the uuid of the domain. For one thread alone.

    A call is counted before the domain's XML is read for its check, until libvirt has replied. So at each check, what
    others add is in that XML or in the sum, or those calls come later and count this one.
    """

    def __init__(self) -> None:
        self._under_way: dict[str, list[Added]] = {}

    @contextmanager
    def count(self, uuid: str, added: Added) -> Iterator[Added]:
        """Count what a call adds until the end of the context, which gets the sum with what others add now."""
        all_added = self._under_way.setdefault(uuid, [])
        all_added.append(added)
        try:
            yield Added(sum(each.size for each in all_added), sum(each.parts for each in all_added))
        finally:
            all_added.remove(added)
            if not all_added:
                del self._under_way[uuid]
