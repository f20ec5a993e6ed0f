# SPDX-License-Identifier: Apache-2.0
"""`python3 -m tests.lab`: a shell in a lab. `build` only builds it, `run COMMAND` runs one command in its dom0."""

import argparse
import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.host import XenHost
from tests.lab.image import Images, build

# All keys go to dom0's shell, Ctrl-C too. This one ends the session, as in telnet.
LEAVE = b"\x1d"


def main() -> int:
    """Parse the command line and run it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("build", help="only build the images")
    run = verbs.add_parser("run", help="boot, run a command in dom0, exit with its status")
    run.add_argument("command")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        images = _build()
        if arguments.verb == "run":
            return _run(images, arguments.command)
        return _shell(images) if arguments.verb is None else 0
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _build() -> Images:
    started = time.monotonic()
    images = build()
    print(f"images in {images.folder} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    return images


def _run(images: Images, command: str) -> int:
    with XenHost(images) as host:
        result = host.run(command, timeout=3600)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    return result.returncode if result.returncode >= 0 else 128 - result.returncode


def _shell(images: Images) -> int:
    with XenHost(images) as host:
        print(f"dom0 is up after {host.boot_seconds:.0f} s; its /mnt/share is {host.share}", file=sys.stderr)
        if not sys.stdin.isatty():
            print("standard input is not a terminal; use `run COMMAND`", file=sys.stderr)
            return 2
        print("a shell in dom0; Ctrl-] stops the host", file=sys.stderr)
        columns, lines = os.get_terminal_size(sys.stdin.fileno())
        host.check(f"stty -F /dev/hvc0 rows {lines} columns {columns}")
        _attach(host.console_socket)
    return 0


def _attach(console: Path) -> None:
    """Connect this terminal to the console, until Ctrl-] or until the console is gone."""
    keyboard = sys.stdin.fileno()
    saved = termios.tcgetattr(keyboard)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(console))
        line.sendall(b"\n")
        tty.setraw(keyboard)
        try:
            while _relay(keyboard, line):
                continue
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)
    print(file=sys.stderr)


def _relay(keyboard: int, line: socket.socket) -> bool:
    ready, _, _ = select.select([keyboard, line.fileno()], [], [])
    if keyboard in ready:
        typed = os.read(keyboard, 1 << 10)
        if not typed or LEAVE in typed:
            return False
        line.sendall(typed)
    if line.fileno() in ready:
        shown = line.recv(1 << 14)
        os.write(sys.stdout.fileno(), shown)
        return bool(shown)
    return True


if __name__ == "__main__":
    sys.exit(main())
