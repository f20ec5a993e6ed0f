# SPDX-License-Identifier: Apache-2.0
"""Nova's services and placement with the compute driver, in one process."""

from tests.integration.nova_folder import run_folder


def test_all_pass() -> None:
    run_folder("functional")
