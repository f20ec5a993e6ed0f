# SPDX-License-Identifier: Apache-2.0
"""An instance with ``hw:pmem`` from start to deletion: whose its namespaces are, and what is in them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from nova import context, exception, objects
from nova.compute import task_states

from tests.nova.functional.base import NovaTestBase

DATA = b"the guest's data"
SIZE = 16 << 20


class LifeTest(NovaTestBase):
    """A host with two namespaces, an instance that has one of them, and data in it."""

    NAMESPACES = "6GB:one/ns0|one/ns1"

    def setUp(self) -> None:
        super().setUp()
        self.pmem.provision("one", "ns0", "ns1")
        self.start_host("one", self.NAMESPACES)
        self.flavor = self.make_flavor("6GB")
        self.server = self.create(self.flavor)
        (path,) = self.paths(self.server)
        self.name = path.rpartition("/")[2]
        self.other = "ns0" if self.name == "ns1" else "ns1"
        self.pmem.write("one", self.name, DATA)
        self.pmem.forget_calls()

    def has_data(self) -> bool:
        return self.pmem.read("one", self.name).startswith(DATA)

    def is_zeros(self) -> bool:
        return self.pmem.read("one", self.name) == bytes(SIZE)

    def owner(self) -> str | None:
        return self.pmem.claimed().get(str(self.pmem.path("one", self.name)))

    def is_free(self) -> bool:
        return self.owner() is None and self.usage("one") == {"6GB": 0}

    def is_kept(self) -> bool:
        return self.owner() == self.server["id"] and self.usage("one") == {"6GB": 1}

    def instance(self) -> Any:
        return objects.Instance.get_by_uuid(context.get_admin_context(), self.server["id"])

    # --- what keeps the data ---

    def test_a_hard_reboot_keeps_them(self) -> None:
        self._reboot_server(self.server, hard=True)
        assert self.has_data()
        assert self.is_kept()
        assert self.pmem.running() == {self.server["id"]}
        assert self.pmem.verbs() == []

    def test_off_and_on_keeps_them(self) -> None:
        self._stop_server(self.server)
        assert self.pmem.running() == set()
        assert self.is_kept()
        self._start_server(self.server)
        assert self.has_data()
        assert self.is_kept()
        assert self.pmem.verbs() == []

    def test_a_rebuild_keeps_them(self) -> None:
        self._rebuild_server(self.server, self.IMAGE)
        assert self.has_data()
        assert self.is_kept()
        assert self.pmem.verbs() == []

    def test_the_host_boots(self) -> None:
        """Instances that were running are started again, by a hard reboot."""
        self.flags(resume_guests_state_on_host_boot=True)
        connection = self.computes["one"].driver._host.get_connection()
        connection.lookupByUUIDString(self.server["id"]).destroy()
        self.start_host("one", self.NAMESPACES)
        self.wait_until(lambda: self.pmem.running() == {self.server["id"]})
        assert self.has_data()
        assert self.is_kept()
        assert self.pmem.verbs() == []

    def test_a_deletion_that_is_taken_back(self) -> None:
        """With ``reclaim_instance_interval``, a deleted instance is kept for a time."""
        self.flags(reclaim_instance_interval=3600)
        self.api.delete_server(self.server["id"])
        self._wait_for_state_change(self.server, "SOFT_DELETED")
        assert self.is_kept()
        self.api.post_server_action(self.server["id"], {"restore": {}})
        self._wait_for_state_change(self.server, "ACTIVE")
        assert self.has_data()
        assert self.is_kept()
        assert self.pmem.verbs() == []

    def test_it_is_wiped_when_its_time_is_over(self) -> None:
        self.flags(reclaim_instance_interval=1)
        self.api.delete_server(self.server["id"])
        self._wait_for_state_change(self.server, "SOFT_DELETED")
        time.sleep(2)
        self.computes["one"].manager._reclaim_queued_deletes(context.get_admin_context())
        self._wait_until_deleted(self.server)
        assert self.pmem.verbs() == ["wipe", "release"]
        assert self.is_zeros()
        assert self.is_free()

    # --- restarts of nova-compute ---

    def test_a_restart_keeps_claims(self) -> None:
        (assigned,) = self.instance().resources
        assert (assigned.metadata.devpath, assigned.metadata.size) == (str(self.pmem.path("one", self.name)), SIZE)
        for _ in range(2):
            self.start_host("one", self.NAMESPACES)
            tracker = self.computes["one"].rt
            reported = tracker.provider_tree.data("one").resources["CUSTOM_PMEM_NAMESPACE_6GB"]
            assert assigned in reported, "name, path, size and align are the same"
            assert tracker.assigned_resources[assigned.provider_uuid][assigned.resource_class] == {assigned}
            assert self.inventory("one") == {"6GB": 2}
            assert self.is_kept()
        assert "were not listed in the configuration" not in self.stdlog.logger.output
        second = self.create(self.flavor)
        assert self.paths(second) == [str(self.pmem.path("one", self.other))]
        self.create(self.flavor, "ERROR")
        self._reboot_server(self.server, hard=True)
        assert self.paths(self.server) == [str(self.pmem.path("one", self.name))]
        assert self.has_data()

    def test_another_order_in_the_configuration_changes_nothing(self) -> None:
        self.start_host("one", "6GB:one/ns1|one/ns0")
        second = self.create(self.flavor)
        assert self.paths(second) == [str(self.pmem.path("one", self.other))]

    def test_a_namespace_that_an_instance_has_is_not_configured_any_more(self) -> None:
        self.start_host("one", f"6GB:one/{self.other}")
        self._wait_for_log(f"were not listed in the configuration.*one/{self.name}")
        assert self.owner() == self.server["id"]
        assert self.has_data()

    def test_nvdimmctl_does_not_work(self) -> None:
        """nova-compute does not start, rather than report what is not so."""
        (self.pmem.folder / "conf").write_text("[DEFAULT]\nstate_directory = /\n")
        with pytest.raises(exception.NovaException, match="state_directory"):
            self.start_host("one", self.NAMESPACES)
        assert self.pmem.running() == {self.server["id"]}
        assert self.has_data()

    # --- deletion ---

    def test_delete_wipes_and_gives_up_the_claim(self) -> None:
        self._delete_server(self.server)
        assert self.pmem.verbs() == ["wipe", "release"]
        assert self.is_zeros()
        assert self.is_free()
        again = [self.create(self.flavor) for _ in range(2)]
        assert {path for each in again for path in self.paths(each)} == {
            str(self.pmem.path("one", name)) for name in ("ns0", "ns1")
        }

    def test_it_is_not_free_before_it_is_wiped_and_given_up(self) -> None:
        self.create(self.flavor)
        self.pmem.forget_calls()
        with self.pmem.held("release"):
            with self.pmem.held("wipe"):
                self.api.delete_server(self.server["id"])
                self.wait_until(lambda: self.pmem.verbs() == ["wipe"])
                assert self.server["id"] not in self.pmem.running()
                self.check_deleting()
                assert self.has_data()
            self.wait_until(lambda: self.pmem.verbs() == ["wipe", "release"])
            self.check_deleting()
            assert self.is_zeros()
        self._wait_until_deleted(self.server)
        assert self.paths(self.create(self.flavor)) == [str(self.pmem.path("one", self.name))]

    def check_deleting(self) -> None:
        assert self.owner() == self.server["id"]
        assert self.usage("one") == {"6GB": 2}
        self.create(self.flavor, "ERROR")

    def test_a_wipe_that_fails(self) -> None:
        self.create(self.flavor)
        self.pmem.mount("ro")
        try:
            self.api.delete_server(self.server["id"])
            failed = self._wait_for_state_change(self.server, "ERROR")
            assert "Read-only file system" in failed["fault"]["details"]
            self.check_deleting()
        finally:
            self.pmem.mount("rw")
        assert self.has_data()
        self._delete_server(failed)
        assert self.is_zeros()
        assert self.owner() is None
        self.create(self.flavor)

    def test_nova_compute_died_before_it_wiped(self) -> None:
        self.die_deleting()

    def test_nova_compute_died_after_it_wiped(self) -> None:
        self.die_deleting(["wipe", "-y", self.pmem.path("one", self.name)])

    def test_nova_compute_died_after_it_gave_up_the_claim(self) -> None:
        self.die_deleting(["wipe", "-y", self.pmem.path("one", self.name)], ["release", "-y", self.server["id"]])

    def die_deleting(self, *done: list[object]) -> None:
        """nova-compute dies after these commands of a deletion, and is started again."""
        self.computes["one"].driver._host.get_connection().lookupByUUIDString(self.server["id"]).destroy()
        for words in done:
            self.pmem.nvdimmctl(*words)
        instance = self.instance()
        instance.task_state = task_states.DELETING
        instance.save()
        self.start_host("one", self.NAMESPACES)
        self._wait_until_deleted(self.server)
        assert self.is_zeros()
        assert self.is_free()


class LabelTest(NovaTestBase):
    """Resource classes are upper case, whatever a label is; nova compares the labels of flavor and configuration."""

    def setUp(self) -> None:
        super().setUp()
        self.pmem.provision("one", "ns0")

    def test_a_flavor_in_lower_case_boots_nothing_without_its_pmem(self) -> None:
        self.start_host("one", "6GB:one/ns0")
        refused = self.create(self.make_flavor("6gb"), "ERROR")
        assert "6gb" in refused["fault"]["details"]
        assert self.pmem.running() == set()
        assert self.usage("one") == {"6GB": 0}

    def test_a_configuration_in_lower_case_is_refused_at_start(self) -> None:
        with pytest.raises(exception.NovaException, match="6gb"):
            self.start_host("one", "6gb:one/ns0")
