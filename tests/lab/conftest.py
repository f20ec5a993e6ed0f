"""Fixtures for tests that need a Xen host. A lab that does not start is an error, never a skip."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import operator, served
from tests.lab.host import GIB, Nvdimm, XenHost
from tests.lab.image import Images, build

MakeHost = Callable[..., XenHost]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: needs a Xen host under emulation; minutes, not seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By host, as only one can run: the shared one, which the others end, then those of a test, then systemd's."""
    hosts = ("host", "fresh_host", "systemd_host")

    def order(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((place for place, name in enumerate(hosts) if name in names), -1)

    items.sort(key=order)


@pytest.fixture(scope="session")
def images() -> Images:
    """The lab's images, built when they are not."""
    return build()


@pytest.fixture(scope="session")
def shared_hosts() -> list[XenHost]:
    """The shared host, once there is one; `fresh_host` ends it without starting it."""
    return []


@pytest.fixture(scope="session")
def host(images: Images, shared_hosts: list[XenHost]) -> Iterator[XenHost]:
    """A host that all tests share, with two NVDIMMs that were empty when the session began."""
    with XenHost(images) as shared:
        shared_hosts.append(shared)
        yield shared


@pytest.fixture(scope="session")
def driver_host(host: XenHost) -> XenHost:
    """The shared host with the driver installed, /mnt/pmem0 (DAX) and /dev/pmem1 (raw).

    Namespaces are made once: taking one down crashes a PV dom0 of this kernel. ``nvdimmctl`` is one that was started
    before.
    """
    operator.install_driver(host)
    operator.make_pmem(host)
    served.serve(host)
    return host


@pytest.fixture(scope="session")
def systemd_host(
    images: Images, shared_hosts: list[XenHost], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[XenHost]:
    """A host with Debian's systemd and three NVDIMMs, whose disk outlives a power cut; nothing of ours is on it.

    Of 1 GiB each but for region1, which is the third: QEMU has them in this order in its NFIT.
    """
    for shared in shared_hosts:
        shared.stop()
    folder = tmp_path_factory.mktemp("nvdimms")
    nvdimms = [Nvdimm(folder / f"pmem{number}.img", size) for number, size in enumerate((GIB, GIB, 160 << 20))]
    arguments = "lab.init=/sbin/init systemd.wants=lab-agent.service"
    with XenHost(images, nvdimms, linux_args=arguments, keep_disk=True, boot_timeout=400) as host:
        host.check("systemctl is-system-running --wait || true")
        yield host


@pytest.fixture
def fresh_host(images: Images, shared_hosts: list[XenHost]) -> Iterator[MakeHost]:
    """Make hosts of one's own, off yet, with the arguments of XenHost; one at a time runs, the shared one no more."""
    made: list[XenHost] = []

    def make(**options: Any) -> XenHost:
        made.append(XenHost(images, **options))
        return made[-1]

    for shared in shared_hosts:
        shared.stop()
    yield make
    for own in made:
        own.close()
