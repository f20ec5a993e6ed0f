# SPDX-License-Identifier: Apache-2.0
"""An unshelve whose start fails, of an instance with its root disk in a volume: Nova has made no disk of its own."""

from __future__ import annotations

from unittest import mock

import pytest
from nova import context, exception

from tests.nova.functional.base import NovaTestBase

pytestmark = pytest.mark.thorough


class UnshelveTest(NovaTestBase):
    def setUp(self) -> None:
        super().setUp()
        self.flags(shelved_offload_time=0)
        self.pmem.provision("one", "ns0")
        self.host = self.start_host("one", "6GB:ns0")
        self.flavor = self.make_flavor("6GB")
        self.server = self.create(self.flavor)
        self._shelve_server(self.server)
        self.pmem.forget_calls()

    def unshelve(self) -> None:
        """Unshelve the instance, whose start fails."""
        connection = self.host.driver._host.get_connection()
        connection.failing = True
        self.api.post_server_action(self.server["id"], {"unshelve": None})
        self.wait_until(lambda: self.api.get_server(self.server["id"])["OS-EXT-STS:task_state"] is None)
        connection.failing = False

    def test_the_namespace_is_wiped_and_to_be_had_again(self) -> None:
        self.unshelve()
        assert self.pmem.verbs() == ["wipe", "wipe", "release"]
        assert self.pmem.claimed() == {}
        self.create(self.flavor)

    def test_what_could_not_be_given_up_is_when_the_instance_was_deleted(self) -> None:
        """Nova has taken it off the host, and deletes it without a word to the host: its domain is left there."""
        failing = exception.VPMEMCleanupFailed(dev="ns0", error="Input/output error")
        with mock.patch.object(self.host.driver, "_release", side_effect=failing):
            self.unshelve()
        assert list(self.pmem.claimed().values()) == [self.server["id"]]
        self._delete_server(self.server)
        self.flags(running_deleted_instance_timeout=0)
        self.host.manager._cleanup_running_deleted_instances(context.get_admin_context())
        assert self.pmem.claimed() == {}
        self.create(self.flavor)
