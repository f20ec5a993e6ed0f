# SPDX-License-Identifier: Apache-2.0
"""The Debian package in a Debian 13 and a Debian 12 system: install, use with Debian's libraries, upgrade, remove."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.cmd import systemd_units
from tests import tried
from tests.integration.debian_root import DebianRoot
from tests.lab import mirror
from tests.lab.base import build_base
from tests.lab.cache import cache_folder
from tests.lab.release import RELEASES, Release, named, of_this_machine
from tests.package import PROJECT, build_package, with_version

EXAMPLES = "/usr/share/doc/nvdimm-driver/examples"
HOOK = "/etc/libvirt/hooks/libxl.d/50-nvdimm"
DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
CONF = "/etc/nvdimm-driver/nvdimm-driver.conf"
LEDGER = "/var/lib/nvdimm-driver/ledger.sqlite"
LOG = "/var/log/nvdimm-driver.log"
# The lab's base excludes documentation.
INSTALL = "dpkg -i --path-include='/usr/share/man/*' --path-include='/usr/share/doc/nvdimm-driver/*'"
WITH_UNIT_TESTS = (
    "tests,doc,etc,contrib,debian,setup.py,pyproject.toml,LICENSE,Makefile,*.md,NEWS.rst,.pre-commit-config.yaml"
)
"""The files of the project that the unit tests read; the driver itself comes from the package."""
UUID = "11111111-2222-3333-4444-555555555555"
IN_LEDGER = """\
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.model import Allocation, NvdimmSpec
ledger, uuid = Ledger("{ledger}"), "{uuid}"
ledger.{call}
"""
NEXT_RELEASE = """\
rm -f /etc/dpkg/dpkg.cfg.d/*
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q -y -o Dpkg::Options::=--force-confold --no-install-recommends full-upgrade
apt-get -q -y --no-install-recommends install xen-utils-{xen}
"""
"""Without the base's rules of what packages leave out; on a host, Debian's xen-system-amd64 installs the new Xen."""
COMPLETE = """\
source /usr/share/bash-completion/completions/nvdimmctl
COMP_WORDS=(nvdimmctl "$@") COMP_CWORD=$# COMPREPLY=()
_nvdimmctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == of_this_machine() else (pytest.mark.thorough,)) for name in RELEASES
    ],
)
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRoot]:
    """A Debian of that release with the package installed; 'make test' has the one that this machine runs."""
    release = named(request.param)
    folder = tmp_path_factory.mktemp("debian")
    shutil.copy(build_package(), folder / "nvdimm-driver.deb")
    (folder / "tests").mkdir()
    binds = {"/folder": folder, "/project": PROJECT, "/venv": modules_for(release, folder / "modules")}
    root = tmp_path_factory.mktemp("root")
    with DebianRoot(build_base(cache_folder(), release).root, root, binds) as mounted:
        mounted.run(f"{INSTALL} /folder/nvdimm-driver.deb")
        yield mounted


def modules_for(release: Release, folder: Path) -> Path:
    """Return a folder with pytest and hypothesis for the Python of a release; hypothesis is compiled for one."""
    if release.name == of_this_machine():
        return Path(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--only-binary=:all:"]
    subprocess.run([*pip, "--python-version", release.python, "pytest", "hypothesis"], check=True)
    return folder


@pytest.fixture
def registered(system: DebianRoot) -> DebianRoot:
    """The system after 'nvdimmctl register', with a domain in its ledger."""
    system.run("nvdimmctl register")
    in_ledger(system, 'store(uuid, "db $(x)1", 5, [Allocation(uuid, NvdimmSpec(0, "/mnt/pmem0/a.img", 1 << 21))])')
    return system


def in_ledger(system: DebianRoot, call: str) -> None:
    """Call a method of the system's ledger."""
    system.path("/root/in_ledger").write_text(IN_LEDGER.format(ledger=LEDGER, uuid=UUID, call=call))
    system.run("python3 /root/in_ledger")


def complete(system: DebianRoot, *words: str) -> list[str]:
    """Return what two tabs show after these words."""
    system.path("/root/complete").write_text(COMPLETE)
    return system.run("bash /root/complete " + " ".join(f"'{word}'" for word in words)).stdout.split("\n")[:-1]


def test_the_versions_that_are_tried_here(system: DebianRoot, record_property: tried.Record) -> None:
    here = ("Debian", "libvirt", "QEMU", "Python")
    tried.record(record_property, lambda command: system.run(command).stdout, here, tests="Debian package, without Xen")


def test_it_is_whole_and_all_it_needs_is_there(system: DebianRoot) -> None:
    assert system.run("dpkg-query -W -f '${Status}' nvdimm-driver").stdout == "install ok installed"
    assert system.run("dpkg --audit").stdout == ""


def test_installing_changes_nothing_on_the_host(system: DebianRoot) -> None:
    for unit in systemd_units.UNITS:
        assert system.run(f"systemctl is-enabled {unit} || true").stdout.strip() in ("disabled", "static")
    for path in (HOOK, DEVICE_MODEL, LEDGER):
        assert not system.path(path).exists()


def test_the_units_are_those_that_register_would_make(system: DebianRoot) -> None:
    made = systemd_units.texts(conf.load([]), "/usr/bin/python3", "libvirtd")
    assert {name: system.path(f"/usr/lib/systemd/system/{name}").read_text() for name in made} == made


def test_the_commands_run_with_what_debian_has(system: DebianRoot) -> None:
    assert "plan" in system.run("nvdimmctl --help").stdout
    plan = json.loads(system.run(f"nvdimmctl plan --json --host {EXAMPLES}/host.json {EXAMPLES}/guest.xml").stdout)
    assert plan["cost"]["hypercalls"] == 2
    system.run("command -v nvdimmd")
    assert system.run("PATH=/usr/bin command -v nvdimmd", status=1).stdout == ""


def test_the_options_are_all_there_and_commented_out(system: DebianRoot) -> None:
    assert CONF in system.run("dpkg-query -W -f '${Conffiles}' nvdimm-driver").stdout
    assert system.path(CONF).read_text() == (PROJECT / "etc/nvdimm-driver.conf").read_text()
    system.path(f"{CONF}.d/50-gap.conf").write_text("[layout]\ngap_gib = 32\n")
    plan = f"nvdimmctl plan --json --host {EXAMPLES}/host.json {EXAMPLES}/guest.xml"
    first = json.loads(system.run(plan).stdout)["layout"]["nvdimms"][0]["base"]
    system.path(f"{CONF}.d/50-gap.conf").unlink()
    assert json.loads(system.run(plan).stdout)["layout"]["nvdimms"][0]["base"] - first == 32 << 30


@pytest.mark.parametrize("page", ["nvdimmctl", "nvdimmd"])
def test_the_man_pages(system: DebianRoot, page: str) -> None:
    text = system.run(f"zcat /usr/share/man/man8/{page}.8.gz").stdout
    assert f'.TH "{page.upper()}" "8"' in text


def test_the_log_is_rotated_under_a_program_that_has_it_open(system: DebianRoot) -> None:
    rotate = "logrotate --force --state /root/logrotate /etc/logrotate.d/nvdimm-driver"
    system.run(f"exec 3>>{LOG}; echo before >&3; {rotate}; echo after >&3")
    assert system.path(LOG).read_text() == "after\n"
    assert system.run(f"zcat {LOG}.1.gz").stdout == "before\n"


@pytest.mark.thorough
def test_the_unit_tests_pass_with_what_debian_has(system: DebianRoot) -> None:
    """pytest and other modules that the system lacks come from the virtual environment, which is last in the path.

    libpmem, which the package only recommends, is this machine's.
    """
    (libpmem,) = Path("/usr/lib").glob("*/libpmem.so.1")
    system.path(str(libpmem)).write_bytes(libpmem.read_bytes())
    system.path("/usr/lib/python3/dist-packages/zz-tests.pth").write_text("/venv\n")
    try:
        places = system.run(
            "cd /project/tests && python3 -c 'import cliff, oslo_config, stevedore, nvdimm_driver as own\n"
            "for module in cliff, oslo_config, stevedore, own: print(module.__file__)'"
        ).stdout
        assert [line.startswith("/usr/lib/python3/dist-packages/") for line in places.splitlines()] == [True] * 4
        system.run(
            "mkdir /root/project && cd /root/project && "
            f"cp -r /project/{{{WITH_UNIT_TESTS}}} . && "
            "python3 -m pytest -q -p no:cacheprovider --basetemp=/folder/tests tests/unit"
        )
    finally:
        system.path("/usr/lib/python3/dist-packages/zz-tests.pth").unlink()


