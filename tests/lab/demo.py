# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a guest's persistent memory, from an empty NVDIMM to bytes that outlive a reboot."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from tests.lab import operator
from tests.lab.guest import Report, pattern
from tests.lab.host import XenHost
from tests.lab.image import build
from tests.package import PROJECT

MIB = 1 << 20
NAME = "pmem-guest"
FILE = "/mnt/pmem0/pmem-guest.img"
DISK = "/var/lib/libvirt/images/pmem-guest.img"
SEED = 2016


class Story:
    """Prints what happens, shows progress, and keeps the seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = Console(stderr=True)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Run one part of the story and print its time."""
        began = time.monotonic()
        with self._progress.status(title):
            yield
        self.seconds[title] = time.monotonic() - began
        print(f"* {title} ({self.seconds[title]:.0f} s)", flush=True)

    def tell(self, text: str) -> None:
        """Print what this part has shown."""
        for line in text.rstrip().splitlines():
            print(f"    {line}", flush=True)

    def end(self) -> None:
        """Print the seconds of each part, and the last line."""
        print("\nSeconds:")
        for title, seconds in self.seconds.items():
            print(f"  {seconds:6.1f}  {title}")
        print(f"  {sum(self.seconds.values()):6.1f}  in all\nDEMO OK")


def main() -> int:
    """Tell the story; a failure is an exception and a status other than 0."""
    story = Story()
    with story.part("Build the lab's images, unless they are there"):
        images = build()
    host = XenHost(images)
    with story.part("Boot a Xen host with two NVDIMMs"):
        host.start()
    try:
        tell(story, host)
    except BaseException:
        host.close(keep=True)
        raise
    host.close()
    story.end()
    return 0


def tell(story: Story, host: XenHost) -> None:
    """Tell the story on a running host."""
    story.tell(host.check("xl info | grep -E 'xen_version|release|virt_caps'").stdout)
    with story.part("Install nvdimm_driver in dom0 and register it with libvirt"):
        operator.install_driver(host)
    with story.part("Make a fsdax namespace with a DAX file system, and a raw namespace"):
        operator.make_pmem(host)
    story.tell(host.check("ndctl list -N -u | grep -E 'dev|mode|size'; grep pmem0 /proc/mounts").stdout)
    with story.part("Define a guest with two NVDIMMs from etc/examples/guest.xml"):
        host.put(host.images.guest_disk, DISK)
        xml = (PROJECT / "etc/examples/guest.xml").read_text(encoding="utf-8")
        host.write("/root/guest.xml", operator.with_lab_disk(xml, DISK).encode())
        host.check(f"{operator.VIRSH} define /root/guest.xml")
    story.tell(host.check(f"{operator.NVDIMMCTL} list").stdout)
    with story.part("virsh start, until the guest's Linux is up"):
        guest = operator.start(host, NAME)
        report = guest.wait_report()
    story.tell(host.check(f"grep event=started {operator.LOG} | tail -n 1").stdout)
    story.tell(seen(report))
    with story.part("Write to /dev/pmem0 in the guest"):
        guest.write("/dev/pmem0", 0, 4 * MIB, SEED)
        written = guest.sha256("/dev/pmem0", 0, 4 * MIB)
    story.tell(f"sha256 in the guest: {written}")
    with story.part("Reboot the guest"):
        guest.reboot()
    with story.part("Read it back: in the guest, and from the file in dom0"):
        in_guest = guest.sha256("/dev/pmem0", 0, 4 * MIB)
        in_dom0 = operator.host_sha256(host, FILE, 0, 4 * MIB)
        start = host.check(f"head -c 4096 {FILE}").stdout.encode()
    story.tell(f"sha256 in the guest: {in_guest}\nsha256 in dom0:      {in_dom0}")
    if not written == in_guest == in_dom0 or start != pattern(SEED, 4096):
        raise AssertionError(f"the bytes differ: written {written}, guest {in_guest}, dom0 {in_dom0}")
    with story.part("Shut the guest down"):
        guest.poweroff()


def seen(report: Report) -> str:
    """Return what the guest's Linux found, as lines."""
    lines = [f"the guest sees /dev/{disk.name}: {disk.size // MIB} MiB" for disk in report.disks]
    lines += [f"the guest sees NFIT {r.name} at {r.resource:#x}" for r in report.regions if r.resource is not None]
    return "\n".join([*lines, f"ACPI or NFIT problems in its kernel log: {len(report.problems)}"])


if __name__ == "__main__":
    sys.exit(main())
