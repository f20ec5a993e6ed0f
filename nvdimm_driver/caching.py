# SPDX-License-Identifier: Apache-2.0
"""Choose whether the processors cache a guest's NVDIMMs. The device model uses this module, so it imports little."""

from __future__ import annotations

from nvdimm_driver.errors import XenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

AUTO, WRITE_BACK, UNCACHED = CACHES = "auto", "write-back", "uncached"
"""What can be asked for: write-back where the hypervisor gives it, nothing else, or not even then."""
SHADOW = "the guest has shadow page tables (hap is off), and they are uncached"


def choose(wanted: str, find_fault: Callable[[], str]) -> str:
    """Return what a guest gets: :data:`WRITE_BACK` or :data:`UNCACHED`.

    :param wanted: one of :data:`CACHES`.
    :param find_fault: returns why the guest cannot have write-back, as :meth:`.plugins.Mapper.write_back_fault` does.
    :raises XenError: when only write-back will do, and the host does not give it.
    """
    fault = "" if wanted == UNCACHED else find_fault()
    if fault and wanted == WRITE_BACK:
        raise XenError(
            f"the NVDIMMs are to be cached (cache = write-back), and that is not possible: {fault}",
            hint="to start the guest uncached, set cache to 'auto' in [xen], or in the domain's <nvdimm:options>",
        )
    return UNCACHED if fault or wanted == UNCACHED else WRITE_BACK
