# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own, in which nova uses native threads, as nova-compute can; the functional tests are with
eventlet, whose patches also change what the bench without Xen stands on.
"""

from __future__ import annotations

import os
import warnings

import pytest

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what nova uses is not ours
    import nova.tests.unit  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")
