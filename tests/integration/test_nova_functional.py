# SPDX-License-Identifier: Apache-2.0
"""Nova's services and placement with the compute driver, in one process."""

import pytest

from tests.integration.nova_folder import run_folder


@pytest.mark.parametrize(
    "marked", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)], ids=["usual", "rarer"]
)
def test_all_pass(marked: str) -> None:
    run_folder("functional", marked)
