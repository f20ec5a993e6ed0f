# SPDX-License-Identifier: Apache-2.0
"""The files that an operator gets in etc/nova."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nova
import pytest
from nova import utils
from nova.conf import compute, libvirt
from oslo_config import cfg
from oslo_rootwrap import wrapper

from nvdimm_driver.nova import RELEASE, pmem_namespaces
from nvdimm_driver.nova.compute import command
from nvdimm_driver.nova.compute.compatibility import NOTHING
from nvdimm_driver.nova.compute.patches import accept_xen
from tests.nova.driver.base import UUID, DriverTest
from tests.waiting import HANG_SECONDS

ETC = Path(__file__).parents[3] / "etc/nova"
FILTERS = ETC / "rootwrap.d"
ROOTWRAP = "[DEFAULT]\nfilters_path = {filters}\nexec_dirs = {bin}\nuse_syslog = False\n"


HOSTILE = [
    "--log-file=/etc/nologin",
    "--log-f=/etc/nologin",
    "--config-file=/tmp/conf",
    "--config=/tmp/conf",
    "--debug",
    "--verbose",
    "-v",
    "-h",
    "--",
    "-",
    "/etc/shadow",
    "../../etc/shadow",
    "''",
]
"""Arguments with which a program that runs as root could be made to read or write another file."""
ALLOWED = [
    "nova inventory --pmem-namespaces '6GB:ns0|ns1,16GB:main/ns2' -f json",
    f"wipe --yes --progress {UUID}",
    "wipe --yes --progress --unclaimed /mnt/pmem0/ns0",
    f"release --yes {UUID}",
]


def ends(line: str) -> list[int]:
    """Return where the words of a line end."""
    return [at for at in range(1, len(line) + 1) if not line[at - 1].isspace() and line[at : at + 1].strip() == ""]


def allowed(*words: str) -> bool:
    try:
        return wrapper.match_filter(wrapper.load_filters([str(FILTERS)]), list(words), ["/bin"]) is not None
    except (wrapper.NoFilterMatched, wrapper.FilterMatchNotExecutable) as error:
        return isinstance(error, wrapper.FilterMatchNotExecutable)  # there is no nvdimmctl in /bin


@pytest.mark.parametrize("line", ALLOWED)
def test_what_the_driver_runs_is_allowed(line: str) -> None:
    assert allowed("nvdimmctl", *shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        "nvdimmctl wipe --yes --progress /mnt/pmem0/ns0",
        f"nvdimmctl wipe --yes --progress {UUID} {UUID}",
        f"nvdimmctl release --yes --delete {UUID}",
        f"nvdimmctl release --delete {UUID}",
        "nvdimmctl release --yes db1",
        f"nvdimmctl --config-file /tmp/c release --yes {UUID}",
        "nvdimmctl export db1 /tmp/x",
        "nvdimmctl nova inventory --nova-config /etc/shadow -f json",
        f"/tmp/nvdimmctl/x release --yes {UUID}",
        *(f"nvdimmctl nova inventory --pmem-namespaces {each} -f json" for each in HOSTILE),
        *(
            f"nvdimmctl {line}"
            for each in HOSTILE
            for line in (f"wipe --yes --progress {each}", f"release --yes {each}")
        ),
        *(f"nvdimmctl wipe --yes --progress --unclaimed {each}" for each in HOSTILE if not each.startswith("/")),
        "nvdimmctl wipe --yes --progress --unclaimed '/mnt/pmem0/ns0\n'",
        "nvdimmctl wipe --yes --progress --unclaimed '/mnt/pmem0/ns0 --log-file=/etc/nologin'",
        f"nvdimmctl wipe --yes --progress --unclaimed {UUID}",
        *(f"nvdimmctl {line} {each}" for each in HOSTILE for line in ALLOWED),
        *(f"nvdimmctl {each} {line}" for each in HOSTILE for line in ALLOWED),
        *(line[:end] + "'\n'" + line[end:] for line in map("nvdimmctl {}".format, ALLOWED) for end in ends(line)),
        f"nvdimmctl release --yes 'x\n{UUID}'",
        f"nvdimmctl release --yes {UUID[:-1]}",
        "nvdimmctl nova inventory --pmem-namespaces '6GB:ns0\n' -f json",
        "nvdimmctl nova inventory --pmem-namespaces '6GB:ns0 --log-file=/etc/nologin' -f json",
        "nvdimmctl nova inventory --pmem-namespaces 6GB:ns0 -f shell",
        "nvdimmctl nova inventory --pmem-namespaces 6GB:ns0 --format json",
        "nvdimmctl help release",
        "nvdimmctl complete",
        "nvdimmctl",
        "",
    ],
)
def test_nothing_else_is(line: str) -> None:
    assert not allowed(*shlex.split(line))


class RootHelperTest(DriverTest):
    """As nova-compute is run by a user of its own; the tests' user is root."""

    @pytest.fixture(autouse=True)
    def _make(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bin").mkdir()
        for name, text in (
            ("nvdimmctl", 'echo "[{\\"Argument\\": \\"$4\\"}]"'),
            ("sudo", 'exec "$@"'),
            ("nova-rootwrap", f'exec {Path(sys.executable).with_name("nova-rootwrap")} "$@"'),
        ):
            program = tmp_path / "bin" / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.conf = tmp_path / "rootwrap.conf"
        self.conf.write_text(ROOTWRAP.format(filters=FILTERS, bin=tmp_path / "bin"))
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        monkeypatch.setattr(os, "geteuid", lambda: 162)

    def test_it_goes_through_rootwrap(self) -> None:
        self.flags(rootwrap_config=str(self.conf))
        assert utils.get_root_helper() == f"sudo nova-rootwrap {self.conf}"
        found = command.rows("nova", "inventory", "--pmem-namespaces", "6GB:ns0|ns1")
        assert found == [{"Argument": "6GB:ns0|ns1"}]

    def test_what_it_does_not_allow_is_told(self) -> None:
        self.flags(rootwrap_config=str(self.conf))
        with pytest.raises(command.CommandFailed, match=r"ended with 99: .*nova-rootwrap.* Unauthorized command"):
            command.run("release", "--delete", "--yes", UUID)


def test_nova_knows_all_of_the_sample(tmp_path: Path) -> None:
    """With the comment signs of options away."""
    accept_xen()
    file = tmp_path / "nova.conf"
    file.write_text((ETC / "nova-compute-xen-nvdimm.conf").read_text().replace("\n#pmem", "\npmem"))
    conf = cfg.ConfigOpts()
    compute.register_opts(conf)
    libvirt.register_opts(conf)
    conf([], default_config_files=[str(file)])
    sections: dict[str, dict[str, list[str]]] = {}
    cfg.ConfigParser(str(file), sections).parse()
    names = {(section, name) for section, values in sections.items() for name in values}
    assert names == {
        ("DEFAULT", "compute_driver"),
        ("DEFAULT", "reserved_host_memory_mb"),
        ("libvirt", "connection_uri"),
        ("libvirt", "pmem_namespaces"),
    }
    assert conf.compute_driver == "nvdimm_ext.XenLibvirtDriver"
    assert conf.reserved_host_memory_mb > 0
    assert (conf.libvirt.virt_type, conf.libvirt.connection_uri) == ("xen", "xen:///system")
    assert len(pmem_namespaces.parse(conf.libvirt.pmem_namespaces)) == 3


# What nova-compute does until it waits for nova-conductor, and then with the driver (nova/cmd/compute.py:main).
COMPUTE = """
import os, sys
from nova import monkey_patch
monkey_patch.patch()
from nova import config, objects
from nova.conf import CONF
from nova.virt import driver
from oslo_log import log
config.parse_args(["nova-compute", *sys.argv[1:]])
CONF.log_opt_values(log.getLogger(), 10)
objects.register_all()
print(type(driver.load_compute_driver(None)).__name__, CONF.libvirt.virt_type, flush=True)
os._exit(0)
"""


def started(tmp_path: Path, more: str, mode: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """nova-compute with the sample, and more in [libvirt].

    :param path: a folder in which Python looks for Nova first.
    """
    conf = tmp_path / "nova.conf"
    conf.write_text((ETC / "nova-compute-xen-nvdimm.conf").read_text() + more)
    environment = {**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": mode, "PYTHONPATH": path}
    command_line = [sys.executable, "-W", "ignore", "-c", COMPUTE, "--config-file", str(conf)]
    return subprocess.run(
        command_line, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


@pytest.mark.parametrize("mode", ["0", "1"], ids=["eventlet", "threads"])
def test_nova_compute_starts_with_the_sample(tmp_path: Path, mode: str) -> None:
    done = started(tmp_path, "", mode)
    assert done.stdout == "XenLibvirtDriver xen\n", done.stderr


def test_a_virt_type_that_is_written_out_is_read_too_early(tmp_path: Path) -> None:
    done = started(tmp_path, "virt_type = xen\n", "1")
    assert done.returncode == 1
    assert "Value for option virt_type" in done.stderr


def test_another_nova_is_not_started(tmp_path: Path) -> None:
    """With its method renamed, Nova's own zeroing would be back: a hard reboot would wipe guests' data."""
    shutil.copytree(nova.__path__[0], tmp_path / "nova", copy_function=os.symlink)
    driver = tmp_path / "nova/virt/libvirt/driver.py"
    text = driver.read_text()
    driver.unlink()
    driver.write_text(text.replace("_cleanup_vpmems", "_zero_vpmems"))
    done = started(tmp_path, "", "1", path=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"nova.exception.InvalidConfiguration: nvdimm_driver supports Nova {RELEASE}.")
    method = "nova.virt.libvirt.driver.LibvirtDriver._cleanup_vpmems"
    assert f": {method}: expected (self, vpmems), found {NOTHING}. nova-compute does not start" in said
