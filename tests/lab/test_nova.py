# SPDX-License-Identifier: Apache-2.0
"""An instance with persistent memory, from spawn to deletion: Nova's libvirt driver outside, libvirtd in dom0.

Nova reaches dom0's nvdimmd, and through it libvirtd, and dom0's nvdimmctl on forwarded TCP ports. The parts of Nova
that are real are listed in ``tests/nova/lab_compute.py``. Instances are in the folder that dom0 shares with this
machine.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import SHARE, XenHost
from tests.lab.image import GUEST_LINUX_ARGS
from tests.package import PROJECT

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
MIB = 1 << 20
PYTHON = PROJECT / ".venv-nova" / "bin" / "python"
COMPUTE = PROJECT / "tests" / "nova" / "lab_compute.py"
UUID = "4e6f7661-0000-4000-8000-00000000a11c"
NAMESPACES = {"34MB": ("ns0", 34), "18MB": ("main/ns1", 18)}
PATHS = ["/mnt/pmem0/ns0", "/mnt/pmem0/ns1"]
LIBVIRT_PORT, COMMAND_PORT = 16509, 16510
FORWARD = """\
setsid systemd-socket-activate -l {libvirt} /lib/systemd/systemd-socket-proxyd /run/libvirt/virtxend-sock \\
    >/var/log/forward.log 2>&1 </dev/null & echo $! >/run/forward.pids
setsid systemd-socket-activate -l {command} --accept --inetd python3 /root/serve-nvdimmctl \\
    >>/var/log/forward.log 2>&1 </dev/null & echo $! >>/run/forward.pids
"""
SERVE_NVDIMMCTL = """\
import json, subprocess, sys
done = subprocess.run(["nvdimmctl", *json.loads(sys.stdin.readline())], capture_output=True, text=True)
print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""
NVDIMMCTL = """\
#!/usr/bin/env python3
import json, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as connection, connection.makefile("rw") as stream:
    print(json.dumps(sys.argv[1:]), file=stream, flush=True)
    status, printed, said = json.loads(stream.readline())
sys.stdout.write(printed)
sys.stderr.write(said)
sys.exit(status)
"""
NOVA_CONF = """\
[DEFAULT]
host = dom0
instances_path = {instances}
state_path = {folder}
[libvirt]
connection_uri = xen+tcp://127.0.0.1:{port}/system
cpu_mode = none
images_type = raw
pmem_namespaces = {namespaces}
[database]
connection = sqlite:///{folder}/main.sqlite
[api_database]
connection = sqlite:///{folder}/api.sqlite
[oslo_concurrency]
lock_path = {folder}/locks
[vnc]
enabled = false
"""


