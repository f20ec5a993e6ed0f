# SPDX-License-Identifier: Apache-2.0
"""``python -m nvdimm_driver.cmd.label_server DOMID UUID``: serves the labels of a guest until its domain dies.

The device model starts it before the guest runs. Two processes remain. The server has no privileges and no access to
any domain but its own. The supervisor only starts another server when one dies; meanwhile the guest's request waits in
Xen.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from nvdimm_driver import conf, logs, plugin_loader
from nvdimm_driver.errors import ConfigError, LedgerError, NvdimmError
from nvdimm_driver.guest.p2m import DSM_GFN
from nvdimm_driver.host_text import decode, escaped, use_utf8
from nvdimm_driver.labels.confinement import become, end_processes, isolate, uid_of
from nvdimm_driver.labels.qemu import PORT, PORT_SIZE, QemuLabels, failure
from nvdimm_driver.labels.servers import LabelServers, RequestCounter
from nvdimm_driver.model import PAGE, GuestLayout, Record
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.processes import leave_unit
from nvdimm_driver.registered import ledger_path
from nvdimm_driver.state.events import Event
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xen.ioreq import CUT_OFF, IoreqServer

if TYPE_CHECKING:
    from nvdimm_driver.state.events import Value

LOG = logging.getLogger(__name__)

SERVING = b"serving"
IDLE_SECONDS = 0.5
LOCK_SECONDS = 10.0
LASTING_SECONDS = 60.0
"""When a server dies after this many seconds, the count of early deaths restarts at 1."""
REFUSE_AFTER = 3
"""After this many early deaths, servers answer each request with an error; that needs neither QEMU nor backing."""
GIVE_UP_AFTER = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Start in the background. Return 0 when requests are answered; else print the reason to stderr and return 1."""
    use_utf8()
    _, domid, uuid = sys.argv if argv is None else argv
    leave_unit(os.getpid())
    ours, theirs = os.pipe()
    if os.fork():
        os.close(theirs)
        with open(ours, "rb", buffering=0) as pipe:
            said = pipe.read(1 << 16)
        if said == SERVING:
            return 0
        print(decode(said) or "it died", file=sys.stderr)
        return 1
    os.close(ours)
    os.setsid()
    _detach()
    try:
        options = conf.load()
        logs.to_file("label-server", options)
        _take_lock(LabelServers(options.state_dir), uuid)
        # Before the first fork: a later child must not import what an upgrade has replaced since.
        backings = plugin_loader.load_all("nvdimm_driver.backings", options)
        record = _record(options, uuid)
        try:
            supervise(partial(serve, options, backings, int(domid), record), theirs, partial(_tell, options, uuid))
        finally:
            end_processes(uid_of(int(domid)))
    except (NvdimmError, OSError) as error:
        os.write(theirs, escaped(str(error)).encode())
        return 1
    return 0


def supervise(
    serve: Callable[[bool, Callable[[], None]], None],
    pipe: int,
    tell: Callable[[str, Mapping[str, Value]], None],
) -> None:
    """Run servers as child processes, one after the other, until one ends because its domain is gone.

    :param serve: called in the child with a flag, True to refuse all requests, and a function to call when it is ready.
    :param pipe: gets :data:`SERVING` from the first server, or why it failed; no other server follows a failure.
    :param tell: called with the kind and the detail of each event.
    """
    early = 0
    while early < GIVE_UP_AFTER:
        began = time.monotonic()
        child, said = _fork(partial(serve, early >= REFUSE_AFTER))
        if said == SERVING:
            tell("label-server-started", {"server_pid": child, "answers": "no" if early >= REFUSE_AFTER else "yes"})
        if not early:
            os.write(pipe, said)
        _, status = os.waitpid(child, 0)
        if not status or (not early and said != SERVING):
            return
        early = 1 if time.monotonic() - began > LASTING_SECONDS else early + 1
        tell("label-server-gone", {"server_pid": child, "status": os.waitstatus_to_exitcode(status)})
        time.sleep(min(0.1 * 2**early, 5))
    LOG.error("gave up: this guest's label requests get no answer and block its vCPUs for ever; destroy the domain")


