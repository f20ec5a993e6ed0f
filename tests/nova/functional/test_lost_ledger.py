# SPDX-License-Identifier: Apache-2.0
"""The ledger is lost, or is from a backup, and does not know an instance: its bytes are no other instance's still."""

from __future__ import annotations

from tests.nova.functional.base import NovaTestBase

DATA = b"the first tenant's data"
SIZE = 16 << 20


class LostLedgerTest(NovaTestBase):
    """The namespace has no mark of its owner, as a device has none."""

    def setUp(self) -> None:
        super().setUp()
        self.pmem.provision("one", "ns0")
        self.start_host("one", "6GB:ns0")
        self.flavor = self.make_flavor("6GB")
        self.server = self.create(self.flavor)
        self.pmem.write("one", "ns0", DATA)
        self._stop_server(self.server)

    def has_data(self) -> bool:
        return self.pmem.read("one", "ns0").startswith(DATA)

    def is_zeros(self) -> bool:
        return self.pmem.read("one", "ns0") == bytes(SIZE)

    def test_a_delete_wipes_what_nova_says_that_the_instance_has(self) -> None:
        self.pmem.lose_ledger(marks=False)
        self._delete_server(self.server)
        assert self.is_zeros()
        self.create(self.flavor)
        assert self.is_zeros()

    def test_a_rebuild_and_a_hard_reboot_keep_the_bytes(self) -> None:
        self.pmem.lose_ledger(marks=False)
        self._rebuild_server(self.server, self.IMAGE, expected_state="SHUTOFF")
        assert self.has_data()
        self.pmem.lose_ledger(marks=False)
        self._start_server(self.server)
        assert self.has_data()
        assert self.pmem.running() == {self.server["id"]}

    def test_nobody_gets_a_file_with_a_mark(self) -> None:
        self.pmem.lose_ledger(marks=True)
        self._delete_server(self.server)
        self._wait_for_log("ns0 was not wiped: .*has the mark of domain")
        self.create(self.flavor, "ERROR")
        self._wait_for_log("Error from last host: .*has the mark of domain")
        assert self.has_data()

    def test_what_the_operator_released_without_a_wipe_is_wiped_for_the_next(self) -> None:
        """Nova deletes nothing of an instance whose claim is given up, and knows what it had."""
        self.pmem.nvdimmctl("release", "--yes", self.server["id"])
        self._delete_server(self.server)
        assert self.is_zeros()


class NewHostTest(NovaTestBase):
    """The disk of a host is lost with its ledger and libvirt's definitions, and nobody deletes what it had."""

    LEDGERS = (("one",), ("two",))

    def test_the_next_instance_gets_zeros(self) -> None:
        for pmem, host in zip(self._pmems, ("one", "two"), strict=True):
            pmem.provision(host, "ns0")
        host = self.start_host("one", "6GB:ns0")
        flavor = self.make_flavor("6GB")
        server = self.create(flavor)
        self.pmem.write("one", "ns0", DATA)
        self.start_host("two", "6GB:ns0")
        self.stop_host("one")
        self._evacuate_server(server, expected_host="two")
        connection = host.driver._host.get_connection()
        connection.lookupByUUIDString(server["id"]).destroy()
        connection.lookupByUUIDString(server["id"]).undefine()
        self.pmem.lose_ledger(marks=False)
        self.start_host("one", "6GB:ns0")
        assert self.pmem.read("one", "ns0").startswith(DATA)
        self.create(flavor, host="one")
        assert self.pmem.read("one", "ns0") == bytes(SIZE)
