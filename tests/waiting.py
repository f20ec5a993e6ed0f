# SPDX-License-Identifier: Apache-2.0
"""How tests wait for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_SECONDS = 300.0
"""After these a test gives up. It only ends what hangs: no test says how long something may take."""


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until the condition is true.

    :raises TimeoutError: if it hangs.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come in {HANG_SECONDS:.0f} s")
        time.sleep(0.01)