def _fork(serve: Callable[[Callable[[], None]], None]) -> tuple[int, bytes]:
    """Start a child and wait until it serves or has failed; return its pid and its report."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        with open(ours, "rb", buffering=0) as report:
            return child, report.read(1 << 16)
    os.close(ours)
    try:
        serve(lambda: _report(theirs, SERVING))
    except Exception as error:
        LOG.error("%s", error, exc_info=not isinstance(error, NvdimmError | OSError))
        _report(theirs, escaped(str(error)).encode())
        os._exit(1)
    os._exit(0)


def _report(pipe: int, text: bytes) -> None:
    with suppress(BrokenPipeError):  # only the first report is read
        os.write(pipe, text)


def serve(
    options: cfg.ConfigOpts,
    backings: Sequence[Backing],
    domid: int,
    record: Record,
    refuse: bool,
    ready: Callable[[], None],
) -> None:
    """Answer the guest's requests until its domain dies.

    :param record: the domain as it was started.
    :param refuse: answer each request with an error.
    :param ready: called as soon as requests can arrive.
    """
    end_processes(uid_of(domid))  # of a server that was killed
    labels: QemuLabels | None = None
    xen = IoreqServer(domid)
    ledger = Ledger(ledger_path(options))
    server = ledger.find_ioreq_server(record.uuid)
    if server is None:
        server = xen.create()
        ledger.record_ioreq_server(record.uuid, domid, server)
    elif not xen.exists(server):
        return
    ledger.close()
    counter = LabelServers(options.state_dir).count_requests(record.uuid)
    page = xen.map_page(DSM_GFN)
    if not refuse:
        labels = QemuLabels(_layout(record), open_areas(record, backings), options.acpi.qemu, confined=True)
    xen.take_over(server, PORT, PORT + PORT_SIZE - 1)
    LOG.debug("ioreq server %d gets the label requests of domid %d", server, domid)
    xen.restrict()
    isolate(labels.programs if labels else [])
    become(uid_of(domid))
    if labels:
        labels.start()
    ready()
    xen.serve(Port(page, labels, counter).on_write, IDLE_SECONDS)
    logs.tell(Event("label-server-ended", record.uuid, record.name, domid, {}))
    if labels:
        labels.close()


class Port:
    """The port of a guest's label requests.

    :param page: the page with a request, in the guest's memory, which can change at any time.
    :param labels: answers; None to refuse all requests.
    """

    def __init__(self, page: Any, labels: QemuLabels | None, counter: RequestCounter) -> None:
        self._page = page
        self._labels = labels
        self._counter = counter

    def on_write(self, port: int, size: int, value: int) -> Callable[[], None] | None:
        """Answer a request; return what puts the answer into the page.

        It serves only what QEMU's SSDT does, which writes the whole page address to the first port, and copies the page
        first. A request that was cut off is not there any more, and fails.
        """
        if (port, size) != (PORT, PORT_SIZE) or value not in (DSM_GFN * PAGE, CUT_OFF):
            return None
        reply = self._labels.answer(self._page[:]) if self._labels and value != CUT_OFF else failure()
        self._counter.add(failed=reply == failure())
        return partial(self._put, reply)

    def _put(self, reply: bytes) -> None:
        self._page[:] = reply


def open_areas(record: Record, backings: Sequence[Backing]) -> dict[int, ByteRange]:
    """Open the label areas of a domain, by slot."""
    return {
        item.spec.slot: backing_of(backings, item.spec.path).open_labels(item.spec, item.identity)
        for item in record.started
        if item.spec.label_size and item.identity
    }


def _take_lock(servers: LabelServers, uuid: str) -> None:
    """Take the lock of the domain's label server; wait for the server of its last start, which may be about to end.

    :raises ConfigError: when a server still holds it after ``LOCK_SECONDS``.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while servers.lock(uuid) is None:
        if time.monotonic() > deadline:
            raise ConfigError(f"domain {uuid} has a label server already", hint="find it with: pgrep -af label_server")
        time.sleep(0.05)


def _record(options: cfg.ConfigOpts, uuid: str) -> Record:
    """Return the domain as it was started.

    :raises LedgerError: when it was redefined since: its label areas may be elsewhere now.
    """
    ledger = Ledger(ledger_path(options))
    record = ledger.find_domain(uuid)
    ledger.close()
    if record is None or not record.can_be_served:
        raise LedgerError(f"domain {uuid} does not run with the NVDIMMs of its definition")
    return record


def _tell(options: cfg.ConfigOpts, uuid: str, kind: str, detail: Mapping[str, Value]) -> None:
    """Write an event to the ledger; a failure is only logged, so that the guest still gets its answers."""
    try:
        with closing(Ledger(ledger_path(options), logs.tell)) as ledger:
            ledger.record_event(kind, uuid, detail)
    except LedgerError as error:
        LOG.error("%s: %s", kind, error)


def _layout(record: Record) -> GuestLayout:
    """Return the part of the guest's layout that a label server's QEMU needs."""
    placements = tuple(item.placement for item in record.started)
    return GuestLayout(record.ram, 0, 0, placements, dsm="qemu")


def _detach() -> None:
    """Drop the standard streams and the working directory of the caller."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