def test_completion_knows_commands_options_and_domains(registered: DebianRoot) -> None:
    assert complete(registered, "re") == ["receive", "register", "release", "resize", "restore", "rewrite"]
    assert complete(registered, "acpi", "") == ["dump"]
    assert complete(registered, "plan", "--h") == ["--help", "--host"]
    assert complete(registered, "--config-file", CONF, "sho") == ["show"]
    assert complete(registered, "list", "-f", "j") == ["json"]
    assert complete(registered, "show", "") == [r"db\ \$\(x\)1"]
    assert complete(registered, "release", "--yes", "db") == [r"db\ \$\(x\)1"]
    assert complete(registered, "rewrite", "") == [""]


def test_completion_knows_pools(system: DebianRoot) -> None:
    pools = system.path(f"{CONF}.d/pools.conf")
    pools.write_text("[pool:fast]\npaths = /mnt/pmem0\n")
    try:
        assert complete(system, "pool", "show", "") == ["fast"]
        assert "show" in complete(system, "pool", "")
    finally:
        pools.unlink()


def test_an_upgrade_keeps_the_ledger_and_the_options_and_renews_what_register_wrote(
    registered: DebianRoot, tmp_path: Path
) -> None:
    before = registered.run("nvdimmctl list -f json").stdout
    new_hook = registered.path(HOOK).read_text()
    registered.path(HOOK).write_text(f"{new_hook}# of an earlier version\n")
    with registered.path(CONF).open("a") as file:
        file.write(f"[DEFAULT]\nlog_file = {LOG}\n")
    new = with_version(build_package(), "9.0", tmp_path)
    shutil.copy(new, registered.path("/root/new.deb"))
    said = registered.run(f"{INSTALL} /root/new.deb").stdout
    assert f"installed {HOOK}" in said
    assert f"unchanged {DEVICE_MODEL}" in said
    assert registered.path(HOOK).read_text() == new_hook
    assert registered.path(CONF).read_text().endswith(f"log_file = {LOG}\n")
    assert registered.run("nvdimmctl list -f json").stdout == before
    assert json.loads(before)[0]["Path"] == "/mnt/pmem0/a.img"


