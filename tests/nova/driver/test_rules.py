# SPDX-License-Identifier: Apache-2.0
"""Decisions of the compute driver that need no host."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from nova import exception, objects
from nova.compute import task_states, vm_states
from nova.conf import CONF
from nova.virt import driver as virt_driver
from nova.virt import nvdimm_ext
from nova.virt.libvirt import blockinfo, driver
from nova.virt.libvirt import vif as libvirt_vif

from nvdimm_driver.nova.compute import command
from nvdimm_driver.nova.compute.driver import leaves_host
from nvdimm_driver.nova.compute.patches import accept_xen
from tests.nova.driver.base import HOST, NODE, UUID, DriverTest, make_flavor, make_image, make_instance

ROWS = """[
{"Name": "ns0", "Label": "6GB", "Path": "/mnt/pmem0/ns0", "Size": 6442450944, "Align": 2097152},
{"Name": "main/ns1", "Label": "16GB", "Path": "/dev/dax0.0", "Size": 17179869184, "Align": 2097152}
]"""
COMMAND = """#!/bin/sh
echo "$*" >>{folder}/calls
[ $1 != nova ] || exec cat {folder}/rows
echo "/mnt/pmem0/ns0: wiping: 1 GiB of 6 GiB done" >&2
[ ! -e {folder}/$1 ] || read status left <{folder}/$1
for last; do :; done
[ ${{left:-0}} != 0 ] || {{ [ $1 != wipe ] || echo "$last is all zeros"; exit 0; }}
echo "$status $((left - 1))" >{folder}/$1
echo "no, because" >&2
exit $status
"""


class CommandTest(DriverTest):
    """With an nvdimmctl that says what it is to say.

    :ivar folder: has its ``calls``; in a file of a verb's name, the status to fail with and how many times.
    """

    @pytest.fixture(autouse=True)
    def _make_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path
        (tmp_path / "rows").write_text(ROWS)
        (tmp_path / "calls").touch()
        program = tmp_path / "bin/nvdimmctl"
        program.parent.mkdir()
        program.write_text(COMMAND.format(folder=tmp_path))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def setUp(self) -> None:
        super().setUp()
        self.driver = self.make_driver(["6GB:ns0", "16GB:main/ns1"])
        (self.folder / "calls").write_text("")

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def resource(self, name: str) -> objects.Resource:
        return objects.Resource(
            provider_uuid=NODE, resource_class="CUSTOM", identifier=name, metadata=self.driver._vpmems_by_name[name]
        )


class InventoryTest(CommandTest):
    def test_what_nvdimmctl_says_is_what_nova_has(self) -> None:
        found = self.driver._vpmems_by_name
        assert {name: (each.label, each.devpath, each.size, each.align) for name, each in found.items()} == {
            "ns0": ("6GB", "/mnt/pmem0/ns0", 6 << 30, 2 << 20),
            "main/ns1": ("16GB", "/dev/dax0.0", 16 << 30, 2 << 20),
        }
        assert set(self.driver._vpmems_by_rc) == {"CUSTOM_PMEM_NAMESPACE_6GB", "CUSTOM_PMEM_NAMESPACE_16GB"}

    def test_it_is_asked_about_what_is_configured(self) -> None:
        self.make_driver(["6GB:ns0", "16GB:main/ns1"])
        assert self.calls() == ["nova inventory --pmem-namespaces 6GB:ns0,16GB:main/ns1 -f json"]

    def test_without_namespaces_it_is_not_asked(self) -> None:
        assert self.make_driver([])._vpmems_by_name == {}
        assert self.calls() == []

    def test_what_it_says_against_a_configuration_stops_nova_compute(self) -> None:
        (self.folder / "bin/nvdimmctl").write_text("#!/bin/sh\necho '6gb is not a label' >&2; exit 1\n")
        with pytest.raises(exception.GetPMEMNamespacesFailed, match="ended with 1: 6gb is not a label"):
            self.make_driver(["6gb:ns0"])

    def test_a_host_without_nvdimmctl(self) -> None:
        (self.folder / "bin/nvdimmctl").unlink()
        os.environ["PATH"] = str(self.folder / "bin")
        with pytest.raises(exception.GetPMEMNamespacesFailed, match="No such file or directory: 'nvdimmctl'"):
            self.make_driver(["6GB:ns0"])


class LabelTest(CommandTest):
    def test_namespaces_come_in_the_order_of_the_flavor(self) -> None:
        instance = make_instance("6GB,16GB", [self.resource("main/ns1"), self.resource("ns0")])
        found = self.driver._get_ordered_vpmems(instance, instance.flavor)
        assert [each.name for each in found] == ["ns0", "main/ns1"]

    def test_a_label_that_differs_in_case_is_not_booted_without_its_device(self) -> None:
        """Both are resource class CUSTOM_PMEM_NAMESPACE_6GB, so that the claim was had."""
        instance = make_instance("6gb", [self.resource("ns0")])
        with pytest.raises(exception.InvalidInput, match=r"hw:pmem=6gb, and instance .* has none"):
            self.driver._get_ordered_vpmems(instance, instance.flavor)


class WipeTest(CommandTest):
    def test_what_is_wiped_and_given_up_is_what_the_ledger_has_of_the_instance(self) -> None:
        instance = make_instance("6GB", [self.resource("ns0")], task_state=task_states.DELETING)
        self.driver._wipe(instance)
        self.driver._release(instance)
        assert self.calls() == [f"wipe --yes --progress {instance.uuid}", f"release --yes {instance.uuid}"]

    def test_how_it_goes_on_is_in_the_log(self) -> None:
        self.driver._wipe(make_instance("6GB", []))
        assert "/mnt/pmem0/ns0: wiping: 1 GiB of 6 GiB done" in self.stdlog.logger.output
        assert f"{UUID} is all zeros" in self.stdlog.logger.output

    def test_nothing_in_the_ledger_is_nothing_to_do(self) -> None:
        for verb in ("wipe", "release"):
            (self.folder / verb).write_text(f"{command.NOT_FOUND} 9\n")
        instance = make_instance("6GB", [])
        self.driver._wipe(instance)
        self.driver._release(instance)
        assert len(self.calls()) == 2

    def test_a_domain_that_is_dying_is_waited_for(self) -> None:
        (self.folder / "wipe").write_text(f"{command.IN_USE} 1\n")
        self.driver._wipe(make_instance("6GB", []))
        assert len(self.calls()) == 2

    def test_one_that_does_not_die_is_an_error(self) -> None:
        (self.folder / "wipe").write_text(f"{command.IN_USE} 9\n")
        self.driver.DYING_SECONDS = 0
        with pytest.raises(exception.VPMEMCleanupFailed, match="ended with 4: no, because"):
            self.driver._wipe(make_instance("6GB", []))

    def test_what_cannot_be_wiped_or_given_up_is_an_error(self) -> None:
        for verb, do in (("wipe", self.driver._wipe), ("release", self.driver._release)):
            (self.folder / verb).write_text("1 9\n")
            with pytest.raises(exception.VPMEMCleanupFailed, match=f"{verb} --yes .* ended with 1: no, because"):
                do(make_instance("6GB", []))

    def test_novas_own_zeroing_is_not_done(self) -> None:
        """It would be on hard reboot, power on and resume at host boot, too, and with daxio, for device-dax alone."""
        self.driver._cleanup_vpmems(list(self.driver._vpmems_by_name.values()))
        assert self.calls() == []

    def test_an_instance_that_moved_while_it_was_deleted(self) -> None:
        self.driver.cleanup_lingering_instance_resources(make_instance("6GB", [self.resource("ns0")]))
        assert [each.split()[0] for each in self.calls()] == ["wipe", "release"]

    def test_an_evacuated_instance_has_resources_of_another_host(self) -> None:
        elsewhere = self.resource("ns0")
        elsewhere.identifier = "ns7"
        instance = make_instance("6GB", [elsewhere], host="xen2")
        assert self.driver._get_vpmems(instance) == []


class ZerosTest(CommandTest):
    """What an instance gets, and what it leaves, is all zeros, whatever the ledger knows."""

    WIPE = "wipe --yes --progress --unclaimed /mnt/pmem0/ns0"

    def setUp(self) -> None:
        super().setUp()
        self.instance = make_instance("6GB", [self.resource("ns0")], task_state=task_states.SPAWNING)
        for name in ("spawn", "finish_migration", "_cleanup"):
            patch = mock.patch.object(driver.LibvirtDriver, name)
            patch.start()
            self.addCleanup(patch.stop)

    def spawn(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.instance, name, value)
        self.driver.spawn(self.context, self.instance, None, [], None, {})

    def delete(self) -> list[str]:
        """Return what is run besides the commands for the instance itself."""
        (self.folder / "calls").write_text("")
        self.driver._cleanup(self.context, self.instance, None, cleanup_instance_disks=True)
        first, second, *others = self.calls()
        assert [first, second] == [f"wipe --yes --progress {UUID}", f"release --yes {UUID}"]
        return others

    def test_a_new_instance_gets_zeros(self) -> None:
        self.spawn()
        assert self.calls() == [self.WIPE]

    def test_a_resized_instance_gets_zeros(self) -> None:
        self.driver.finish_migration(self.context, None, self.instance, None, None, None, True, {})
        assert self.calls() == [self.WIPE]

    def test_an_evacuated_instance_gets_zeros(self) -> None:
        self.spawn(host="xen2", task_state=task_states.REBUILD_SPAWNING)
        assert self.calls() == [self.WIPE]

    def test_an_instance_that_is_built_again_keeps_its_bytes(self) -> None:
        for state in (task_states.REBUILD_SPAWNING, task_states.RESIZE_REVERTING):
            self.spawn(task_state=state)
        assert self.calls() == []

    def test_it_is_not_started_with_what_cannot_be_wiped(self) -> None:
        for status in (1, command.NOT_FOUND, command.IN_USE):
            (self.folder / "wipe").write_text(f"{status} 9\n")
            with pytest.raises(command.CommandFailed, match=f"ended with {status}: no, because"):
                self.spawn()
        assert driver.LibvirtDriver.spawn.mock_calls == []

    def test_it_is_wiped_before_each_instance(self) -> None:
        """A domain outside Nova can have had it since the instance before: nothing of that reaches this process."""
        for _ in range(2):
            self.spawn()
            assert self.delete() == [self.WIPE]
            (self.folder / "calls").write_text("")
        self.spawn()
        assert self.calls() == [self.WIPE]

    def test_what_the_ledger_knows_is_wiped_once(self) -> None:
        patch = mock.patch.object(command, "run", return_value="/mnt/pmem0/ns0 is all zeros\n")
        with patch as run:
            self.driver._cleanup(self.context, self.instance, None, cleanup_instance_disks=True)
        assert [each.args[0] for each in run.mock_calls] == ["wipe", "release"]

    def test_a_claim_that_stays_keeps_the_domain(self) -> None:
        (self.folder / "release").write_text("1 1\n")
        with pytest.raises(exception.VPMEMCleanupFailed):
            self.driver._cleanup(self.context, self.instance, None, cleanup_instance_disks=True)
        assert driver.LibvirtDriver._cleanup.mock_calls == [], "the domain stays defined until it has given up all"

    def test_what_another_domain_has_by_now_is_left_alone(self) -> None:
        failing = command.CommandFailed(("wipe",), command.IN_USE, "belongs to domain db1")
        with mock.patch.object(self.driver, "_give_up"), mock.patch.object(command, "run", side_effect=failing):
            self.driver._cleanup(self.context, self.instance, None, cleanup_instance_disks=True)
        assert "/mnt/pmem0/ns0 was not wiped: nvdimmctl wipe ended with 4" in self.stdlog.logger.output

    def test_what_an_instance_leaves_and_cannot_be_wiped_is_an_error(self) -> None:
        failing = command.CommandFailed(("wipe",), 1, "Input/output error")
        with (
            mock.patch.object(self.driver, "_give_up"),
            mock.patch.object(command, "run", side_effect=failing),
            pytest.raises(exception.VPMEMCleanupFailed, match="Input/output error"),
        ):
            self.driver._cleanup(self.context, self.instance, None, cleanup_instance_disks=True)

    def test_the_namespaces_of_an_instance_that_is_elsewhere_are_not_those_of_this_host(self) -> None:
        self.instance.host = "xen2"
        assert self.delete() == []


DELETED = {"task_state": task_states.DELETING}
REBOOTED = {"task_state": task_states.REBOOT_STARTED_HARD}
EVACUATED = {"host": "xen2"}


@pytest.mark.parametrize(
    ("why", "fields", "destroys_disks", "goes"),
    [
        ("deleted", DELETED, True, True),
        ("a first start that failed", {"task_state": task_states.SPAWNING}, True, True),
        ("shelved, and now taken off its host", {"task_state": task_states.SHELVING_OFFLOADING}, True, True),
        ("deleted in the database long ago", {"deleted": True, "task_state": task_states.REBUILDING}, False, True),
        ("evacuated, with its disks shared", EVACUATED, False, True),
        ("evacuated, with disks of its own", EVACUATED, True, True),
        ("an evacuation that failed here", {**EVACUATED, "task_state": task_states.REBUILD_SPAWNING}, True, True),
        ("a resize to a flavor with pmem fails", {"task_state": task_states.RESIZE_FINISH}, False, True),
        ("a resize to a flavor with pmem is undone", {"task_state": task_states.RESIZE_REVERTING}, False, True),
        (
            "an unshelve that failed, with a root disk in a volume",
            {"task_state": task_states.SPAWNING, "vm_state": vm_states.SHELVED_OFFLOADED},
            False,
            True,
        ),
        ("before a host was chosen", {"host": None}, True, True),
        ("hard reboot", REBOOTED, False, False),
        ("power on, and resume at host boot", {"task_state": task_states.POWERING_ON}, False, False),
        ("rebuild", {"task_state": task_states.REBUILDING}, True, False),
        ("a rebuild that fails", {"task_state": task_states.REBUILD_SPAWNING}, True, False),
    ],
)
def test_whether_an_instance_goes_when_its_domain_ends(
    why: str, fields: dict[str, Any], destroys_disks: bool, goes: bool
) -> None:
    instance = SimpleNamespace(**({"deleted": False, "host": HOST, "vm_state": "active", "task_state": None} | fields))
    assert leaves_host(instance, HOST, destroys_disks=destroys_disks) is goes, why


class MoveTest(CommandTest):
    """Operations that would lose persistent memory are refused."""

    def test_live_migration_is_refused_on_both_hosts(self) -> None:
        instance = make_instance("6GB", [])
        for check in (self.driver.check_can_live_migrate_source, self.driver.check_can_live_migrate_destination):
            with pytest.raises(exception.MigrationPreCheckError, match="has persistent memory"):
                check(self.context, instance, None, None)

    def test_cold_migration_and_resize_are_refused_and_rolled_back(self) -> None:
        for target in ("6GB", "16GB", ""):
            with pytest.raises(exception.InstanceFaultRollback) as caught:
                self.driver.migrate_disk_and_power_off(
                    self.context, make_instance("6GB", []), "xen2", make_flavor(target), None
                )
            assert "would lose" in str(caught.value.inner_exception)

    def test_an_instance_without_any_gets_as_far_as_nova_lets_it(self) -> None:
        instance = make_instance("", [])
        larger = make_flavor("6GB")
        larger.root_gb = 0
        with pytest.raises(exception.InstanceFaultRollback) as caught:
            self.driver.migrate_disk_and_power_off(self.context, instance, "xen2", larger, None)
        assert "Unable to resize disk down" in str(caught.value.inner_exception)


class ExtensionTest(DriverTest):
    """The capabilities that Nova gets for ``virt_type = xen``."""

    def test_nova_finds_the_driver(self) -> None:
        assert isinstance(virt_driver.load_compute_driver(None), nvdimm_ext.XenLibvirtDriver)

    def test_another_virt_type_is_not_started(self) -> None:
        driver = self.make_driver([])
        self.flags(virt_type="kvm", group="libvirt")
        with pytest.raises(exception.InvalidConfiguration, match="virt_type is kvm: leave it out"):
            driver.init_host(HOST)

    def test_without_a_word_it_is_xen(self) -> None:
        CONF.clear_override("virt_type", group="libvirt")
        assert CONF.libvirt.virt_type == "xen"

    def test_nonsense_is_still_refused(self) -> None:
        with pytest.raises(ValueError, match="nonsense"):
            self.flags(virt_type="nonsense", group="libvirt")

    def test_again_makes_no_difference(self) -> None:
        before = blockinfo.get_disk_bus_for_device_type
        accept_xen()
        assert blockinfo.get_disk_bus_for_device_type is before

    def test_the_uri_is_xens(self) -> None:
        assert self.make_driver([])._uri() == "xen:///system"
        self.flags(connection_uri="xen+unix:///system?socket=/s", group="libvirt")
        assert self.make_driver([])._uri() == "xen+unix:///system?socket=/s"

    def test_disk_buses(self) -> None:
        def bus(device_type: str, **properties: str) -> str | None:
            found: str | None = blockinfo.get_disk_bus_for_device_type(
                None, "xen", make_image(**properties), device_type
            )
            return found

        assert (bus("disk"), bus("cdrom"), bus("floppy")) == ("xen", "xen", None)
        assert (bus("disk", hw_disk_bus="ide"), bus("cdrom", hw_disk_bus="ide")) == ("ide", "ide"), "hda is xvda"
        assert bus("cdrom", hw_cdrom_bus="ide") == "ide"
        with pytest.raises(exception.UnsupportedHardware):
            bus("disk", hw_disk_bus="virtio")
        assert blockinfo.find_disk_dev_for_disk_bus({}, "xen") == "xvda"
        assert blockinfo.get_disk_bus_for_disk_dev("xen", "xvdb") == "xen"
        assert blockinfo.get_disk_bus_for_disk_dev("xen", "hdb") == "ide"
        self.flags(disk_prefix="sd", group="libvirt")
        assert blockinfo.find_disk_dev_for_disk_bus({}, "xen") == "sda"

    def test_other_virt_types_are_as_they_were(self) -> None:
        assert blockinfo.get_disk_bus_for_device_type(None, "kvm", make_image(), "disk") == "virtio"
        assert blockinfo.find_disk_dev_for_disk_bus({}, "virtio") == "vda"

    def test_vif_models(self) -> None:
        assert libvirt_vif.is_vif_model_valid_for_virt("xen", "netfront")
        assert libvirt_vif.is_vif_model_valid_for_virt("xen", "e1000")
        assert not libvirt_vif.is_vif_model_valid_for_virt("xen", "virtio")
