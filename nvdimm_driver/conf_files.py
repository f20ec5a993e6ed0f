# SPDX-License-Identifier: Apache-2.0
"""Configuration files, as oslo.config reads them: the driver's own, and Nova's."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver.errors import ConfigError


def read(conf: cfg.ConfigOpts, project: str, files: Sequence[str] | None, *, prog: str | None = None) -> None:
    """Read the configuration files of a project into its options.

    :param files: files to read instead of those in the standard places.
    :param prog: a program of the project that has files of its own.
    :raises ConfigError: when a file is not UTF-8.
    :raises cfg.Error: when a file is malformed.
    :raises OSError: when one cannot be read.
    """
    for file in _standard(project, prog) if files is None else files:
        _check_encoding(file)
    conf(
        args=[],
        project=project,
        prog=prog,
        default_config_files=None if files is None else list(files),
        default_config_dirs=None if files is None else [],
    )


def _standard(project: str, prog: str | None) -> Iterable[str]:
    yield from cfg.find_config_files(project, prog)
    for folder in cfg.find_config_dirs(project, prog):
        yield from sorted(glob.glob(os.path.join(glob.escape(folder), "*.conf")))


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