def test_an_upgrade_renews_a_hook_in_another_folder(registered: DebianRoot, tmp_path: Path) -> None:
    conf, elsewhere = registered.path(CONF).read_text(), "/etc/libvirt/myhooks/libxl.d/50-nvdimm"
    registered.path(CONF).write_text(f"{conf}[libvirt]\nhooks_dir = /etc/libvirt/myhooks\n")
    registered.run(f"nvdimmctl register && rm -f {HOOK}")
    hook = registered.path(elsewhere).read_text()
    registered.path(elsewhere).write_text(f"{hook}# of an earlier version\n")
    shutil.copy(with_version(build_package(), "9.1", tmp_path), registered.path("/root/new.deb"))
    assert f"installed {elsewhere}" in registered.run(f"{INSTALL} /root/new.deb").stdout
    assert registered.path(elsewhere).read_text() == hook
    registered.path(CONF).write_text(conf)
    registered.run(f"rm -r /etc/libvirt/myhooks && {INSTALL} /folder/nvdimm-driver.deb && nvdimmctl register")


def test_removal_is_refused_while_a_domain_runs(registered: DebianRoot) -> None:
    in_ledger(registered, "begin_start(uuid, [])")
    for how in ("--remove", "--purge"):
        assert "db $(x)1 (shut them down first)" in registered.run(f"dpkg {how} nvdimm-driver", status=1).stderr
    assert registered.path(HOOK).exists()
    in_ledger(registered, "end_start(ledger.find_domain(uuid).start)")


def test_a_broken_option_file_does_not_keep_the_package_from_being_removed(registered: DebianRoot) -> None:
    """The running domain is found all the same: the registered device model has the path of the ledger."""
    before = registered.path(CONF).read_text()
    registered.path(CONF).write_text("[DEFAULT]\nstate_dri = /var/lib/other\n")
    in_ledger(registered, "begin_start(uuid, [])")
    assert "db $(x)1 (shut them down first)" in registered.run("dpkg --remove nvdimm-driver", status=1).stderr
    assert registered.path(HOOK).exists()
    in_ledger(registered, "end_start(ledger.find_domain(uuid).start)")
    done = registered.run("dpkg --remove nvdimm-driver")
    assert "there is no option state_dri in section [DEFAULT] (did you mean state_dir?)" in done.stderr
    assert f"removed {HOOK}" in done.stdout
    assert not registered.path(DEVICE_MODEL).exists()
    registered.path(CONF).write_text(before)
    registered.run(f"{INSTALL} /folder/nvdimm-driver.deb && nvdimmctl register")


