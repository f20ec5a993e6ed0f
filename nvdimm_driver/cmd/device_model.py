# SPDX-License-Identifier: Apache-2.0
"""``nvdimm-device-model``: map a domain's NVDIMMs into it, then become QEMU.

libxl runs it as the domain's emulator, after the guest's memory is built and before the guest runs. When it fails, the
creation of the domain fails. libvirt also runs it with ``-help`` to learn what QEMU can do. It has to start fast, so
it reads what the libvirt hook has prepared, and imports no more than it needs for that.
"""

from __future__ import annotations

import os
import sys
import time

from nvdimm_driver import apparmor, caching, host_text
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.sysfs import active
from nvdimm_driver.errors import ConfigError, LedgerError, NoWriteBackError, NvdimmError, XenError
from nvdimm_driver.guest import mapping_guards, p2m
from nvdimm_driver.sizes import whole_units
from nvdimm_driver.state.events import Event, failure, log_line, logfmt
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import PreparedStart, has_namespace, has_other_kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import NoReturn

    from nvdimm_driver.plugins import Mapper
    from nvdimm_driver.state.events import Value

PAGE = 4096
SHIPPED = ("fsdax", "devdax", "pmem")
"""The backings whose memory is that of namespaces in sysfs."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Log:
    """A writer of events and steps: to a file and, for libxl's log of the device model, to stderr.

    :param form: as in :func:`.events.log_line`.
    :param level: the least serious level to write, one of :data:`LEVELS`.
    :ivar failed: True after an event ``start-failed``.
    :ivar debugging: True when it writes steps.
    """

    def __init__(self, path: str, form: str = "text", level: str = "INFO") -> None:
        self.path = path
        self.form = form
        self.failed = False
        self.debugging = level == "DEBUG"
        self._levels = LEVELS[LEVELS.index(level) :]

    def __call__(self, event: Event) -> None:
        """Write an event."""
        self.failed = self.failed or event.kind == "start-failed"
        if event.level in self._levels:
            self._write(event.level, event.fields())

    def debug(self, message: str, *values: object) -> None:
        """Write a step; cheap when steps are not written."""
        if self.debugging:
            self._write("DEBUG", {"msg": message % values})

    def _write(self, level: str, fields: dict[str, Value]) -> None:
        print(f"nvdimm-device-model: {logfmt(fields)}", file=sys.stderr, flush=True)
        line = log_line(time.time(), "device-model", level, fields, self.form)
        try:
            with host_text.open_log(self.path) as file:
                file.write(f"{line}\n")
        except OSError as error:  # a full disk must not keep a guest from starting
            print(f"nvdimm-device-model: {self.path}: {error.strerror}", file=sys.stderr, flush=True)


def main(
    argv: Sequence[str],
    *,
    state_dir: str,
    log_file: str,
    qemu: str,
    log_format: str = "text",
    log_level: str = "INFO",
    mapper: str = "domctl",
) -> NoReturn:
    """Entry point of the script that ``nvdimmctl register`` writes; a script of an earlier version leaves options out.

    :param argv: the command line that libxl gives to a device model.
    :param qemu: the program to become when the command line has no domid: from Xen 4.20 on, libxl asks before a start
        what it can do (tools/libs/light/libxl_dm.c).
    :param mapper: name of the mapper plug-in.
    """
    host_text.use_utf8()
    domid = _domid(argv)
    if domid is None:
        os.execv(qemu, [qemu, *argv[1:]])
    apparmor.enter(apparmor.DEVICE_MODEL)
    log = Log(log_file, log_format, log_level)
    try:
        xen, ledger = _mapper(mapper), Ledger(os.path.join(state_dir, "ledger.sqlite"), log)
        held, restored = Holders(state_dir).has, _is_restored(argv)
        known = domid, ledger, xen, state_dir
        qemu = attach(*known, _prepare, _serve, is_held=held, areas_now=areas_now, restored=restored, log=log)
        log.debug("exec %s", qemu)
        try:
            os.execv(qemu, [qemu, *argv[1:]])
        except OSError as error:
            missing = ConfigError(f"cannot run {qemu}: {error.strerror}", hint="correct the domain's <emulator>")
            ledger.record_failure(xen.uuid(domid) or "", missing, domid)
            raise missing from error
    except NvdimmError as error:
        if not log.failed:
            log(Event("start-failed", "", "", domid, failure(error)))
        sys.exit(error.exit_code)


def _mapper(name: str) -> Mapper:
    """Return the mapper of that name; import the driver's own directly: a search takes longer than all the rest."""
    if name == "domctl":
        from nvdimm_driver.xen.domctl import DomctlMapper

        return DomctlMapper()
    from nvdimm_driver import conf, plugin_loader

    found: Mapper = plugin_loader.load("nvdimm_driver.mappers", name, conf.load())
    return found


