# SPDX-License-Identifier: Apache-2.0
"""Configuration files, the driver's own and Nova's: those in /etc, or the ones that are named.

oslo.config would also search the home folder and that of a snap, before /etc, and take options from the environment.
Who has root's programs run may choose that, as user nova may where sudo keeps it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver.errors import ConfigError


def read(
    conf: cfg.ConfigOpts, project: str, files: Sequence[str] | None, *, prog: str | None = None, etc: str = "/etc"
) -> None:
    """Read the configuration files of a project into its options.

    :param files: files to read instead of those in the standard places.
    :param prog: a program of the project that has files of its own.
    :param etc: folder of the standard places, which are in its folder of the project's name.
    :raises ConfigError: when a file is not UTF-8.
    :raises cfg.Error: when a file is malformed.
    :raises OSError: when one cannot be read.
    """
    found, folders = _standard(project, prog, etc) if files is None else (list(files), [])
    for file in [*found, *(file for folder in folders for file in sorted(glob.glob(f"{glob.escape(folder)}/*.conf")))]:
        _check_encoding(file)
    conf(args=[], project=project, default_config_files=found, default_config_dirs=folders, use_env=False)


def _standard(project: str, prog: str | None, etc: str) -> tuple[list[str], list[str]]:
    """Return the files and the folders of files that exist in the standard places."""
    names = [os.path.join(etc, project, f"{name}.conf") for name in (project, prog) if name]
    folders = [f"{name}.d" for name in names]
    return [each for each in names if os.path.exists(each)], [each for each in folders if os.path.exists(each)]


def _check_encoding(file: str) -> None:
    try:
        content = Path(file).read_bytes()
    except OSError:
        return  # oslo.config reports it
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        raise ConfigError(
            f"configuration: {file}, line {line}: byte {column} is {content[error.start]:#04x}, which is not UTF-8",
            hint="save the file as UTF-8, or replace that character",
        ) from None
