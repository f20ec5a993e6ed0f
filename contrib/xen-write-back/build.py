#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""``make xen-write-back RELEASE=...``: build a Debian package of a release's Xen with the change of this folder.

The source is the newest source package of Xen that apt can fetch, and nothing else. It is built in a root tree of the
release, which is deleted; nothing is installed on this machine. The package is put into dist/, and kept in the lab's
cache under a key made from the source package and this folder.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(PROJECT))

from tests.lab import mirror  # noqa: E402
from tests.lab.cache import cache_folder, cached, digest  # noqa: E402
from tests.lab.errors import LabError  # noqa: E402
from tests.lab.release import DEFAULT, GUESTS  # noqa: E402
from tests.lab.tools import require, run_tool  # noqa: E402

# What the hypervisor alone is built with; not what the source package asks for, which is a good deal more.
PACKAGES = ("bison", "build-essential", "coccinelle", "dpkg-dev", "flex", "python3")
HINT = "\n(one that was fetched by other means can be given to build.py: --dsc xen_VERSION.dsc)"
NEEDED = (
    "README.md",
    "apply.py",
    "build.mk",
    "direct-mmio-wb.h",
    "package.sh",
    "postinst.in",
    "postrm.in",
    "triggers.in",
    "write-back.cocci",
)


@dataclass(frozen=True)
class Source:
    """A source package in a folder of its own.

    :ivar version: Debian's version of it.
    :ivar newer: versions that the release has and apt could not fetch, the newest first.
    """

    folder: Path
    version: str
    newer: tuple[str, ...]

    @property
    def note(self) -> str:
        """Return what a user of the package must know of its source."""
        if not self.newer:
            return "No newer source package of the release was known at the build."
        return f"Source {self.version} is older than {self.newer[0]}, which could not be fetched: fixes are missing."