def attach(
    domid: int,
    ledger: Ledger,
    mapper: Mapper,
    state_dir: str,
    prepare: Callable[[str], None],
    serve: Callable[[str, int, str], None],
    *,
    is_held: Callable[[str], bool] = bool,
    areas_now: Callable[[PreparedStart], Iterable[tuple[int, int]]] | None = None,
    restored: bool = False,
    log: Log | None = None,
) -> str:
    """Map what was prepared for the domain, and deliver its tables.

    :param prepare: prepares a start, by the domain's uuid, if no hook has done it: xl runs none.
    :param serve: starts a label server, by state folder, domid and uuid.
    :param is_held: tells, by uuid, if a holder has the domain's backings open; true by default.
    :param areas_now: as :func:`areas_now`; None: they are as when the start was prepared.
    :param restored: the guest is restored from a saved image. Its tables, and its page for a label server, are in the
        restored memory, and no firmware runs that would read new tables. It must be as the guest was when it was saved.
    :param log: gets each step.
    :returns: the QEMU to become.
    :raises NvdimmError: when anything fails; then nothing is mapped, and the reason is in the ledger.
    """
    log = log or Log(os.devnull)
    uuid = mapper.uuid(domid)
    if uuid is None:
        missing = XenError(f"domid {domid} has no uuid in xenstore", hint="start the domain with libvirt")
        ledger.record_failure("", missing, domid)
        raise missing
    try:
        start = _find_start(uuid, domid, ledger, prepare, log)
        if not is_held(uuid):
            raise LedgerError(
                f"the process that holds the backings of domain {start.name} has died since its start was prepared",
                hint="start the domain again",
            )

        def guard() -> None:
            _guard(uuid, domid, start, ledger, mapper, areas_now)

        guard()
        log.debug("guards passed, mappings: %d", len(start.mappings))
        tables = _read(os.path.join(state_dir, "domains", uuid, "tables"))
        saved = _check_saved(uuid, domid, start, tables, ledger, mapper) if restored else None
        ledger.begin_mapping(start, domid)
        _announce(domid, start, mapper, guard)
        cache, hypercalls, seconds = _map(domid, start, mapper, log, restored=restored)
        try:
            if saved:
                mapper.write(domid, *saved)
                log.debug("the saved guest is in its next run, %d", start.run[0])
            else:
                mapper.deliver(domid, tables)
                log.debug("ACPI tables delivered: %d bytes", len(tables))
                if slots := _read_slots(os.path.join(state_dir, "domains", uuid, "slots")):
                    mapper.give_slots(domid, slots)
                    log.debug("slots for hot-plug given: %d bytes", len(slots))
            mapper.copy_disk_buffers(domid)
            if start.label_server:
                if not restored:
                    mapper.give_dsm_page(domid)
                serve(state_dir, domid, uuid)
                log.debug("label server started")
            detail = {
                "cache": cache,
                **({"cache_wanted": start.cache} if start.cache not in (caching.AUTO, cache) else {}),
                **p2m.summary(start.mappings),
                "hypercalls": hypercalls,
                "map_ms": round(seconds * 1000),
                "acpi_bytes": 0 if restored else len(tables),
                "label_server": "yes" if start.label_server else "no",
                "age_ms": _age_ms(),
            }
            ledger.finish_mapping(start, seconds, detail, cache=cache)
        except NvdimmError:
            mapper.unmap(domid, start.mappings, _uncached(start, cache))
            mapper.announce(domid, ())
            raise
    except OSError as error:
        unread = XenError(str(error))
        ledger.record_failure(uuid, unread, domid)
        raise unread from error
    except NvdimmError as error:
        ledger.record_failure(uuid, error, domid)
        raise
    return start.qemu


