# SPDX-License-Identifier: Apache-2.0
"""The programs that a device model may become: it runs as root, so its domain's user cannot choose any other."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Self

from oslo_config import cfg

from nvdimm_driver.backing.paths import steps
from nvdimm_driver.errors import ConfigError, DomainXmlError, RefusedError
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.shell import command


def check_program(path: str) -> None:
    """Check that a path names a program, and that nobody but root can change which.

    :raises ConfigError: when it cannot be run.
    :raises RefusedError: when a folder, a symbolic link or the file is not root's, or others can write to it.
    """
    try:
        real = _follow(path)
    except OSError as error:
        raise ConfigError(
            f"cannot run {path}: {error.strerror}", hint="correct the domain's <emulator>, or [xen] qemu"
        ) from error
    if not stat.S_ISREG(os.stat(real).st_mode) or not os.access(real, os.X_OK):
        raise ConfigError(f"cannot run {path}: it is no program", hint="correct the domain's <emulator>, or [xen] qemu")


class Emulators:
    """The QEMUs that guests with NVDIMMs may have.

    :param own: the driver's device model, which becomes one of them and can be none of them.
    :param default: ``[xen] qemu``, for domains without an ``<emulator>``.
    :param allowed: ``[xen] emulators``, which domains may name; they may name the default, too.
    :param check: checks a program's file; raises what :func:`check_program` does.
    """

    def __init__(
        self,
        default: str,
        allowed: Sequence[str] = (),
        check: Callable[[str], None] = check_program,
        own: str = "",
    ) -> None:
        self.default = default
        self._own = own
        self._allowed = {default, *allowed}
        self._check = check

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts, check: Callable[[str], None] = check_program) -> Self:
        """Make it from the operator's configuration."""
        return cls(conf.xen.qemu, conf.xen.emulators, check, conf.xen.device_model)

    def check(self, domain: DomainSpec) -> None:
        """Check that the domain may have the ``<emulator>`` that it names, if it names any.

        The path is compared as it is written: another path of the same program is not in the list.

        :raises DomainXmlError: when it names the driver's own device model.
        :raises RefusedError: when it may not, or others than root can change the program.
        :raises ConfigError: when there is no such program.
        """
        if domain.emulator is None:
            return
        if domain.emulator == self._own:
            raise DomainXmlError(
                f"domain {domain.name}: its <emulator> is {self._own}, the driver's own device model",
                hint="leave <emulator> out, or name the QEMU that is to run the guest",
            )
        if domain.emulator not in self._allowed:
            raise RefusedError(
                f"domain {domain.name}: its <emulator> is {domain.emulator}, which is not in [xen] emulators, and "
                "would run as root",
                hint="leave <emulator> out, or have the operator add it to [xen] emulators",
            )
        self._check(domain.emulator)

    def choose(self, domain: DomainSpec) -> str:
        """Return the path of the QEMU that is to run the domain's guest.

        :raises NvdimmError: what :meth:`check` raises, also for the default.
        """
        self.check(domain)
        if domain.emulator is None:
            self._check(self.default)
        return domain.emulator or self.default


def _follow(path: str) -> str:
    """Return the path of the file that a path leads to, after looking at each step.

    :raises OSError: when a step is not there.
    :raises RefusedError: when a step is not root's, or others can write to it. In a sticky folder, such as /tmp, nobody
        else can replace what is root's.
    """
    at = "/"
    for at, info in steps(path):
        _check_step(path, at, info)
    return at


def _check_step(path: str, at: str, info: os.stat_result) -> None:
    sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
    writable = not stat.S_ISLNK(info.st_mode) and info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky
    if info.st_uid or writable:
        why = f"belongs to uid {info.st_uid}" if info.st_uid else "can be written by others"
        raise RefusedError(
            f"{path} would run as root, and is not root's alone: {at} {why}",
            hint=f"{command('chown', '-h', 'root', at)}; {command('chmod', 'go-w', at)}",
        )
