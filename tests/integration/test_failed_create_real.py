# SPDX-License-Identifier: Apache-2.0
"""A create that fails after its guest has run, on real ext4 and XFS: the guest's bytes stay, and stay the domain's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.errors import InUseError
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.rpc.handler_types import Call
from nvdimm_driver.rpc.intercept import Interceptor
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import LibvirtError, Packer, RemoteError
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore
from tests.integration.loop_pmem import MKFS, SPA, FileSystem, run
from tests.integration.test_ownership_real import DATA, Host
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared
from tests.unit.test_rpc_intercept import HOOKS, Libvirtd, Proxy

HOOK_SCRIPT_FAILED = 70  # include/libvirt/virterror.h


@pytest.fixture(params=list(MKFS))
def file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    (tmp_path / "fs").mkdir()
    file_system = FileSystem(tmp_path / "fs", request.param)
    yield file_system
    for each in Path(file_system.root).rglob("*"):
        if each.is_file():
            file_system.backing.thaw(str(each))
    file_system.close()


class LateFailure(Libvirtd):
    """A libvirtd whose hook for a guest that runs fails: it destroys the guest, and runs the hook for its end."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host

    def answer(self, call: Call) -> bytes:
        if call.procedure != Procedure.DOMAIN_CREATE_XML:
            return super().answer(call)
        domain = extract(restore(call.payload[4:].split(b"</domain>")[0].decode() + "</domain>"))
        assert domain
        driver = self.host.another()
        self.host.mapper.alive[7] = UUID
        driver.prepare(domain)
        map_prepared(driver.ledger, 7)
        store(self.host)
        del self.host.mapper.alive[7]
        driver.release(UUID)
        raise LibvirtError(RemoteError(HOOK_SCRIPT_FAILED, 41, "Hook script execution failed").pack())


def store(host: Host) -> None:
    """Store to the frames of the domain's NVDIMM, as its guest does."""
    (item,) = host.record().allocations
    with open(host.fs.image, "r+b") as image:
        for each in host.backing.locate(item.spec).extents:
            image.seek(each.spa - SPA)
            image.write(DATA[each.offset : each.offset + each.length])


@pytest.mark.parametrize("there", [True, False], ids=["existing", "created"])
@pytest.mark.parametrize("wipe", [True, False], ids=["wiped", "not wiped"])
def test_the_bytes_stay_and_nobody_else_gets_them(
    tmp_path: Path, file_system: FileSystem, *, there: bool, wipe: bool
) -> None:
    host = Host(tmp_path, file_system, wipe=wipe)
    path = host.path("a.img")
    if there:
        host.driver.importer.provision(host.domain("a.img").nvdimms[0], lambda what: unwatched)
    proxy = Proxy.__new__(Proxy)
    proxy.pools = []
    proxy.libvirtd = LateFailure(host)
    proxy.interceptor = Interceptor(host.another, HOOKS)
    xml = (
        f"<domain type='xen'><name>x</name><uuid>{UUID}</uuid><memory unit='MiB'>512</memory><os><type>hvm</type></os>"
        f"<devices><memory model='nvdimm'><source><path>{path}</path></source><target>"
        "<size unit='MiB'>4</size></target></memory></devices></domain>"
    )
    with pytest.raises(LibvirtError):
        proxy.call(Procedure.DOMAIN_CREATE_XML, Packer().string(xml).uint32(0))
    assert [item.spec.path for item in host.record().allocations] == [path]
    assert os.path.exists(path)
    with pytest.raises(InUseError):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    run("sync", "-f", str(file_system.root))
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert host.read("a.img") == DATA
