# SPDX-License-Identifier: Apache-2.0
"""The state folder that the driver was registered with.

libxl starts the registered device model, which has the folder in its text. With another one in the options, the hook,
nvdimmd and nvdimmctl would use another ledger than the guests.
"""

from __future__ import annotations

import ast
import os
import re

from oslo_config import cfg

from nvdimm_driver import host_text
from nvdimm_driver.errors import ConfigError

MARK = "# written by nvdimm_driver: change its options, not this file"
"""In each file that 'nvdimmctl register' writes; a file without it belongs to somebody else."""


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
    """Return the state folder of the registered device model; the configured one if none is registered."""
    try:
        text = host_text.read(conf.xen.device_model)
    except OSError:
        return str(conf.state_dir)
    found = re.search(r"^    state_dir=(.*),$", text, re.MULTILINE) if MARK in text else None
    try:
        return str(ast.literal_eval(found[1])) if found else str(conf.state_dir)
    except (SyntaxError, ValueError):  # edited by hand
        return str(conf.state_dir)
