"""``python -m nvdimm_driver.cmd.label_server DOMID UUID``: serves the labels of a guest until its domain dies.

The device model runs it before the guest does. Two processes stay: one that serves, without privileges and with no way
to any domain but its own, and one that does nothing but start another when that one dies. The guest's request waits in
Xen meanwhile.
"""

from __future__ import annotations

import logging
import os
import pwd
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from nvdimm_driver import conf, logs, plugins
from nvdimm_driver.errors import ConfigError, LedgerError, NvdimmError
from nvdimm_driver.guest.p2m import DSM_GFN
from nvdimm_driver.labels.qemu import PORT, PORT_SIZE, QemuLabels, failure
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.model import PAGE, GuestLayout, Record
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.state.events import Event
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xen._xen import ffi
from nvdimm_driver.xen.ioreq import IoreqServer

if TYPE_CHECKING:
    from nvdimm_driver.state.events import Value

LOG = logging.getLogger(__name__)

USER = "nobody"
SERVING = b"serving"
IDLE_SECONDS = 0.5
LOCK_SECONDS = 10.0
LASTING_SECONDS = 60.0
"""A server that ran for so long and died is followed by one like it."""
REFUSE_AFTER = 3
"""So many that died early, and the next one answers each request with an error, and needs neither QEMU nor backing."""
GIVE_UP_AFTER = 10
PR_SET_NO_NEW_PRIVS = 38


def main(argv: Sequence[str] | None = None) -> int:
    """Start in the background; 0 when requests are answered, else the reason is on stderr."""
    _, domid, uuid = sys.argv if argv is None else argv
    ours, theirs = os.pipe()
    if os.fork():
        os.close(theirs)
        with open(ours, "rb", buffering=0) as pipe:
            said = pipe.read(1 << 16)
        if said == SERVING:
            return 0
        print(said.decode() or "it died", file=sys.stderr)
        return 1
    os.close(ours)
    os.setsid()
    _detach()
    try:
        options = conf.load()
        logs.to_file("label-server", options)
        _take_lock(LabelServers(options.state_dir), uuid)
        # Before the first fork: a later child must not import what an upgrade has replaced since.
        backings = plugins.load_all("nvdimm_driver.backings", options)
        record = _record(options, uuid)
        supervise(partial(serve, options, backings, int(domid), record), theirs, partial(_tell, options, uuid))
    except (NvdimmError, OSError) as error:
        os.write(theirs, str(error).encode())
        return 1
    return 0


def supervise(
    serve: Callable[[bool, Callable[[], None]], None],
    pipe: int,
    tell: Callable[[str, Mapping[str, Value]], None],
) -> None:
    """Have a child serve, and another when it dies, until one ends because the domain has.

    :param serve: is told whether to refuse all requests, and what to call when it is ready.
    :param pipe: where the first one says that it serves, or why it does not; then there is no second one.
    :param tell: is told of each event, with its detail.
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
    LOG.error("gave up: label requests of this guest get no answer, and their vCPU waits for ever; destroy the domain")


def _fork(serve: Callable[[Callable[[], None]], None]) -> tuple[int, bytes]:
    """Start a child; returns its pid when it serves or has failed, and what it says of that."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        with open(ours, "rb", buffering=0) as report:
            return child, report.read(1 << 16)
    os.close(ours)
    try:
        serve(lambda: _say(theirs, SERVING))
    except Exception as error:
        LOG.error("%s", error, exc_info=not isinstance(error, NvdimmError | OSError))
        _say(theirs, str(error).encode())
        os._exit(1)
    os._exit(0)


def _say(pipe: int, word: bytes) -> None:
    with suppress(BrokenPipeError):  # only the first word is read
        os.write(pipe, word)


