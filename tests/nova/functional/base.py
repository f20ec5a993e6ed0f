# SPDX-License-Identifier: Apache-2.0
"""nova's API, scheduler, conductor and compute in one process, with a placement service, over persistent memory.

Real: all of nova's code, placement's own WSGI application on SQLite, the compute driver, and what
:mod:`tests.nova.functional.host` says. Not real: libvirt (:mod:`tests.nova.functional.libxl`), Keystone, Neutron,
Cinder, Glance and the message bus, which are nova's fixtures; disks of instances, which its test base leaves out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt
from nova.tests.functional.libvirt import base
from nova.virt import nvdimm_ext  # noqa: F401  (lets virt_type be xen)

from nvdimm_driver.xml.parse_domain import extract
from tests.integration.loop_pmem import FileSystem
from tests.nova.functional.host import PmemHost
from tests.nova.functional.libxl import XenConnection
from tests.waiting import HANG_SECONDS, wait_until

NOVA_SLEEPS = 0.5
"""Seconds between two looks of nova's tests at a server."""
API_PASTE = Path(sys.prefix) / "etc/nova/api-paste.ini"


class NovaTestBase(base.ServersTestBase):
    """A cloud whose compute hosts are to be started with :meth:`start_host`.

    :cvar LEDGERS: the hosts, each with a pool of its name; those that share a ledger in one item.
    :ivar pmem: that of the hosts of the first item.
    """

    ADMIN_API = True
    CAST_AS_CALL = False
    microversion = "latest"
    LEDGERS: tuple[tuple[str, ...], ...] = (("one", "two"),)
    IMAGE = nova_fixtures.GlanceFixture.image1["id"]
    pmem: PmemHost

    @pytest.fixture(autouse=True)
    def _make_pmem(self, file_system: FileSystem, tmp_path: Path) -> Any:
        self.use_pmem(file_system, tmp_path)
        yield
        for pmem in self._pmems:
            pmem.close()

    def use_pmem(self, fs: FileSystem, folder: Path) -> None:
        """Make that of all hosts, before anything else."""
        self._pmems = [PmemHost(fs, folder / hosts[0], hosts) for hosts in self.LEDGERS]

    def setUp(self) -> None:
        self.pmem = self._pmems[0]
        self.flags(api_paste_config=str(API_PASTE), group="wsgi")
        self.flags(virt_type="xen", connection_uri="xen:///system", cpu_mode="none", group="libvirt")
        self._search_path = os.environ["PATH"]
        self.addCleanup(os.environ.update, PATH=self._search_path)
        super().setUp()
        # with more patience than nova's ten seconds
        waiting = partial(self.notifier.wait_for_versioned_notifications, timeout=HANG_SECONDS)
        self.notifier.wait_for_versioned_notifications = waiting

    def _setup_compute_service(self) -> None:
        self.flags(compute_driver="nvdimm_ext.XenLibvirtDriver")

    def _clear_attrs(self) -> None:
        """pytest 9 reads the attributes of a test after its cleanups; ``nova.test.TestCase`` deletes them."""

    def _wait_for_server_parameter(
        self, server: dict[str, Any], expected: dict[str, Any], max_retries: int = 0, **options: Any
    ) -> dict[str, Any]:
        """With more patience than nova's five seconds: wipes are real."""
        retries = int(HANG_SECONDS / NOVA_SLEEPS)
        waited: dict[str, Any] = super()._wait_for_server_parameter(server, expected, max_retries=retries, **options)
        return waited

    def _wait_for_migration_status(self, server: dict[str, Any], expected_statuses: list[str]) -> dict[str, Any]:
        """Wait for a migration with more patience than nova."""
        wanted = [status.lower() for status in expected_statuses]
        found: list[dict[str, Any]] = []

        def look() -> bool:
            migrations = self.admin_api.api_get("/os-migrations").body["migrations"]
            found[:] = [
                each
                for each in migrations
                if each["instance_uuid"] == server["id"] and each["status"].lower() in wanted
            ]
            return bool(found)

        self.wait_until(look)
        return found[0]

    def _wait_for_log(self, log_line_regex: str) -> None:
        """Wait for a line of the log with more patience than nova."""
        self.wait_until(lambda: re.search(log_line_regex, self.stdlog.logger.output) is not None)

    def _get_connection(
        self, host_info: Any = None, *other: Any, hostname: str | None = None, **others: Any
    ) -> XenConnection:
        host_info = host_info or libvirt.HostInfo(cpu_nodes=1, cpu_sockets=1, cpu_cores=4)
        hostname = hostname or other[-1]
        return XenConnection(self.pmem_of(hostname), hostname, host_info)

    def pmem_of(self, host: str) -> PmemHost:
        return next((pmem for pmem in self._pmems if host in pmem.pools), self.pmem)

    def start_host(self, name: str, namespaces: str) -> Any:
        """Start nova-compute on a host, or again, with what its nova.conf says of pmem."""
        self.flags(pmem_namespaces=namespaces, group="libvirt")
        os.environ["PATH"] = f"{self.pmem_of(name).bin}:{self._search_path}"
        if name in self.computes:
            self.restart_compute_service(name)
            self._force_down(name, False)
        else:
            self.start_compute(name)
        return self.computes[name]

    def stop_host(self, name: str) -> None:
        """nova-compute is away on a host, and the operator says so."""
        self.computes[name].stop()
        self._force_down(name, True)

    def _force_down(self, name: str, down: bool) -> None:
        service = self.api.get_services(host=name, binary="nova-compute")[0]
        self.api.put_service(service["id"], {"forced_down": down})

    def make_flavor(self, pmem: str) -> str:
        flavor: str = self._create_flavor(memory_mb=512, vcpu=1, disk=1, ephemeral=0, extra_spec={"hw:pmem": pmem})
        return flavor

    def create(self, flavor: str, state: str = "ACTIVE", **options: Any) -> dict[str, Any]:
        server: dict[str, Any] = self._create_server(
            image_uuid=self.IMAGE, flavor_id=flavor, networks="none", expected_state=state, **options
        )
        return server

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """:raises TimeoutError: when it does not become true."""
        wait_until(condition)

    def settled(self, server: str) -> dict[str, Any]:
        """A server when nothing is being done to it any more."""

        def look() -> dict[str, Any]:
            found: dict[str, Any] = self.api.get_server(server)
            return found

        self.wait_until(lambda: look()["status"] != "BUILD" and look()["OS-EXT-STS:task_state"] is None)
        return look()

    def xml(self, server: dict[str, Any]) -> str:
        """The domain XML that nova has made for a server."""
        connection = self.computes[server["OS-EXT-SRV-ATTR:host"]].driver._host.get_connection()
        xml: str = connection.defined[server["id"]]
        return xml

    def paths(self, server: dict[str, Any]) -> list[str]:
        """The namespaces that nova has given a server, by slot."""
        domain = extract(self.xml(server))
        return [spec.path for spec in domain.nvdimms] if domain else []

    def inventory(self, host: str) -> dict[str, int]:
        """Return placement's inventory of a host's namespaces, by label."""
        return self._by_label(
            {name: each["total"] for name, each in self._get_provider_inventory(self.compute_rp_uuids[host]).items()}
        )

    def usage(self, host: str) -> dict[str, int]:
        """How many of a host's namespaces are allocated in placement, by label."""
        return self._by_label(self._get_provider_usages(self.compute_rp_uuids[host]))

    def _by_label(self, amounts: dict[str, int]) -> dict[str, int]:
        prefix = "CUSTOM_PMEM_NAMESPACE_"
        return {name.removeprefix(prefix): amount for name, amount in amounts.items() if name.startswith(prefix)}