def test_a_broken_option_file_that_names_other_places_keeps_the_package(registered: DebianRoot) -> None:
    """Without the option file, removal would leave the hook there, which calls what is gone."""
    before = registered.path(CONF).read_text()
    registered.path(CONF).write_text("[DEFAULT]\nstate_dri = /x\n[libvirt]\nhooks_dir = /etc/libvirt/myhooks\n")
    done = registered.run("dpkg --remove nvdimm-driver", status=1)
    assert "there is no option state_dri in section [DEFAULT]" in done.stderr
    assert "correct what is named above, then remove the package again" in done.stderr
    assert registered.path(HOOK).exists()
    registered.path(CONF).write_text(before)
    registered.run(f"{INSTALL} /folder/nvdimm-driver.deb")


def test_purge_takes_out_all_but_the_data_and_says_where_that_is(registered: DebianRoot) -> None:
    registered.path(LOG).write_text("a line\n")
    said = registered.run("dpkg --purge nvdimm-driver").stdout
    for line in (f"removed {HOOK}", f"removed {DEVICE_MODEL}", "kept /mnt/pmem0/a.img, of domain db $(x)1"):
        assert line in said
    assert "nvdimm-driver: kept /var/lib/nvdimm-driver" in said
    assert registered.path(LEDGER).exists()
    left = registered.run("find / -xdev -name '*nvdimm*' -not -path '/root/*'").stdout.split()
    kept = ["/var/lib/nvdimm-driver", "/var/lib/nvdimm-driver-in-use"]
    assert sorted(left) == ["/etc/modprobe.d/nvdimm-security.conf", *kept], "the first is ndctl's"
    registered.run(f"{INSTALL} /folder/nvdimm-driver.deb")
    assert "/mnt/pmem0/a.img" in registered.run("nvdimmctl list").stdout


@pytest.mark.thorough
def test_an_upgrade_of_debian_keeps_ledger_options_and_registration(tmp_path: Path) -> None:
    """Debian 12 becomes Debian 13 as its release notes say: new sources, then a full upgrade."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "root").mkdir()
    shutil.copy(build_package(), tmp_path / "folder/nvdimm-driver.deb")
    base = build_base(cache_folder(), named("bookworm")).root
    with DebianRoot(base, tmp_path / "root", {"/folder": tmp_path / "folder"}) as system:
        system.run(f"{INSTALL} /folder/nvdimm-driver.deb && nvdimmctl register")
        in_ledger(system, 'store(uuid, "db1", 5, [Allocation(uuid, NvdimmSpec(0, "/mnt/pmem0/a.img", 1 << 21))])')
        system.path(f"{CONF}.d/pools.conf").write_text("[pool:fast]\npaths = /mnt/pmem0\n")
        kept = [HOOK, DEVICE_MODEL, CONF, f"{CONF}.d/pools.conf", "/etc/apparmor.d/local/usr.sbin.libvirtd"]
        before = [system.path(name).read_bytes() for name in kept]
        ledger = system.run("nvdimmctl list -f json && nvdimmctl pool show fast -f json").stdout

        use_this_machines_mirror(system, "trixie")
        system.run(NEXT_RELEASE.format(xen=named("trixie").xen))

        assert system.path("/etc/debian_version").read_text().startswith("13.")
        assert system.run("dpkg --audit").stdout == ""
        assert [system.path(name).read_bytes() for name in kept] == before
        assert system.run("nvdimmctl list -f json && nvdimmctl pool show fast -f json").stdout == ledger
        assert json.loads(ledger.split("\n]\n")[0] + "\n]")[0]["Path"] == "/mnt/pmem0/a.img"
        again = system.run("nvdimmctl register").stdout.splitlines()
        assert {line.split()[0] for line in again if line.endswith((HOOK, DEVICE_MODEL))} == {"unchanged"}


def use_this_machines_mirror(system: DebianRoot, release: str) -> None:
    """Let the system's apt have the packages of a release, and start no services."""
    system.path("/etc/apt/sources.list").write_text("".join(f"{line}\n" for line in mirror.sources(release)))
    mirror.write_apt_conf(system.path("/"))
    mirror.copy_network_files(system.path("/"))
    system.path("/usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    system.path("/usr/sbin/policy-rc.d").chmod(0o755)