def _find_start(uuid: str, domid: int, ledger: Ledger, prepare: Callable[[str], None], log: Log) -> PreparedStart:
    """Return the prepared start of the domain; prepare it now if no hook has.

    :raises LedgerError: when the domain has its NVDIMMs already, or the ledger has no start after it was prepared.
    """
    start = ledger.find_prepared(uuid)
    if start is None and ledger.has_mapped(uuid, domid):
        raise LedgerError(
            f"domid {domid} has its NVDIMMs already: a soft reset (kexec) of a guest with NVDIMMs is not supported",
            hint="have the guest reboot instead",
        )
    if start is None:
        log.debug("no hook has prepared a start of domain %s: prepare it now", uuid)
        prepare(uuid)
        start = ledger.find_prepared(uuid)
    if start is None:
        raise LedgerError(
            f"the start of domain {uuid} was prepared but is not in the ledger", hint="start the domain again"
        )
    log.debug("found the prepared start of domain %s, domid %d", start.name, domid)
    return start


def areas_now(start: PreparedStart) -> list[tuple[int, int]]:
    """Return the areas of the namespaces that a start's NVDIMMs are on, by uuid, as they are now, as (mfn, count).

    Those of a plug-in's own memory are asked for only if they are needed: that takes longer than all the rest.
    """
    nvdimms = start.run[1]
    found = [
        whole_units(each.data_spa, each.data_size, PAGE)
        for each in active()
        if each.mode != "sector" and has_namespace(nvdimms, each.uid)
    ]
    if mapping_guards.first_outside(start.mappings, found) and has_other_kinds(nvdimms, SHIPPED):
        from nvdimm_driver import conf, plugin_loader

        backings = plugin_loader.load_all("nvdimm_driver.backings", conf.load())
        areas = [area for backing in backings for area in backing.areas()]
        found = [area.frames for area in areas if has_namespace(nvdimms, area.uid)]
    return found


def _guard(
    uuid: str,
    domid: int,
    start: PreparedStart,
    ledger: Ledger,
    mapper: Mapper,
    areas_now: Callable[[PreparedStart], Iterable[tuple[int, int]]] | None,
) -> None:
    if areas_now is not None:
        mapping_guards.check_not_replaced(start.mappings, {*areas_now(start)} & {*start.areas})
    mapping_guards.check_mappings(
        start.mappings,
        areas=start.areas,
        ram=mapper.ram(),
        taken=[*ledger.frames_of_others(uuid), *_frames_of_others(domid, mapper)],
        guest_start_gfn=max(start.gfn_start, mapper.guest_end(domid)),
        guest_limit_gfn=start.gfn_limit,
    )


def _frames_of_others(domid: int, mapper: Mapper) -> list[tuple[str, int, int]]:
    """Return the frames that other guests have, whatever the ledger knows of them."""
    return [(f"with domid {each}", mfn, count) for each, mfn, count in mapper.frames_of_guests() if each != domid]


def _announce(domid: int, start: PreparedStart, mapper: Mapper, guard: Callable[[], None]) -> None:
    """Announce the guest's frames, and look again: of two device models at once, at least one sees the other."""
    mapper.announce(domid, start.mappings)
    try:
        guard()
    except NvdimmError:
        mapper.announce(domid, ())
        raise


def _check_saved(
    uuid: str, domid: int, start: PreparedStart, tables: bytes, ledger: Ledger, mapper: Mapper
) -> tuple[int, bytes]:
    """Return what :func:`.saved_guest.check` does."""
    from functools import partial

    from nvdimm_driver.acpi.tables import split
    from nvdimm_driver.lifecycle import saved_guest
    from nvdimm_driver.model import Run

    last, is_unnumbered = ledger.find_run(uuid), ledger.is_unnumbered(uuid) and not ledger.is_spoiled(uuid)
    read = partial(mapper.read, domid)
    return saved_guest.check(read, split(tables), Run(*start.run), last, is_unnumbered=is_unnumbered)