def serve(
    options: cfg.ConfigOpts,
    backings: Sequence[Backing],
    domid: int,
    record: Record,
    refuse: bool,
    ready: Callable[[], None],
) -> None:
    """Answer the guest's requests until its domain dies.

    :param record: of the domain, as it was started.
    :param refuse: answer each with an error.
    :param ready: called when the first request could come.
    """
    page: Any = None
    labels: QemuLabels | None = None

    def on_write(port: int, size: int, value: int) -> None:
        """Only what QEMU's SSDT does: the address of the page, whole, to the first port. The page is copied first."""
        if (port, size, value) == (PORT, PORT_SIZE, DSM_GFN * PAGE):
            page[:] = reply = labels.answer(page[:]) if labels else failure()
            counter.add(failed=reply == failure())

    xen = IoreqServer(domid, on_write)
    ledger = Ledger(_ledger_file(options))
    server = ledger.find_ioreq_server(record.uuid)
    if server is None:
        server = xen.create()
        ledger.record_ioreq_server(record.uuid, server)
    elif not xen.exists(server):
        return
    ledger.close()
    counter = LabelServers(options.state_dir).count_requests(record.uuid)
    page = xen.map_page(DSM_GFN)
    if not refuse:
        labels = QemuLabels(_layout(record), open_areas(record, backings), options.acpi.qemu)
        labels.start()
    xen.take_over(server, PORT, PORT + PORT_SIZE - 1)
    LOG.debug("label requests of domid %d come to ioreq server %d", domid, server)
    xen.restrict()
    confine(USER)
    ready()
    xen.serve(IDLE_SECONDS)
    logs.tell(Event("label-server-ended", record.uuid, record.name, domid, {}))
    if labels:
        labels.close()


def open_areas(record: Record, backings: Sequence[Backing]) -> dict[int, ByteRange]:
    """Open the label areas of a domain, by slot."""
    return {
        item.spec.slot: backing_of(backings, item.spec.path).open_labels(item.spec, item.identity)
        for item in record.allocations
        if item.spec.label_size and item.identity
    }


def confine(user: str) -> None:
    """Become that user, with no capability and no way to any."""
    entry = pwd.getpwnam(user)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    ffi.errno = 0
    unused = ffi.cast("unsigned long", 0)
    if ffi.dlopen(None).prctl(PR_SET_NO_NEW_PRIVS, ffi.cast("unsigned long", 1), unused, unused, unused):
        raise OSError(ffi.errno, "prctl(PR_SET_NO_NEW_PRIVS)")


def _take_lock(servers: LabelServers, uuid: str) -> None:
    """Be the one label server of the domain; that of its last start may be about to end.

    :raises ConfigError: when there is another.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while servers.lock(uuid) is None:
        if time.monotonic() > deadline:
            raise ConfigError(f"domain {uuid} has a label server already", hint="see who: pgrep -af label_server")
        time.sleep(0.05)


def _ledger_file(options: cfg.ConfigOpts) -> str:
    return str(Path(options.state_dir) / "ledger.sqlite")


def _record(options: cfg.ConfigOpts, uuid: str) -> Record:
    """The domain as it was started.

    :raises LedgerError: when it was defined anew since: its label areas may be elsewhere now.
    """
    ledger = Ledger(_ledger_file(options))
    record = ledger.find_domain(uuid)
    ledger.close()
    if record is None or record.start is None or record.start.served != record.labels:
        raise LedgerError(f"domain {uuid} does not run with the NVDIMMs that it is defined with")
    return record


def _tell(options: cfg.ConfigOpts, uuid: str, kind: str, detail: Mapping[str, Value]) -> None:
    """Write an event to the ledger; a guest gets its answers also when that fails."""
    try:
        with closing(Ledger(_ledger_file(options), logs.tell)) as ledger:
            ledger.record_event(kind, uuid, detail)
    except LedgerError as error:
        LOG.error("%s: %s", kind, error)


def _layout(record: Record) -> GuestLayout:
    """As much of the guest's layout as a label server's QEMU needs."""
    placements = tuple(item.placement for item in record.allocations)
    return GuestLayout(record.ram, 0, 0, placements, dsm="qemu")


def _detach() -> None:
    """Keep nothing of who has started us."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
