# SPDX-License-Identifier: Apache-2.0
"""Additions of ``nvdimmctl register`` to AppArmor's profile of libvirt's daemon, in the file for local ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import host_files
from nvdimm_driver.doctor.confinement import DAEMONS, is_on, missing_rules, profile_of
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.host_text import read
from nvdimm_driver.processes import run
from nvdimm_driver.registered import run_by_libvirt

BEGIN = "# begin: written by nvdimmctl register"
END = "# end: written by nvdimmctl register"


def allow(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Let libvirt's daemon run the hook and the device models; yield a line for each file that was changed.

    :raises ConfigError: when AppArmor refuses a profile.
    """
    folder = Path(conf.libvirt.apparmor_dir)
    yield from _load(folder / "nvdimm-driver")
    for profile in _of_daemons(folder):
        kept = _without_ours(profile)
        rules = missing_rules(f"{read(profile)}\n{kept}", run_by_libvirt(conf))
        ours = "\n".join([BEGIN, *(f"  {rule}" for rule in rules), END, ""]) if rules else ""
        yield from _write(profile, kept + ours)


def forbid(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Undo :func:`allow`; yield a line for each file that was changed."""
    for profile in _of_daemons(Path(conf.libvirt.apparmor_dir)):
        yield from _write(profile, _without_ours(profile))


def _of_daemons(folder: Path) -> list[Path]:
    return [path for name in DAEMONS if (path := folder / profile_of(name)).exists()]


def _local(profile: Path) -> Path:
    return profile.parent / "local" / profile.name


def _without_ours(profile: Path) -> str:
    """Return the local additions to a profile, without those of :func:`allow`."""
    local = _local(profile)
    text = read(local) if host_files.exists(local) else ""
    before, begin, rest = text.partition(BEGIN)
    return before + rest.partition(f"{END}\n")[2] if begin else text


def _write(profile: Path, text: str) -> Iterator[str]:
    local = _local(profile)
    if (read(local) if host_files.exists(local) else "") == text:
        return
    local.parent.mkdir(exist_ok=True)
    host_files.write(local, text.encode(errors="surrogateescape"), 0o644)
    yield f"changed {local}"
    yield from _load(profile)


def _load(profile: Path) -> Iterator[str]:
    """Load a profile into the kernel, where AppArmor is on."""
    parser = shutil.which("apparmor_parser")
    if not (is_on() and parser and profile.exists()):
        return
    done = run([parser, "-r", "-W", str(profile)])
    if done.returncode:
        raise ConfigError(
            f"apparmor_parser refuses {profile}: {done.stderr.strip()}", hint="correct that, and register again"
        )
    yield f"loaded {profile}"
