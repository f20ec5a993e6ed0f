# SPDX-License-Identifier: Apache-2.0
"""Instances with ``hw:pmem`` that are to leave their host, or have left it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import fixtures
import pytest
from nova import context, exception

from tests.nova.functional.base import NovaTestBase

pytestmark = pytest.mark.thorough

LIBVIRT_DRIVER = "nova.virt.libvirt.driver.LibvirtDriver"
DATA = b"the guest's data"
OTHER_DATA = b"that of another guest"
SIZE = 16 << 20


class EvacuationTest(NovaTestBase):
    """Namespaces of two hosts have the same names, and an evacuated instance gets one of another name than it had."""

    LEDGERS = (("one",), ("two",))

    def setUp(self) -> None:
        super().setUp()
        for pmem, host in zip(self._pmems, ("one", "two"), strict=True):
            pmem.provision(host, "ns0", "ns1")
        self.start_host("one", "6GB:ns0|ns1")
        self.flavor = self.make_flavor("6GB")
        self.server = self.create(self.flavor)
        self.stays = self.create(self.flavor)
        self.name, self.other = (self.paths(each)[0].rpartition("/")[2] for each in (self.server, self.stays))
        self.pmem.write("one", self.name, DATA)
        self.pmem.write("one", self.other, OTHER_DATA)
        self.start_host("two", f"6GB:{self.other}")
        self.driver = type(self.computes["one"].driver)

    def evacuate(self) -> dict[str, Any]:
        self.stop_host("one")
        server: dict[str, Any] = self._start_server(self._evacuate_server(self.server, expected_host="two"))
        return server

    def test_it_starts_with_zeros_and_what_it_left_is_wiped_when_the_host_is_back(self) -> None:
        server = self.evacuate()
        second = self.pmem_of("two")
        assert self.paths(server) == [str(second.path("two", self.other))]
        assert second.read("two", self.other) == bytes(SIZE)
        second.write("two", self.other, DATA)
        self.pmem.forget_calls()
        self.start_host("one", "6GB:ns0|ns1")
        assert self.pmem.read("one", self.name) == bytes(SIZE)
        assert self.pmem.read("one", self.other).startswith(OTHER_DATA)
        assert self.pmem.claimed() == {str(self.pmem.path("one", self.other)): self.stays["id"]}
        assert second.claimed() == {str(second.path("two", self.other)): server["id"]}
        assert second.read("two", self.other).startswith(DATA)
        assert self.usage("one") == {"6GB": 1}
        self.create(self.flavor, host="one")

    def test_what_cannot_be_wiped_stops_no_other_instance(self) -> None:
        self.evacuate()
        failing = exception.VPMEMCleanupFailed(dev="ns0", error="Input/output error")
        with mock.patch.object(self.driver, "_wipe", side_effect=failing):
            self.start_host("one", "6GB:ns0|ns1")
        self._wait_for_log(f"stay claimed.*Input/output error.*nvdimmctl release {self.server['id']}")
        assert set(self.pmem.claimed().values()) == {self.server["id"], self.stays["id"]}
        assert self.pmem.read("one", self.name).startswith(DATA)
        self.start_host("one", "6GB:ns0|ns1")
        self._wait_for_log(f"No instance can have namespace {self.name}: .*{self.server['id']}, which Nova")


class RefusedMoveTest(NovaTestBase):
    """Moves that would lose the data are refused before anything is done: NVDIMMs do not go with an instance."""

    def setUp(self) -> None:
        super().setUp()
        self.pmem.provision("one", "ns0", "ns1")
        self.pmem.provision("two", "ns0", "ns1")
        self.start_host("one", "6GB:one/ns0|one/ns1")
        self.flavor = self.make_flavor("6GB")
        self.server = self.create(self.flavor)
        (self.path,) = self.paths(self.server)
        self.pmem.write("one", self.path.rpartition("/")[2], DATA)
        self.start_host("two", "6GB:two/ns0|two/ns1")
        self.pmem.forget_calls()

    def refused(self, action: str, body: object) -> str:
        """Ask for an action that fails; what nova says of it."""
        self.api.post_server_action(self.server["id"], {action: body})
        self.wait_until(lambda: self._failures() != [])
        server = self.settled(self.server["id"])
        assert server["status"] == "ACTIVE"
        assert server["OS-EXT-SRV-ATTR:host"] == "one"
        assert self.pmem.running() == {self.server["id"]}
        assert self.pmem.claimed() == {self.path: self.server["id"]}
        assert self.pmem.read("one", self.path.rpartition("/")[2]).startswith(DATA)
        self.wait_until(lambda: (self.usage("one"), self.usage("two")) == ({"6GB": 1}, {"6GB": 0}))
        assert self.pmem.verbs() == []
        return "\n".join(self._failures())

    def _failures(self) -> list[str]:
        actions = self.api.get_instance_actions(self.server["id"])
        details = [
            self.api.get_instance_action_details(self.server["id"], each["request_id"])["events"] for each in actions
        ]
        return [event["details"] or "" for events in details for event in events if event["result"] == "Error"]

    def test_live_migration(self) -> None:
        assert "persistent memory (hw:pmem)" in self.refused(
            "os-migrateLive", {"host": None, "block_migration": "auto"}
        )

    def test_cold_migration(self) -> None:
        assert "persistent memory (hw:pmem)" in self.refused("migrate", None)

    def test_resize_to_more(self) -> None:
        assert "persistent memory (hw:pmem)" in self.refused("resize", {"flavorRef": self.make_flavor("6GB,6GB")})

    def test_resize_to_none(self) -> None:
        plain = self._create_flavor(memory_mb=512, vcpu=1, disk=1, ephemeral=0)
        assert "persistent memory (hw:pmem)" in self.refused("resize", {"flavorRef": plain})

    def test_shelving_is_not_refused_and_wipes(self) -> None:
        """Nova asks the driver only when it takes the instance off the host, and gives its namespace to others then."""
        self.flags(shelved_offload_time=0)
        self._shelve_server(self.server)
        assert self.pmem.verbs() == ["wipe", "release"]
        assert self.pmem.claimed() == {}
        assert self.usage("one") == {"6GB": 0}
        server = self._unshelve_server(self.server)
        (path,) = self.paths(server)
        host, name = path.split("/")[-2:]
        assert self.pmem.read(host, name) == bytes(SIZE)


class ResizeTest(NovaTestBase):
    """An instance without persistent memory may be resized to a flavor that has some."""

    def setUp(self) -> None:
        super().setUp()
        # What nova's own functional tests of resizes leave out (nova/tests/functional/libvirt/test_vpmem.py).
        self.useFixture(fixtures.MockPatch(f"{LIBVIRT_DRIVER}._get_instance_disk_info", return_value=[]))
        self.useFixture(fixtures.MockPatch("os.rename"))
        self.pmem.provision("two", "ns0")
        self.start_host("one", "")
        self.server = self.create(self._create_flavor(memory_mb=512, vcpu=1, disk=1, ephemeral=0))
        self.start_host("two", "6GB:two/ns0")
        self.flavor = self.make_flavor("6GB")

    def resize(self) -> None:
        self._resize_server(self.server, self.flavor)
        self.pmem.write("two", "ns0", DATA)
        self.pmem.forget_calls()

    def test_it_keeps_them_when_it_is_confirmed(self) -> None:
        self.resize()
        self._confirm_resize(self.server)
        assert self.pmem.claimed() == {str(self.pmem.path("two", "ns0")): self.server["id"]}
        assert self.pmem.read("two", "ns0").startswith(DATA)
        assert self.pmem.verbs() == []

    def test_they_are_free_again_when_its_start_fails(self) -> None:
        connection = self.computes["two"].driver._host.get_connection()
        connection.failing = True
        self.api.post_server_action(self.server["id"], {"resize": {"flavorRef": self.flavor}})
        self._wait_for_state_change(self.server, "ERROR")
        assert self.pmem.claimed() == {}
        connection.failing = False
        self._reboot_server(self.server, hard=True)

    def test_they_are_wiped_when_it_is_reverted(self) -> None:
        self.resize()
        self._revert_resize(self.server)
        assert self.pmem.verbs() == ["wipe", "release"]
        assert self.pmem.read("two", "ns0") == bytes(SIZE)
        assert self.pmem.claimed() == {}
        self.create(self.flavor)


class LocalDeletionTest(NovaTestBase):
    """Deleted while its host was away: placement takes its namespace for free, and its data are there still."""

    def test_it_is_wiped_when_the_host_is_back(self) -> None:
        self.pmem.provision("one", "ns0")
        self.start_host("one", "6GB:one/ns0")
        flavor = self.make_flavor("6GB")
        server = self.create(flavor)
        self.pmem.write("one", "ns0", DATA)
        self.stop_host("one")
        self._delete_server(server)
        assert self.usage("one") == {"6GB": 0}
        self.start_host("one", "6GB:one/ns0")
        self._wait_for_log(f"No instance can have namespace one/ns0: .*{server['id']}, which Nova")
        self.create(flavor, "ERROR")
        assert self.pmem.read("one", "ns0").startswith(DATA)
        self.flags(running_deleted_instance_timeout=0)
        self.computes["one"].manager._cleanup_running_deleted_instances(context.get_admin_context())
        assert self.pmem.read("one", "ns0") == bytes(SIZE)
        assert self.pmem.claimed() == {}
        self.create(flavor)


class FailedStartTest(NovaTestBase):
    """The namespaces of a start that failed are free for the next."""

    def test_it_is_free(self) -> None:
        self.pmem.provision("one", "ns0")
        self.start_host("one", "6GB:one/ns0")
        flavor = self.make_flavor("6GB")
        connection = self.computes["one"].driver._host.get_connection()
        connection.failing = True
        self.create(flavor, "ERROR")
        connection.failing = False
        assert self.pmem.claimed() == {}
        self.wait_until(lambda: self.usage("one") == {"6GB": 0})
        self.create(flavor)
