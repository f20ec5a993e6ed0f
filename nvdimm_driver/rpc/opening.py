# SPDX-License-Identifier: Apache-2.0
"""The call that opens a connection: only the libxl driver's is opened.

The handlers take what libvirtd answers for the libxl driver's word. A libvirtd has other drivers, which would answer
for domains of the same uuid: those that it runs itself, libvirt's test driver, and a libvirtd on another host.
"""

from __future__ import annotations

from nvdimm_driver.errors import UnsupportedError
from nvdimm_driver.rpc.libvirt_calls import Steps, call
from nvdimm_driver.rpc.xdr import Unpacker

URIS = ("xen:///system", "xen:///", "xen://", "xen:/")
"""What the libxl driver opens, as a client writes it: it takes transport, host and socket out of the URI itself,
so that it writes ``xen://`` for ``xen+ssh://HOST``.
"""


def open_connection(interceptor: object, procedure: int, payload: bytes) -> Steps:
    """Refuse every other URI than :data:`URIS`, also none, for which libvirtd would choose a driver."""
    del interceptor
    uri = Unpacker(payload).optional_string()
    if uri not in URIS:
        other = f"not {uri[:80]!r}" if uri else "and this client names none"
        raise UnsupportedError(
            f"nvdimmd's socket is for {URIS[0]}, libvirt's driver for Xen, {other}",
            hint=f"open {URIS[0]}; libvirt's other drivers are at libvirtd's own socket",
        )
    return (yield from call(procedure, payload))