class Compute:
    """A process with Nova's compute driver."""

    def __init__(self, conf: Path, search_path: Path) -> None:
        self._log = (conf.parent / "nova.log").open("w+")
        self._process = subprocess.Popen(
            [PYTHON, "-W", "ignore", COMPUTE, "--config-file", conf],
            cwd=conf.parent,
            env={"PATH": f"{search_path}:/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, do: str | None = None, **arguments: Any) -> Any:
        """Send an order, if any, and return its result."""
        assert self._process.stdin
        assert self._process.stdout
        if do:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        assert "error" not in answer, f"{do}: {answer['error']}\n{self._said()}"
        return answer["result"]

    def close(self) -> None:
        self._process.terminate()  # Nova's threads do not end by themselves
        self._process.communicate()
        self._log.close()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()


@pytest.fixture(scope="module")
def compute(driver_host: XenHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compute]:
    """Provision namespaces; yield a process with Nova's compute driver, configured with them."""
    xen, folder = driver_host, tmp_path_factory.mktemp("nova")
    for name, size in NAMESPACES.values():
        xen.check(f"nvdimmctl provision --pool main {Path(name).name} --size {size}M --label-size 2M")
    instances = _make_instances(xen)
    xen.write("/root/serve-nvdimmctl", SERVE_NVDIMMCTL.encode())
    xen.check(FORWARD.format(libvirt=LIBVIRT_PORT, command=COMMAND_PORT))
    command = folder / "bin" / "nvdimmctl"
    command.parent.mkdir()
    command.write_text(NVDIMMCTL.format(port=xen.forward(COMMAND_PORT)))
    command.chmod(0o755)
    conf = folder / "nova.conf"
    namespaces = ",".join(f"{label}:{name}" for label, (name, _) in NAMESPACES.items())
    port = xen.forward(LIBVIRT_PORT)
    conf.write_text(NOVA_CONF.format(folder=folder, instances=instances, port=port, namespaces=namespaces))
    made = Compute(conf, command.parent)
    try:
        made.ask()
        yield made
    finally:
        made.close()
    xen.check(f"kill $(cat /run/forward.pids); umount {instances}; rm -f {' '.join(PATHS)}")


def _make_instances(xen: XenHost) -> Path:
    """Make Nova's folder, at the same path for Nova and dom0, with the image in its cache; return it."""
    instances = xen.share / "nova"
    cache = instances / "_base"
    cache.mkdir(parents=True)
    images = (bytes(MIB), xen.images.guest_kernel.read_bytes(), xen.images.guest_initrd.read_bytes())
    for number, data in enumerate(images, 1):
        image = f"{number:08x}-0000-4000-8000-000000000000"
        (cache / sha1(image.encode()).hexdigest()).write_bytes(data)
    xen.check(f"mkdir -p {instances} && mount --bind {SHARE}/nova {instances}")
    return instances


@pytest.fixture(scope="module")
def guest(driver_host: XenHost, compute: Compute) -> Guest:
    """Spawn an instance; return its guest."""
    guest = Guest(driver_host, "instance-00000001")
    names = [name for name, _ in NAMESPACES.values()]
    arguments = {"labels": ",".join(NAMESPACES), "names": names, "ram_mib": 256, "command_line": GUEST_LINUX_ARGS}
    assert compute.ask("spawn", uuid=UUID, **arguments) == guest.name
    return guest


def content(xen: XenHost) -> list[str]:
    """Return the SHA-256 of each namespace in dom0."""
    return [
        operator.host_sha256(xen, path, 0, size * MIB)
        for path, (_, size) in zip(PATHS, NAMESPACES.values(), strict=True)
    ]


def claimed(xen: XenHost) -> list[str]:
    """Return the paths of the namespaces that domains own."""
    return [row["Path"] for row in json.loads(xen.check("nvdimmctl list -f json").stdout) if row["Path"] in PATHS]


def test_the_host_has_what_its_pools_have(compute: Compute) -> None:
    assert compute.ask("inventory") == {
        f"CUSTOM_PMEM_NAMESPACE_{label}": [{"name": name, "path": path, "size": size * MIB}]
        for path, (label, (name, size)) in zip(PATHS, NAMESPACES.items(), strict=True)
    }


def test_an_instance_sees_its_nvdimms(driver_host: XenHost, guest: Guest) -> None:
    report = guest.wait_report(300)
    assert report.problems == ()
    assert [disk.size for disk in report.disks] == [(size - 2) * MIB for _, size in NAMESPACES.values()]
    assert operator.show(driver_host, UUID)["name"] == guest.name
    assert claimed(driver_host) == PATHS
    for number in range(len(report.disks)):
        guest.write(f"/dev/pmem{number}", 0, 4 * MIB, number)


def test_a_hard_reboot_keeps_the_data(driver_host: XenHost, compute: Compute, guest: Guest) -> None:
    sizes = [(size - 2) * MIB for _, size in NAMESPACES.values()]
    seen = [guest.sha256(f"/dev/pmem{number}", 0, 4 * MIB) for number in range(len(sizes))]
    stored = content(driver_host)
    report = guest.next_boot(lambda: compute.ask("hard_reboot"), 300)
    assert [disk.size for disk in report.disks] == sizes
    assert [guest.sha256(f"/dev/pmem{number}", 0, 4 * MIB) for number in range(len(sizes))] == seen
    assert content(driver_host) == stored


def test_the_end_of_an_instance_zeroes_and_frees_them(driver_host: XenHost, compute: Compute) -> None:
    zeros = [sha256(bytes(size * MIB)).hexdigest() for _, size in NAMESPACES.values()]
    assert content(driver_host) != zeros
    compute.ask("delete")
    assert content(driver_host) == zeros
    assert claimed(driver_host) == []
