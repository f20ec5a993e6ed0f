# SPDX-License-Identifier: Apache-2.0
"""Progress of long commands: a bar on a terminal, and the message when the user interrupts the command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nvdimm_driver.errors import InterruptedWork
from nvdimm_driver.sizes import human

if TYPE_CHECKING:
    from nvdimm_driver.model import Progress, Watch


@contextmanager
def watched(name: str, *, lines: bool = False) -> Iterator[Watch]:
    """Report progress on standard error if that is a terminal.

    :param name: name of the file or domain that is worked on.
    :param lines: print a line at each tenth, even if standard error is not a terminal.
    :raises InterruptedWork: when the user interrupts the work.
    """
    work = _Lines(name) if lines else _Bars(name) if sys.stderr.isatty() else _Work(name)
    try:
        yield work.begin
    except KeyboardInterrupt as error:
        raise InterruptedWork(
            f"{name}: interrupted, {work}", hint="repeat the command to continue from there"
        ) from error
    finally:
        work.end()


class _Work:
    """Progress that is recorded and not shown."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._what = ""
        self._done = self._total = 0

    def begin(self, what: str) -> Progress:
        """Begin a part of the work."""
        self._what, self._done, self._total = what, 0, 0
        return self.tell

    def tell(self, done: int, total: int) -> None:
        """Record how many bytes of the part are done."""
        self._done, self._total = done, total

    def end(self) -> None:
        """End the work."""

    def __str__(self) -> str:
        if not self._what:
            return "nothing was done"
        return f"{self._what}: {human(self._done)} of {human(self._total)} done" if self._total else self._what


class _Lines(_Work):
    """Progress that is shown as a line for each tenth of a part."""

    def begin(self, what: str) -> Progress:
        self._tenths = 0
        return super().begin(what)

    def tell(self, done: int, total: int) -> None:
        super().tell(done, total)
        tenths = 10 * done // total
        if tenths > self._tenths:
            self._tenths = tenths
            print(f"{self.name}: {self}", file=sys.stderr, flush=True)


class _Bars(_Work):
    """Progress that is shown as a bar for each part."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(name)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._bars.start()

    def begin(self, what: str) -> Progress:
        self._task = self._bars.add_task(f"{self.name}: {what}", total=None)
        return super().begin(what)

    def tell(self, done: int, total: int) -> None:
        super().tell(done, total)
        self._bars.update(self._task, completed=done, total=total)

    def end(self) -> None:
        self._bars.stop()
