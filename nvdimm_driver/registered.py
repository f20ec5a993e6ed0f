# SPDX-License-Identifier: Apache-2.0
"""The state folder that the driver was registered with.

libxl starts the registered device model, which has the folder in its text. With another one in the options, the hook,
nvdimmd and nvdimmctl would use another ledger than the guests. A list beside the options has the device models of
earlier options, too, which domains that were defined then still name: they all have the same text.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import host_text
from nvdimm_driver.errors import ConfigError, hint_of

MARK = "# written by nvdimm_driver: change its options, not this file"
"""In each file that 'nvdimmctl register' writes; a file without it belongs to somebody else."""

OPTIONS = "/etc/nvdimm-driver/nvdimm-driver.conf"
"""The options, unless 'nvdimmctl --config-file' names others."""


def ledger_path(conf: cfg.ConfigOpts) -> str:
    """Return the path of the host's ledger.

    :raises ConfigError: when the state folder in the options is not the one that the driver was registered with.
    """
    registered = state_dir(conf)
    if os.path.realpath(registered) != os.path.realpath(conf.state_dir):
        raise ConfigError(
            f"[DEFAULT] state_dir is {conf.state_dir}, and the driver is registered with {registered}: guests use the "
            "ledger there",
            hint="set it back; or shut down all domains with NVDIMMs, and run 'nvdimmctl register'",
        )
    return ledger_in(conf.state_dir)


def ledger_in(folder: str) -> str:
    """Return the path of the ledger in a state folder."""
    return os.path.join(folder, "ledger.sqlite")


def state_dir(conf: cfg.ConfigOpts) -> str:
    """Return the state folder of the registered device model; the configured one if none is registered.

    :raises ConfigError: when there is none at the configured path, and the list of others cannot be read.
    """
    return next(filter(None, map(_state_dir_in, device_models(conf))), str(conf.state_dir))


def device_models(conf: cfg.ConfigOpts) -> Iterator[str]:
    """Yield the paths at which a device model may be: the configured one, and those of earlier options.

    :raises ConfigError: when the list of those cannot be read.
    """
    yield conf.xen.device_model
    path = list_path(conf)
    try:
        lines = host_text.read(path).splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint_of(error)) from error
    yield from (line for line in lines if line not in (MARK, conf.xen.device_model))


def run_by_libvirt(conf: cfg.ConfigOpts) -> list[str]:
    """Return the paths of what libvirt's daemon runs: the device models, and the Python that its hook starts.

    :raises ConfigError: as for :func:`device_models`.
    """
    return [*device_models(conf), os.path.realpath(sys.executable)]


def list_path(conf: cfg.ConfigOpts) -> Path:
    """Return the path of the list of device models: it is beside the options, and none of them moves it."""
    files = filter(os.path.isfile, conf.config_file)  # /dev/null stands for no options
    return Path(next(files, OPTIONS)).parent / "registered"


def _state_dir_in(device_model: str) -> str | None:
    """Return the state folder in the text of a device model; None when there is none of the driver's."""
    try:
        text = host_text.read(device_model)
    except OSError:
        return None
    found = re.search(r"^    state_dir=(.*),$", text, re.MULTILINE) if MARK in text else None
    try:
        return str(ast.literal_eval(found[1])) if found else None
    except (SyntaxError, ValueError):  # edited by hand
        return None
