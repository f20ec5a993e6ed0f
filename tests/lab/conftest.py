# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests that need a Xen host. A lab that does not start is an error, never a skip."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import operator, served
from tests.lab.host import GIB, Nvdimm, XenHost
from tests.lab.image import Images, build
from tests.lab.release import RELEASES, Release, chosen

MakeHost = Callable[..., XenHost]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of lab tests."""
    config.addinivalue_line("markers", "lab: needs a Xen host under emulation; minutes, not seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests by release, then by host, as only one can run: shared, then of one test, then the one with systemd.

    On the shared host, tests that need no driver go first: they find it as it has started. Then the main job: it finds
    the file system as it was made, and so whole pieces of 2 MiB.
    """
    hosts = ("driver_host", "fresh_host", "systemd_host")

    def order(item: pytest.Item) -> tuple[bool, int, bool]:
        names = getattr(item, "fixturenames", ())
        place = next((place for place, name in enumerate(hosts) if name in names), -1)
        return _is_of_other_release(item), place, item.path.name != "test_main_job.py"

    items.sort(key=order)


def _is_of_other_release(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("release", chosen()) != chosen()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests on the chosen release; the main job, and in thorough runs all but the long ones, on the others too."""
    if "release" not in metafunc.fixturenames:
        return
    marks = () if metafunc.module.__name__.endswith("test_main_job") else pytest.mark.thorough
    is_long = metafunc.definition.get_closest_marker("long") is not None
    others = () if is_long else (release for release in RELEASES.values() if release != chosen())
    releases = [chosen(), *(pytest.param(release, marks=marks) for release in others)]
    metafunc.parametrize("release", releases, ids=lambda release: release.name, scope="session")


@pytest.fixture(scope="session")
def images(release: Release) -> Images:
    """Return the images of a release's lab; build them if they do not exist."""
    return build(release)


@pytest.fixture(scope="session")
def shared_hosts() -> list[XenHost]:
    """Return a list with the shared host, empty until it starts. `fresh_host` stops that host."""
    return []


@pytest.fixture(scope="session")
def host(images: Images, shared_hosts: list[XenHost]) -> Iterator[XenHost]:
    """Yield the host that all tests share, with two NVDIMMs that were empty when the run began."""
    with XenHost(images) as shared:
        shared_hosts.append(shared)
        yield shared


@pytest.fixture(scope="session")
def driver_host(host: XenHost) -> XenHost:
    """Return the shared host with the driver installed, /mnt/pmem0 (DAX) and /dev/pmem1 (raw).

    Namespaces are made once: with this kernel, a PV dom0 crashes when one is taken down. A process that is already
    started runs ``nvdimmctl`` (`served`).
    """
    operator.install_driver(host)
    operator.make_pmem(host)
    served.serve(host)
    return host


@pytest.fixture(scope="session")
def systemd_host(
    images: Images, shared_hosts: list[XenHost], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[XenHost]:
    """Yield a host with Debian's systemd, three NVDIMMs, and a disk that outlives a power cut; without the driver.

    The first two NVDIMMs have 1 GiB each. The third, of 160 MiB, is region1: QEMU has them in this order in its NFIT.
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
    """Stop the shared host; yield a function that makes hosts, not started yet, from XenHost's arguments."""
    made: list[XenHost] = []

    def make(**options: Any) -> XenHost:
        made.append(XenHost(images, **options))
        return made[-1]

    for shared in shared_hosts:
        shared.stop()
    yield make
    for own in made:
        own.close()
