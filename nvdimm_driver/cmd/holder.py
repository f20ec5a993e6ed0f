# SPDX-License-Identifier: Apache-2.0
"""``holder.py STATE_DIR UUID NAME``: hold the backings of a guest, whose descriptors it has inherited, until killed.

It goes into the background, and prints its process id. It imports nothing of the driver's and nothing later, so that
it stays small, and works on while the driver is upgraded.
"""

import os
import signal
from contextlib import suppress


def hold() -> None:
    """Leave the caller's session and streams, and wait to be killed."""
    with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write("nvdimm-holder")  # as lsof(8) and fuser(1) show it
    child = os.fork()
    if child:
        os.write(1, b"%d" % child)
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)
    os.setsid()
    os.chdir("/")
    while True:
        signal.pause()


if __name__ == "__main__":
    hold()
