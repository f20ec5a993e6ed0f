# SPDX-License-Identifier: Apache-2.0
"""The lab's side of the channel to dom0's agent; `recipe/lab-agent` is the other side and defines the orders."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab.errors import LabError

HELLO_SECONDS = 5.0


class AgentConnection:
    """A connection that several threads may use at once; a thread of its own dispatches the answers."""

    def __init__(self, path: Path) -> None:
        """Connect to the unix socket at `path`."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._changed = threading.Condition()
        self._answers: dict[str, dict[str, Any]] = {}
        self._asked = 0
        self._closed = False
        threading.Thread(target=self._receive, daemon=True).start()

    def answers(self) -> bool:
        """Return True if the agent answers within HELLO_SECONDS. Orders wait for the agent while dom0 boots."""
        try:
            self.ask({"op": "hello"}, HELLO_SECONDS)
        except (TimeoutError, LabError):
            return False
        return True

    def ask(self, order: Mapping[str, object], timeout: float) -> dict[str, Any]:
        """Send an order and return its answer.

        :raises LabError: when the order failed.
        :raises TimeoutError: without an answer.
        """
        with self._changed:
            self._asked += 1
            name = f"{time.time_ns()}-{self._asked}"
            self._send({"id": name, **order})
            if not self._changed.wait_for(lambda: name in self._answers or self._closed, timeout):
                raise TimeoutError(f"no answer from dom0 after {timeout} s to {order}")
            if name not in self._answers:
                raise LabError("the channel to dom0 is closed: QEMU is gone")
            answer = self._answers.pop(name)
        if "error" in answer:
            raise LabError(f"dom0's agent: {answer['error']}")
        return answer

    def close(self) -> None:
        """Close the connection; threads that wait for an answer get a LabError."""
        with contextlib.suppress(OSError):  # QEMU may have ended first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, order: Mapping[str, object]) -> None:
        try:
            # the leading newline ends a line that an earlier connection left half sent
            self._socket.sendall(b"\n" + json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise LabError(f"the channel to dom0 is closed: {error}") from error

    def _receive(self) -> None:
        pending = b""
        while data := self._read():
            *lines, pending = (pending + data).split(b"\n")
            with self._changed:
                self._answers.update((answer["id"], answer) for answer in map(json.loads, filter(None, lines)))
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except OSError:
            return b""