def main() -> int:
    """Parse the command line and build; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="of make")
    parser.add_argument("--dsc", type=Path, help="Debian's source package, fetched already, instead of apt's")
    parser.add_argument("release", nargs="?", choices=GUESTS, default=os.environ.get("RELEASE") or DEFAULT)
    arguments = parser.parse_args()
    try:
        package = build(arguments.release, arguments.jobs, arguments.dsc)
    except LabError as error:
        print(f"xen-write-back: {error}", file=sys.stderr)
        return 1
    print(package)
    return 0


def build(release: str, jobs: int, dsc: Path | None = None) -> Path:
    """Return the package in dist/, built if the cache does not have it.

    :raises LabError: when there is no source, or it does not build, or the change does not fit it.
    """
    require(("mmdebstrap", "apt-get", "dpkg"))
    if os.geteuid() != 0:
        raise LabError("needs root: mmdebstrap makes a root tree of the release, to build in it")
    with tempfile.TemporaryDirectory() as name:
        source = given(dsc, Path(name)) if dsc else fetch(release, Path(name))
        print(f"xen-write-back: source package xen {source.version}")
        if source.newer:
            print(f"xen-write-back: WARNING: {source.note}", file=sys.stderr)
        files = [HERE / needed for needed in NEEDED] + [Path(__file__), *source.folder.glob("xen_*.dsc")]
        key = digest(files, release, source.note)
        kept = cached(
            cache_folder(), f"xen-write-back-{release}", key, lambda folder: make(folder, release, source, jobs)
        )
    (package,) = kept.glob("*.deb")
    (PROJECT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy(package, PROJECT / "dist"))


def given(dsc: Path, folder: Path) -> Source:
    """Return a source package that was fetched by other means, copied below `folder`."""
    match = re.fullmatch(r"xen_(.+)\.dsc", dsc.name)
    if not match or not dsc.is_file():
        raise LabError(f"{dsc}: no source package of Xen (xen_VERSION.dsc)")
    target = folder / "source"
    target.mkdir()
    for name in {dsc.name, *re.findall(r"^ [0-9a-f]{64} [0-9]+ ([^\s/]+)$", dsc.read_text(), re.MULTILINE)}:
        shutil.copy(dsc.parent / name, target)
    return Source(target, match[1], ())


def fetch(release: str, folder: Path) -> Source:
    """Fetch the newest source package of Xen that apt can get, into a folder below `folder`.

    :raises LabError: when it can get none.
    """
    environment = _apt(folder / "apt", release)
    wanted = _offered(release, environment)
    if not wanted:
        raise LabError(f"apt knows no source package of Xen in {release}")
    failed: list[str] = []
    errors = []
    for version, request in wanted:
        target = folder / f"source-{len(errors)}"
        target.mkdir()
        command = ["apt-get", "--quiet", "source", "--download-only", request]
        done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            newer = tuple(dict.fromkeys(one for one in failed if one != version))
            return Source(target, version, newer)
        failed.append(version)
        errors += [line for line in done.stderr.splitlines() if line.startswith("E: ")][:1]
    raise LabError(f"apt could fetch no source package of Xen for {release}:\n" + "\n".join(errors) + HINT)


def _apt(folder: Path, release: str) -> dict[str, str]:
    """Return the environment in which apt knows the source packages of a release."""
    folder.mkdir()
    environment = mirror.separate_apt(folder / "packages", release)
    lists = folder / "packages" / "sources.list"
    lines = lists.read_text().splitlines()
    lists.write_text("".join(f"{line.replace('deb ', 'deb-src ', 1)}\n" for line in lines))
    run_tool(["apt-get", "--quiet", "update"], env=environment)
    return environment


def _offered(release: str, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the versions that apt knows, the newest first, each with the name that apt-get source takes for it.

    A suite is asked for by name, as apt looks for a version in one place only.
    """
    shown = run_tool(["apt-cache", "showsrc", "--only-source", "xen"], env=environment).decode()
    requests = [f"xen={version}" for version in re.findall(r"^Version: (.+)$", shown, re.MULTILINE)]
    requests += [f"xen/{release}{suffix}" for suffix in ("-security", "-updates", "")]
    found: dict[str, tuple[str, str]] = {}
    for request in dict.fromkeys(requests):
        command = ["apt-get", "--quiet", "source", "--print-uris", request]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        for address, version in re.findall(r"^'(.+)' xen_(\S+)\.dsc ", done.stdout, re.MULTILINE):
            found.setdefault(address, (version, request))
    order = newest_first({version for version, _ in found.values()})
    return sorted(found.values(), key=lambda one: order.index(one[0]))


def newest_first(versions: Iterable[str]) -> list[str]:
    """Return Debian's versions, the newest first."""
    return sorted(versions, key=functools.cmp_to_key(_compare), reverse=True)


def _compare(one: str, other: str) -> int:
    for relation, result in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", one, relation, other]).returncode == 0:
            return result
    return 0


def make(folder: Path, release: str, source: Source, jobs: int) -> None:
    """Build the package from a source package, in a root tree of the release; put it into `folder`."""
    print(f"xen-write-back: building it in a root tree of {release}", flush=True)
    options = folder / "apt.conf"
    options.write_text(mirror.apt_options())
    inside = folder / "inside"
    shutil.copytree(source.folder, inside)
    for name in NEEDED:
        shutil.copy(HERE / name, inside)
    hooks = (
        f'cp -r {shlex.quote(str(inside))} "$1/build"',
        f'chroot "$1" sh -c \'cd /build && exec ./package.sh "$@"\' sh {jobs} {shlex.quote(source.note)}',
        f'cp "$1"/build/out/* {shlex.quote(str(folder))}',
    )
    run_tool(
        [
            *("mmdebstrap", "--mode=root", "--variant=apt", "--format=null", f"--aptopt={options}"),
            *('--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io"),
            *(f"--customize-hook={hook}" for hook in hooks),
            *(f"--include={','.join(PACKAGES)}", release, "-"),
        ],
        stdin="".join(f"{line}\n" for line in mirror.sources(release)).encode(),
    )
    shutil.rmtree(inside)


if __name__ == "__main__":
    sys.exit(main())
