# SPDX-License-Identifier: Apache-2.0
"""Images of saved guests that a client names, with plain virsh through nvdimmd to the real libxl driver."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from tests.integration.bench_host import UUID, Host
from tests.integration.test_virsh import device, host, refused, shared_host
from tests.waiting import HANG_SECONDS

__all__ = ["host", "shared_host"]

HEADER = struct.Struct("=16sII40x")
MAGIC = b"libvirt-xml\n \0 \r"
LATIN_1 = b"<?xml version='1.0' encoding='ISO-8859-1'?>\n"
CLOSE_NOWRITE = 0x10  # include/uapi/linux/inotify.h


def saved_with_another(host: Host) -> Path:
    """Return the image of a guest with an NVDIMM that its domain has given up since, and was started without."""
    saved = host.folder / "saved"
    host.check("attach-device", "db1", device(host, "old"), "--config")
    host.check("start", "db1")
    host.check("save", "db1", saved)
    host.check("start", "db1")
    host.check("destroy", "db1")
    host.check("detach-device", "db1", device(host, "old"), "--config")
    return saved


def beginning_with(image: Path, declaration: bytes) -> Path:
    """Write an image of an earlier version, with XML that means the same to libvirt, which reads to the first NUL."""
    data = image.read_bytes()
    magic, version, length = HEADER.unpack(data[: HEADER.size])
    xml = declaration + data[HEADER.size : HEADER.size + length].rstrip(b"\0") + b"\0</domain>\0"
    changed = image.with_name("changed")
    changed.write_bytes(HEADER.pack(magic, version - 1, len(xml)) + xml + data[HEADER.size + length :])
    return changed


def test_a_restore_that_fails_leaves_what_the_domain_had(host: Host) -> None:
    saved = saved_with_another(host)
    before = host.record("db1").allocations
    for image in (saved, beginning_with(saved, LATIN_1)):
        assert "the saved guest cannot go on" in refused(host, "restore", image)
        assert host.record("db1").allocations == before
    told = refused(host, "restore", beginning_with(saved, b"<!DOCTYPE domain>\n"))
    assert "has a document type declaration" in told
    assert host.record("db1").allocations == before


def test_what_is_no_image_is_refused_before_anybody_waits_for_it(host: Host) -> None:
    fifo, damaged = host.folder / "fifo", host.folder / "damaged"
    os.mkfifo(fifo)
    assert "is a FIFO, a device or a folder" in refused(host, "restore", fifo)
    damaged.write_bytes(b"x" * 4096)
    assert "is no image of a saved guest" in refused(host, "restore", damaged)
    assert "missing: No such file" in refused(host, "restore", host.folder / "missing")


def test_a_restore_reads_the_image_that_was_looked_at(host: Host) -> None:
    """libvirtd would wait for the FIFO, and the domain that the image names would stay locked."""
    xml = f"<domain type='xen'><name>db1</name><uuid>{UUID.format(1)}</uuid></domain>\0".encode()
    image, fifo = host.folder / "own-image", host.folder / "own-fifo"
    image.write_bytes(HEADER.pack(MAGIC, 2, len(xml)) + xml)
    os.mkfifo(fifo)
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init()
    try:
        assert libc.inotify_add_watch(watch, str(image).encode(), CLOSE_NOWRITE | 1) >= 0
        with host.libvirtd.begin("virsh", "-q", "-c", "xen:///system", "restore", str(image)) as client:
            os.read(watch, 4096)  # the driver reads it
            fifo.rename(image)
            assert client.wait(HANG_SECONDS) == 1
    finally:
        os.close(watch)
    host.check("start", "db1")
