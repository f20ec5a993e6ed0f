# SPDX-License-Identifier: Apache-2.0
"""Seeds for fuzzing: valid input, or nearly valid."""

from __future__ import annotations

import struct
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
UUID = bytes.fromhex("7c7b0e2e4a6e4f0e9a3b000000000001")
DOMAIN = """\
<domain type='xen'><name>db1</name><uuid>7c7b0e2e-4a6e-4f0e-9a3b-000000000001</uuid><memory unit='MiB'>512</memory>
<os><type>hvm</type></os><features><acpi/></features><devices><memory model='nvdimm'><source><path>/mnt/pmem0/a</path>
</source><target><size unit='MiB'>64</size></target></memory></devices></domain>"""
NVDIMM = "<memory model='nvdimm'><source><path>/mnt/pmem0/b</path></source><target><size>65536</size></target></memory>"
RECORD = "<nvdimm:domain xmlns:nvdimm='urn:nvdimm-driver&#58;domain:1'><devices/></nvdimm:domain>"


def seeds(target: str) -> list[bytes]:
    """Return inputs for a target of :mod:`tests.fuzz.targets`."""
    return {"reader": _streams, "xml": _domains, "handlers": _calls}[target]()


def _streams() -> list[bytes]:
    calls = [struct.pack(">IIIiIII", 28, 0x20008086, 1, 1, kind, 1, 0) for kind in range(3)]
    with_fds = struct.pack(">IIIiIIII", 32, 0x20008086, 1, 1, 4, 1, 0, 0)
    return [bytes([0, 80, 160, 255]) + stream for stream in (*calls, b"".join(calls), with_fds, with_fds + calls[0])]


def _domains() -> list[bytes]:
    forged = DOMAIN.replace("<memory unit", f"<metadata>{RECORD}</metadata><memory unit")
    files = [path.read_bytes() for path in sorted((DATA / "domxml").glob("*.xml"))]
    return [*files, DOMAIN.encode(), forged.encode(), b"<?xml version='1.0' encoding='ISO-8859-1'?>" + DOMAIN.encode()]


def _calls() -> list[bytes]:
    domain, flags = _string("db1") + UUID + bytes.fromhex("ffffffff"), bytes(4)
    arguments = [
        _string(DOMAIN) + flags,
        domain + _string(NVDIMM) + struct.pack(">I", 2),
        domain + struct.pack(">iI", 2, 1) + _string(RECORD) + bytes(12),
        domain + struct.pack(">QI", 1 << 20, 4),
        _string("xen-xl") + _string(DOMAIN) + flags,
    ]
    return [
        bytes([row]) + struct.pack(">H", len(payload)) + payload + answers
        for row in range(24)
        for payload in arguments
        for answers in (b"", bytes([100]) + DOMAIN.encode())
    ]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)
