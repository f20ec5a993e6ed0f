"""A label storage area in its backing: the last bytes of an NVDIMM, where QEMU keeps them too."""

from __future__ import annotations

from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import BackingIdentity


def check_identity(path: str, found: BackingIdentity, expected: BackingIdentity | None) -> None:
    """Refuse a backing that is not the one that was expected.

    :raises BackingError: naming both.
    """
    if found != expected:
        raise BackingError(
            f"{path} is not what was provisioned: was {expected}, is {found}",
            hint="put the old file back, or take the new one by defining the domain anew",
        )


def no_label_server(path: str) -> UnsupportedError:
    """What is wrong with a device-dax device as backing of an NVDIMM whose labels a label server writes."""
    return UnsupportedError(
        f"{path}: the labels of a device-dax device cannot be served by a QEMU (dsm = qemu): Linux gives programs no "
        "way to make its bytes durable (no fsync)",
        hint="take dsm 'aml', whose stores are durable at once, or a file or raw namespace",
    )