def _map(domid: int, start: PreparedStart, mapper: Mapper, log: Log, *, restored: bool) -> tuple[str, int, float]:
    """Map the frames; return whether they are cached, the number of hypercalls, and the seconds that they took.

    A restored guest is not refused what only makes it slow: that would cost the guest.
    """
    wanted = caching.AUTO if restored and start.cache == caching.WRITE_BACK else start.cache
    if log.debugging:
        for gfn, mfn, count in start.mappings:
            log.debug("map gfn %#x to mfn %#x, %d frames", gfn, mfn, count)
    began = time.monotonic()
    try:
        cache = caching.choose(wanted, lambda: mapper.write_back_fault(start.mappings, start.uncached, domid))
        try:
            hypercalls = mapper.map(domid, start.mappings, _uncached(start, cache))
        except NoWriteBackError as error:
            if wanted != caching.AUTO:
                raise
            log.debug("mapped uncached: %s", error)
            cache = caching.UNCACHED
            hypercalls = mapper.map(domid, start.mappings, _uncached(start, cache))
    except NvdimmError:
        mapper.announce(domid, ())
        raise
    return cache, hypercalls, time.monotonic() - began


def _uncached(start: PreparedStart, cache: str) -> list[tuple[int, int]]:
    """Return the guest frames of a start that must not be cached."""
    if cache == caching.WRITE_BACK or not start.mappings:
        return start.uncached
    first = min(gfn for gfn, _, _ in start.mappings)
    return [(first, max(gfn + count for gfn, _, count in start.mappings) - first)]


def _prepare(uuid: str) -> None:
    """Prepare a start that no hook has prepared, as xl runs none.

    :raises LedgerError: when libvirt starts the domain: its hook would have, if the definition had NVDIMMs.
    """
    if is_run_by_libvirt(f"/proc/{os.getppid()}/cmdline"):
        raise LedgerError(
            f"libvirt starts domain {uuid} with nvdimm-device-model, and its hook has not prepared that",
            hint="start it again; if that does not help: does 'virsh dumpxml' show its NVDIMMs, and does libvirt run "
            "the hook ('nvdimmctl doctor')?",
        )
    from nvdimm_driver import conf, logs
    from nvdimm_driver.driver import load_driver

    options = conf.load()
    logs.to_file("device-model", options)
    load_driver(options).prepare_known(uuid)


def is_run_by_libvirt(command_line: str) -> bool:
    """Return True if libvirt's daemon runs this program: libxl, in the daemon, forks a process that does.

    See tools/libs/light/libxl_exec.c:libxl__spawn_spawn.

    :param command_line: file with that of the parent process (proc(5)).
    """
    try:
        with open(command_line, "rb") as file:
            program = file.read(4096).partition(b"\0")[0]
    except OSError:
        return False
    return os.path.basename(program) in (b"libvirtd", b"virtxend")


def _serve(state_dir: str, domid: int, uuid: str) -> None:
    from nvdimm_driver.labels.servers import LabelServers

    LabelServers(state_dir).start(domid, uuid)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_slots(path: str) -> bytes:
    """Return the pages of a guest's slots for hot-plug; none when it has none, or an earlier version prepared it."""
    return _read(path) if os.path.exists(path) else b""


def _domid(argv: Sequence[str]) -> int | None:
    """Return the domid that libxl gives; None for a run that only prints something."""
    return int(argv[argv.index("-xen-domid") + 1]) if "-xen-domid" in argv else None


def _is_restored(argv: Sequence[str]) -> bool:
    """Return True when libxl gives the image of a saved guest: ``-incoming fd:N``. A domain's name can be an option."""
    return any(argv[index + 1].startswith("fd:") for index, word in enumerate(argv[:-1]) if word == "-incoming")


def _age_ms() -> int:
    """Return the milliseconds since this process began (proc(5): starttime, in clock ticks since boot)."""
    started = int(host_text.read("/proc/self/stat").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return round((time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1000)
