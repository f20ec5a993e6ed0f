# SPDX-License-Identifier: Apache-2.0
"""The steps by which a running guest has one NVDIMM more, or one less, in the ledger.

The ledger knows of one before Xen does, and until after Xen has forgotten it: what the guard of another domain's start
looks at is never less than what the guest has.
"""

from __future__ import annotations

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.state.start_steps import THIS_START, StartSteps, have, host_boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from nvdimm_driver.model import Run, Start
    from nvdimm_driver.state.events import Value


class PlugSteps(StartSteps):
    """Changes of what running guests have. Every method is one transaction.

    :raises LedgerError: from every method, when the file cannot be read or written.
    """

    def plug(
        self,
        start: Start,
        path: str,
        mappings: Sequence[tuple[int, int, int]],
        areas: Sequence[tuple[int, int]],
        *,
        before: Run,
        run: Run,
    ) -> None:
        """Record that a running guest is about to get one more NVDIMM.

        :param path: of its backing.
        :param mappings: its own.
        :param areas: that they are in, as for :meth:`.StartSteps.finish_preparing`.
        :param before: the run, as the ledger has it.
        :param run: the same with the NVDIMM.
        :raises LedgerError: when the start is over, or what its guest has was changed meanwhile.
        """
        uuid = start.uuid
        statements = [
            *have(uuid, [path]),
            *[("INSERT INTO mapping VALUES (?, ?, ?, ?)", (uuid, *mapping)) for mapping in mappings],
            *[("INSERT INTO area VALUES (?, ?, ?)", (uuid, *area)) for area in areas],
        ]
        self._change_run(start, before, run, statements)
        self._note_run(run.number, run.nvdimms)

    def unplug(
        self,
        start: Start,
        path: str,
        gfns: Sequence[int],
        *,
        before: Run,
        run: Run,
        kind: str = "",
        detail: Mapping[str, Value] | None = None,
    ) -> None:
        """Record that a running guest has an NVDIMM no more; Xen has forgotten it.

        :param gfns: the first guest frame of each of its mappings.
        :param before: the run, as the ledger has it.
        :param run: the same without the NVDIMM.
        :param kind: kind of the event to record; empty for none.
        :raises LedgerError: when the start is over, or what its guest has was changed meanwhile.
        """
        uuid = start.uuid
        statements = [
            ("DELETE FROM frozen WHERE uuid = ? AND path = ?", (uuid, path)),
            *[("DELETE FROM mapping WHERE uuid = ? AND gfn = ?", (uuid, gfn)) for gfn in gfns],
        ]
        self._change_run(start, before, run, statements, kind, detail)

    def _change_run(
        self,
        start: Start,
        before: Run,
        run: Run,
        statements: Sequence[tuple[str, Sequence[Any]]],
        kind: str = "",
        detail: Mapping[str, Value] | None = None,
    ) -> None:
        """Change what the guest of a start has, if it still has what the caller knows."""
        uuid = start.uuid
        same = f"{THIS_START} AND boot_id = ? AND ended = 0 AND number = ? AND nvdimms = ?"
        values = (run.nvdimms, run.written, *start.key, host_boot_id(), before.number, before.nvdimms)
        changed = self._write_start(
            [
                (f"UPDATE attachment SET nvdimms = ?, written = ? WHERE {same}", values),
                (
                    "UPDATE run SET nvdimms = ?, written = ? WHERE uuid = ? AND number = ?",
                    (run.nvdimms, run.written, uuid, run.number),
                ),
                *statements,
            ],
            self._event(kind, uuid, detail) if kind else None,
            guarded=True,
        )
        if not changed:
            raise LedgerError(
                f"the guest of domain {uuid} has ended, or what it has was changed by another process",
                hint="see 'nvdimmctl show', and try again",
            )
