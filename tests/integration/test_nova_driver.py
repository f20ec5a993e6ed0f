# SPDX-License-Identifier: Apache-2.0
"""The compute driver on the real libxl driver, and Nova's own tests of persistent memory with it."""

from tests.integration.nova_folder import run_folder


def test_all_pass() -> None:
    run_folder("driver")
