# SPDX-License-Identifier: Apache-2.0
"""What users of the host can do: one without any group, and a member of group libvirt, each a process of its own.

libvirtd's sockets have the owners and modes that Debian's package gives them. The operator's commands run as root.
"""

from __future__ import annotations

import grp
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.xml.rewrite import rewrite
from tests.integration import libvirtd
from tests.integration.bench_host import CONF, UUID, Host
from tests.integration.test_virsh import image

SOCKETS = """
unix_sock_group = "libvirt"
unix_sock_ro_perms = "0777"
unix_sock_rw_perms = "0770"
"""
STRANGER, MEMBER = 4001, 4002
SECRET = b"of somebody else".ljust(1 << 20, b".")
DIRECT = "xen+unix:///system?socket=/run/libvirt/libvirt-sock"


class Users:
    """A host with users.

    :ivar own: the member's own folder.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.own = host.libvirtd.folder / "run/member"
        self.own.mkdir()
        os.chown(self.own, MEMBER, MEMBER)
        self.group = grp.getgrnam("libvirt").gr_gid
        self._add_account()

    def _add_account(self) -> None:
        """Give the member an account in the host's namespaces: libvirtd refuses a client whose user has none."""
        for name, line in (("passwd", f"member:x:{MEMBER}:{MEMBER}::/:/bin/sh\n"), ("group", f"member:x:{MEMBER}:\n")):
            file = self.host.libvirtd.folder / "run" / name
            file.write_text(Path(f"/etc/{name}").read_text() + line)
            file.chmod(0o644)
            done = self.host.libvirtd.run("mount", "--bind", f"/run/{name}", f"/etc/{name}")
            assert done.returncode == 0, done.stderr

    def run(self, uid: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command as a user, who has no capabilities and no other group than libvirt, if that."""
        groups = [f"--groups={self.group}"] if uid == MEMBER else ["--clear-groups"]
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", *groups, "--bounding-set=-all", "--inh-caps=-all"]
        return self.host.libvirtd.run(*drop, "--no-new-privs", "--", *command)

    def virsh(self, uid: int, *words: str | Path, uri: str = "xen:///system") -> subprocess.CompletedProcess[str]:
        return self.run(uid, "virsh", "-q", "-c", uri, *words)

    def define(
        self,
        path: str | Path,
        *,
        name: str = "db1",
        number: int = 1,
        verb: str = "define",
        changed: tuple[str, str] = ("", ""),
    ) -> subprocess.CompletedProcess[str]:
        """Have the member define a domain with a path, and with other changes of the XML."""
        text = self.host.xml(name, number).read_text().replace(str(image(self.host, name)), str(path))
        assert changed[0] in text
        text = text.replace(*changed) if changed[0] else text
        file = self.own / f"{name}.xml"
        file.write_text(text)
        file.chmod(0o644)
        return self.virsh(MEMBER, verb, f"/run/member/{name}.xml")

    def link(self, name: str, target: str | Path) -> None:
        """Have the member make or turn a symbolic link in the own folder."""
        done = self.run(MEMBER, "ln", "-sfn", target, f"/run/member/{name}")
        assert done.returncode == 0, done.stderr

    def ctl(self, *words: str) -> str:
        """Run a command of the operator's that must succeed."""
        done = self.host.nvdimmctl(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def shared_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    folder = tmp_path_factory.mktemp("host")
    pool = f"[pool:main]\nkind = bench\npaths = {folder}/pmem\n"
    conf = CONF.replace("allow_any_path=true\n", "").replace("group = root", "group = libvirt")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(libvirtd, "LIBVIRTD_CONF", libvirtd.LIBVIRTD_CONF + SOCKETS)
        host = Host(folder, pool, conf=conf)
    try:
        yield Users(host)
    finally:
        host.libvirtd.close()


@pytest.fixture
def users(shared_users: Users) -> Iterator[Users]:
    """A host with no domain, and no file."""
    yield shared_users
    host = shared_users.host
    host.clean()
    for uuid in host.libvirtd.check("list", "--all", "--uuid").split():
        if uuid.strip("0-"):  # not dom0
            host.check("undefine", uuid)
    for row in host.nvdimmctl("list", "-f", "value", "-c", "Domain").stdout.split():
        host.nvdimmctl("release", "--yes", "--delete", "--all", row)
    (shared_users.own / "ran").unlink(missing_ok=True)
    host.libvirtd.run("find", host.folder / "pmem", "-type", "f", "-delete")


@pytest.fixture
def victim(users: Users) -> Path:
    """A file of root's that nobody else may read, outside of the pool."""
    file = users.host.folder / "victim/db1.img"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(SECRET)
    file.chmod(0o600)
    return file


def is_untouched(users: Users, victim: Path) -> bool:
    """Return True when a file of somebody else has its bytes, its mode and owner, no flag and no mark."""
    status = victim.stat()
    flags = users.host.libvirtd.run("lsattr", victim).stdout.split()[0]
    whole = victim.read_bytes() == SECRET and (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
    return whole and "i" not in flags and not os.listxattr(victim)


# --- a user without the group ---


@pytest.mark.parametrize("uri", ["xen:///system", DIRECT])
def test_a_user_without_the_group_reaches_no_socket_that_changes_anything(users: Users, uri: str) -> None:
    users.host.define("db1", 1)
    for words in (["list"], ["dumpxml", "db1"], ["start", "db1"], ["undefine", "db1"]):
        done = users.virsh(STRANGER, *words, uri=uri)
        assert done.returncode == 1
        assert "Permission denied" in done.stderr
    assert users.host.check("domstate", "db1") == "shut off"


def test_a_user_without_the_group_reads_and_changes_nothing(users: Users) -> None:
    users.host.define("db1", 1)
    before = users.host.record("db1")
    shown = users.virsh(STRANGER, "-r", "dumpxml", "db1")
    assert str(image(users.host, "db1")) in shown.stdout
    (users.own / "db2.xml").write_text(users.host.xml("db2", 2).read_text())
    for words in (["define", "/run/member/db2.xml"], ["start", "db1"], ["undefine", "db1"]):
        done = users.virsh(STRANGER, "-r", *words)
        assert done.returncode == 1
        assert "read only access" in done.stderr
    assert users.host.record("db1") == before
    assert users.host.files() == ["db1.img", "lost+found"]


# --- members of group libvirt ---


def test_a_member_defines_and_starts_domains_with_the_files_of_the_pool(users: Users) -> None:
    """The control of all that follows: the member gets through."""
    done = users.define(image(users.host, "db1"))
    assert done.returncode == 0, done.stderr
    done = users.virsh(MEMBER, "start", "db1")
    assert done.returncode == 0, done.stderr
    assert users.host.state("db1")[0] == "mapped"


@pytest.mark.parametrize("verb", ["define", "create"])
@pytest.mark.parametrize("how", ["named", "by a link", "by dots", "by a hard link", "by /proc"])
def test_no_file_outside_the_pools_is_touched(users: Users, victim: Path, how: str, verb: str) -> None:
    path: str | Path = victim
    if how == "by a link":
        users.link("link", victim.parent)
        path = "/run/member/link/db1.img"
    elif how == "by dots":
        path = f"{users.host.folder}/pmem/../victim/db1.img"
    elif how == "by a hard link":
        assert users.run(MEMBER, "ln", victim, "/run/member/db1.img").returncode != 0
        path = "/run/member/db1.img"
    elif how == "by /proc":
        path = f"/proc/self/root{victim}"
    done = users.define(path, verb=verb)
    assert done.returncode == 1
    assert "pool" in done.stderr
    assert is_untouched(users, victim)
    assert users.host.nvdimmctl("list", "-f", "value").stdout == ""


def test_links_are_followed_as_far_as_by_the_kernel(users: Users) -> None:
    """Each of a thousand can lead down 800 folders and up again: Python's realpath follows all, for a minute."""
    users.link("link-0", image(users.host, "db1").parent)
    for number in range(40):
        users.link(f"link-{number + 1}", f"link-{number}")
    refused = users.define("/run/member/link-40/db1.img").stderr
    assert "/run/member/link-40/db1.img: leads through more than 40 symbolic links" in refused
    assert "db1.img" not in users.host.files()
    done = users.define("/run/member/link-39/db1.img")
    assert done.returncode == 0, done.stderr


def test_nothing_that_waits_or_acts_is_opened(users: Users) -> None:
    """A FIFO would stop the host's tools until somebody writes to it; to open a device may do something."""
    for kind in ("fifo", "socket"):
        program = "os.mkfifo" if kind == "fifo" else "socket.socket(socket.AF_UNIX).bind"
        name = f"/run/member/{kind}"
        assert users.run(MEMBER, "/usr/bin/python3", "-c", f"import os, socket; {program}('{name}')").returncode == 0
        done = users.define(name)
        assert done.returncode == 1
        assert "pool" in done.stderr
    assert users.define("/dev/zero").returncode == 1
    assert users.ctl("check", "-f", "value").replace("xs_open(0)\n", "") == ""  # what xen_stand_in.c prints


def test_a_link_that_is_turned_leads_the_operator_nowhere(users: Users, victim: Path) -> None:
    users.link("link", image(users.host, "db1").parent)
    done = users.define("/run/member/link/db1.img")
    assert done.returncode == 0, done.stderr
    users.link("link", victim.parent)
    assert users.virsh(MEMBER, "start", "db1").returncode == 0
    assert is_untouched(users, victim)
    assert users.virsh(MEMBER, "destroy", "db1").returncode == 0
    users.ctl("wipe", "--yes", "db1")
    users.ctl("release", "--yes", "--delete", "db1")
    assert is_untouched(users, victim)
    assert users.host.files() == ["lost+found"]


def test_another_domains_file_is_not_had_by_any_path(users: Users) -> None:
    users.host.define("db1", 1)
    before = users.host.sum("db1")
    users.link("link", image(users.host, "db1").parent)
    for path in (image(users.host, "db1"), "/run/member/link/db1.img", f"{users.host.folder}/pmem/./db1.img"):
        for verb in ("define", "create"):
            done = users.define(path, name="db2", number=2, verb=verb)
            assert done.returncode == 1
            assert "belongs to domain db1" in done.stderr
    assert users.host.sum("db1") == before
    assert users.host.record("db1").allocations


def test_a_domain_that_is_named_as_anothers_uuid_is_not_taken_for_it(users: Users) -> None:
    """The operator names a domain by its uuid, and so does Nova."""
    uuid = UUID.format(1)
    users.host.define("db1", 1)
    done = users.define(
        image(users.host, "db2"), name="db2", number=2, changed=("<name>db2</name>", f"<name>{uuid}</name>")
    )
    named = done.returncode == 0
    users.ctl("release", "--yes", "--delete", uuid)
    assert users.host.files() == (["db2.img", "lost+found"] if named else ["lost+found"])
    assert "db1" not in users.ctl("list", "-f", "value", "-c", "Domain")


def test_no_program_of_a_member_is_run_as_root(users: Users) -> None:
    program = users.own / "qemu"
    program.write_text("#!/bin/sh\ntouch /run/member/ran\n")
    program.chmod(0o755)
    emulator = ("<devices>", "<devices><emulator>/run/member/qemu</emulator>")
    for verb in ("define", "create"):
        done = users.define(image(users.host, "db1"), verb=verb, changed=emulator)
        assert done.returncode == 1
        assert "would run as root" in done.stderr
    assert not (users.own / "ran").exists()


@pytest.mark.parametrize("uid", [STRANGER, MEMBER])
def test_the_operators_files_are_not_for_users(users: Users, uid: int) -> None:
    """The folders of the test itself are root's alone: so each is looked at where it is mounted once more."""
    users.host.define("db1", 1)
    folder, place = users.host.folder, f"/run/seen-by-{uid}"
    for name in ("state", "pmem"):
        done = users.host.libvirtd.run("sh", "-ec", f"mkdir -p {place}/{name}")
        assert done.returncode == 0, done.stderr
        done = users.host.libvirtd.run("mount", "--bind", folder / name, f"{place}/{name}")
        assert done.returncode == 0, done.stderr
    assert users.run(uid, "ls", place).returncode == 0
    assert "db1.img" in users.run(uid, "ls", f"{place}/pmem").stdout
    for command in (["ls", "state"], ["cat", "state/ledger.sqlite"], ["cat", "pmem/db1.img"], ["rm", "pmem/db1.img"]):
        done = users.run(uid, command[0], f"{place}/{command[1]}")
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    users.host.check("start", "db1")
    assert folder.joinpath("nvdimm-driver.log").stat().st_mode & 0o007 == 0
    assert users.host.files() == ["db1.img", "lost+found"]


# --- a member who goes past nvdimmd, to libvirtd's own socket ---


def forged(users: Users, path: str | Path, *, emulator: str = "") -> str:
    """Return XML of the domain evil as nvdimmd would rewrite it, with a path that nobody has checked."""
    text = users.host.xml("evil", 9).read_text().replace(str(image(users.host, "evil")), str(path))
    if emulator:
        text = text.replace("<devices>", f"<devices><emulator>{emulator}</emulator>")
    return rewrite(text, str(users.host.folder / "nvdimm-device-model"))


def direct(users: Users, verb: str, text: str) -> subprocess.CompletedProcess[str]:
    """Have the member give a domain's XML to libvirtd itself."""
    file = users.own / "direct.xml"
    file.write_text(text)
    file.chmod(0o644)
    return users.virsh(MEMBER, verb, "/run/member/direct.xml", uri=DIRECT)


@pytest.mark.parametrize("verb", ["create", "define"])
@pytest.mark.parametrize("running", [False, True])
def test_forged_metadata_have_no_file_of_another_domain(users: Users, running: bool, verb: str) -> None:
    host = users.host
    host.define("db1", 1)
    if running:
        host.check("start", "db1")
    before = (host.sum("db1"), host.record("db1").allocations, host.state("db1"))
    done = direct(users, verb, forged(users, image(host, "db1")))
    if verb == "define":
        assert done.returncode == 0, done.stderr
        done = users.virsh(MEMBER, "start", "evil", uri=DIRECT)
    assert done.returncode == 1
    assert "belongs to domain db1" in done.stderr
    assert (host.sum("db1"), host.record("db1").allocations, host.state("db1")) == before
    if not running:
        host.check("start", "db1")


def test_metadata_are_not_forged_by_a_reference_in_the_namespace(users: Users) -> None:
    """libvirt writes the name of a namespace as it is, and every parser reads another one in that."""
    host = users.host
    host.define("db1", 1)
    record = (
        f"<domain added='acpi'><devices xmlns='x'><memory model='nvdimm' access='shared'><source><path>"
        f"{image(host, 'p')}</path></source><target><size unit='KiB'>4096</size></target></memory></devices></domain>"
    )
    for uri, key, value in (("urn:nvdimm-driver:domain&#58;1", "nvdimm", record), ("x<y", "foo", "<foo/>")):
        words = ("metadata", "db1", "--uri", uri, "--key", key, "--set", value, "--config")
        assert "means something else in XML" in users.virsh(MEMBER, *words).stderr
    host.libvirtd.restart()
    assert str(image(host, "p")) not in host.check("dumpxml", "db1")
    host.check("start", "db1")
    host.check("destroy", "db1")


def test_no_metadata_keep_a_domain_from_its_start(users: Users) -> None:
    host = users.host
    host.define("db1", 1)
    value = "<foo>" + "<a/>" * 30_000 + "</foo>"
    for number, returncode in ((1, 0), (2, 1)):
        words = ("metadata", "db1", "--uri", f"urn:{number}", "--key", f"k{number}", "--set", value, "--config")
        done = users.virsh(MEMBER, *words)
        assert done.returncode == returncode, done.stderr
    assert "would have more than 50000 elements and attributes" in done.stderr
    assert users.virsh(MEMBER, "dumpxml", "db1").returncode == 0
    host.check("start", "db1")
    host.check("destroy", "db1")
    host.check("metadata", "db1", "--uri", "urn:1", "--remove", "--config")


def test_forged_metadata_have_no_file_outside_the_pools(users: Users, victim: Path) -> None:
    done = direct(users, "create", forged(users, victim))
    assert done.returncode == 1
    assert f"{victim}: is on no block device" in done.stderr
    assert is_untouched(users, victim)


def test_forged_metadata_run_no_program_of_a_member(users: Users) -> None:
    program = users.own / "qemu"
    program.write_text("#!/bin/sh\ntouch /run/member/ran\n")
    program.chmod(0o755)
    users.host.define("evil", 9)
    users.host.check("undefine", "evil")
    done = direct(users, "create", forged(users, image(users.host, "evil"), emulator="/run/member/qemu"))
    assert done.returncode == 1
    assert "would run as root" in done.stderr
    assert not (users.own / "ran").exists()


@pytest.mark.parametrize("running", [False, True])
def test_a_domain_that_is_redefined_without_nvdimmd_keeps_its_file(users: Users, running: bool) -> None:
    host = users.host
    host.define("db1", 1)
    if running:
        host.check("start", "db1")
    plain = re.sub(r"<memory model.*?</memory>\s*", "", host.xml("db1", 1).read_text(), flags=re.DOTALL)
    done = direct(users, "define", plain)
    assert done.returncode == 0, done.stderr
    done = users.define(image(host, "db1"), name="db2", number=2)
    assert done.returncode == 1
    assert "belongs to domain db1" in done.stderr


@pytest.mark.parametrize("words", [(), ("-r",)], ids=["all", "read-only"])
def test_what_means_the_same_as_xen_system_is_opened(users: Users, words: tuple[str, ...]) -> None:
    """As clients write it: those of ``xen+ssh://HOST`` ask for ``xen://``."""
    users.host.define("db1", 1)
    sockets = [f"xen+unix://{path}?socket=/run/libvirt/virtxend-sock" for path in ("/system", "/", "")]
    for uri in ("xen:///system", "xen:///", *(sockets if not words else ())):
        listed = users.run(MEMBER, "virsh", "-q", *words, "-c", uri, "list", "--all", "--name")
        assert "db1" in listed.stdout, (uri, listed)


@pytest.mark.parametrize(
    "uri",
    [
        "test+unix:///default?socket=/run/libvirt/virtxend-sock",
        "qemu+unix:///system?socket=/run/libvirt/virtxend-sock",
        "xen+unix:///system?socket=/run/libvirt/virtxend-sock&no_verify=1&x=1",
    ],
)
def test_no_other_driver_of_libvirts_answers_for_a_domain(users: Users, uri: str) -> None:
    """libvirt's test driver has no such domain, and would take its definition without NVDIMMs."""
    users.host.define("db1", 1)
    had = users.ctl("list", "-f", "json")
    file = users.own / "other.xml"
    file.write_text(
        f"<domain type='test'><name>db1</name><uuid>{UUID.format(1)}</uuid><memory>1024</memory>"
        "<os><type>hvm</type></os></domain>"
    )
    file.chmod(0o644)
    refused = users.virsh(MEMBER, "define", "/run/member/other.xml", uri=uri)
    assert refused.returncode != 0
    assert "nvdimmd's socket is for xen:///system" in refused.stderr
    assert users.ctl("list", "-f", "json") == had
    assert users.define(image(users.host, "db1"), name="db2", number=2).returncode != 0
