# SPDX-License-Identifier: Apache-2.0
"""``python3 -m tests.fresh RELEASE COMMAND``: run a command in a clone of this checkout on a fresh Debian.

The Debian is a root tree that has apt, git, make and what every Debian has, in namespaces of its own; it is deleted
afterwards. It has this machine's kernel, devices and network. What is not committed is not in the clone. The reports of
tests are copied to build/reports of this checkout.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab import mirror
from tests.lab import release as releases
from tests.lab.cache import cache_folder, cached, digest
from tests.lab.errors import LabError
from tests.lab.release import GUESTS
from tests.lab.tools import require, run_tool
from tests.package import PROJECT

PACKAGES = ("ca-certificates", "git", "make")
CLONE = "srv/nvdimm_driver"  # which every user may read, unlike /root
REPORTS = "build/reports"
INSIDE_CACHE = "/root/.cache/nvdimm-driver/lab"
KEPT = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "CI", "PYTEST_ADDOPTS", "RELEASE")
# A root tree that nsenter and mount can work with, which chroot alone does not make.
ENTER = """\
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
[ -z "$2" ] || mount --bind "$2" "$1$3"
clone=$4
shift 4
pivot_root . mnt
umount -l /mnt
cd "/$clone"
exec "$@"
"""


def main() -> int:
    """Parse the command line and run it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.fresh", description=__doc__)
    parser.add_argument("--lab-cache", action="store_true", help="use the lab's images of this machine")
    parser.add_argument("--keep", action="store_true", help="do not delete the tree")
    parser.add_argument("release", choices=GUESTS)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fresh-", dir="/var/tmp"))
    try:
        _make(folder, arguments.release)
        status = _run(folder, arguments.command or ["bash"], cache_folder() if arguments.lab_cache else None)
        _copy_reports(folder / CLONE / REPORTS, arguments.release)
        return status
    except LabError as error:
        print(f"fresh: {error}", file=sys.stderr)
        return 1
    finally:
        if arguments.keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def _make(folder: Path, release: str) -> None:
    require(("mmdebstrap", "git", "unshare", "pivot_root"))

    def bootstrap(target: Path) -> None:
        options = target / "apt.conf"
        options.write_text(mirror.apt_options())
        run_tool(
            [
                *("mmdebstrap", "--mode=root", "--variant=minbase", f"--aptopt={options}"),
                *(f"--include={','.join(PACKAGES)}", release, target / "root", "-"),
            ],
            stdin="".join(f"{line}\n" for line in mirror.sources(release)).encode(),
        )

    sources = [Path(__file__), Path(mirror.__file__), Path(releases.__file__)]
    base = cached(cache_folder(), f"fresh-{release}", digest(sources, release), bootstrap)
    run_tool(["cp", "--archive", f"{base}/root/.", folder])
    mirror.write_apt_conf(folder)
    mirror.copy_network_files(folder)
    run_tool(["git", "clone", "--quiet", "--no-hardlinks", PROJECT, folder / CLONE])


def _run(folder: Path, command: list[str], cache: Path | None) -> int:
    if cache:
        (folder / INSIDE_CACHE[1:]).mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    own = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", ENTER, "sh"]
    return subprocess.call([*enter, folder, cache or "", INSIDE_CACHE, CLONE, *command], env=kept | own)


def _copy_reports(folder: Path, release: str) -> None:
    for report in folder.glob("*.xml"):
        (PROJECT / REPORTS).mkdir(parents=True, exist_ok=True)
        shutil.copy(report, PROJECT / REPORTS / f"{release}-{report.name}")


if __name__ == "__main__":
    sys.exit(main())
