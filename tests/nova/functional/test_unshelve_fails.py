# SPDX-License-Identifier: Apache-2.0
"""An unshelve whose start fails, of an instance with its root disk in a volume: Nova has made no disk of its own."""

from __future__ import annotations

from tests.nova.functional.base import NovaTestBase


class UnshelveTest(NovaTestBase):
    def test_the_namespace_is_wiped_and_to_be_had_again(self) -> None:
        self.flags(shelved_offload_time=0)
        self.pmem.provision("one", "ns0")
        host = self.start_host("one", "6GB:ns0")
        flavor = self.make_flavor("6GB")
        server = self.create(flavor)
        self._shelve_server(server)
        connection = host.driver._host.get_connection()
        connection.failing = True
        self.pmem.forget_calls()
        self.api.post_server_action(server["id"], {"unshelve": None})
        self.wait_until(lambda: self.api.get_server(server["id"])["OS-EXT-STS:task_state"] is None)
        assert self.pmem.verbs() == ["wipe", "release"]
        assert self.pmem.claimed() == {}
        connection.failing = False
        self.create(flavor)
