# SPDX-License-Identifier: Apache-2.0
"""The file of the ledger: opened, upgraded, read and written, also on a full disk and when it is damaged.

The device model uses it and must start fast: the schema is imported only where it is needed.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time

from nvdimm_driver.device_marks import FOLDER, DeviceMarks
from nvdimm_driver.errors import DamagedLedgerError, FullDiskError, LedgerError, hint_of, own_file_error
from nvdimm_driver.host_files import real_path
from nvdimm_driver.host_text import escaped
from nvdimm_driver.state import in_use
from nvdimm_driver.state.events import Event, unheard
from nvdimm_driver.state.reserve import Reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

SCHEMA_VERSION = 15
"""How many versions :mod:`.schema` has. It is imported only for a ledger that has another."""
KEPT_EVENTS = 10_000
"""Older events are deleted."""
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
"""SQLite's errors on a full disk. It calls the second, for the index of its write-ahead log, "disk I/O error"."""
UNWRITTEN = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
"""Its errors when the file, or one beside it, cannot be made or written; they do not tell why."""
AT_FDCWD, STATX_INO, STATX_BTIME = -100, 0x100, 0x800  # linux/stat.h
FOREIGN = "PRAGMA foreign_key_check"
COUNT = "UPDATE latest SET writes = writes + 1 RETURNING id, writes"
REBUILD = "'nvdimmctl check --repair' keeps the damaged file under another name, and makes a new one from the marks"
"""Hint for a damaged ledger."""
UNKNOWN_TIME = "0.000000000"
FROM_ELSEWHERE = (
    "is a backup or a copy, or new in place of one that was lost, and was not compared with what is there yet"
)
TAKE_OVER = "'nvdimmctl check --repair' does that; until then, domains that are defined can boot, and nothing else"
"""Hint for such a ledger."""


class Database:
    """The file of the ledger, created if it does not exist. Every method is one transaction.

    :param path: file in an existing folder; ``:memory:`` for a ledger that is not kept.
    :param tell: called with each event after it is written.
    :raises LedgerError: from every method, when the file cannot be read or written.
    :ivar device_marks: the marks of devices, in a folder beside the file.
    :ivar reserve: space for what a start needs; whoever wants it kept calls its ``keep``.
    """

    def __init__(self, path: str, tell: Callable[[Event], None] = unheard) -> None:
        self.path = path
        self._tell = tell
        self.reserve = Reserve(f"{path}-reserve")
        self._in_use = in_use.beside(path)
        self.device_marks = DeviceMarks(
            None if path == ":memory:" else os.path.join(os.path.dirname(os.path.abspath(path)), FOLDER)
        )
        try:
            before = file_number(path)
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            self._number = before or file_number(path)
        except sqlite3.Error as error:
            hint = "run as root" if os.geteuid() else "run 'nvdimmctl register' first"
            raise LedgerError(f"cannot open {self.path}: {error}", hint=hint) from error
        try:
            self._write([("PRAGMA foreign_keys = ON", ())], begin="")
            if self._rows("PRAGMA user_version")[0][0] != SCHEMA_VERSION:
                self._create()
        except BaseException:
            self.close()
            raise

    def check_integrity(self) -> None:
        """Check all of the file.

        :raises DamagedLedgerError: when it is damaged.
        """
        found = [line for (text,) in self._rows("PRAGMA integrity_check(3)") for line in str(text).splitlines()]
        if found == ["ok"]:
            found = [f"{table} refers to a {parent} that is not there" for table, _, parent, _ in self._rows(FOREIGN)]
        elif len(found) > 1 and found[0].startswith("***"):
            del found[0]  # a heading
        if found:
            raise DamagedLedgerError(f"{self.path} is damaged: {'; '.join(found)}", hint=REBUILD)

    def is_from_elsewhere(self) -> bool:
        """Return True when the ledger is not the one in use, and was not compared with what is there yet.

        It is a backup or a copy, or it is new, and there was one before. A copy of the whole file system cannot be
        told.
        """
        return bool(self._rows("SELECT uncompared FROM latest")[0][0]) or self.is_strange()

    def is_strange(self) -> bool:
        """Return True when the ledger is not the one in use, until :meth:`take_over`.

        Its file is not the one that it was made in, or another one was used since, or it was written more often. It is
        also True when nobody can say.
        """
        known = self._in_use.known()  # first: others may write meanwhile
        ((file, ledger, writes),) = self._rows("SELECT file, id, writes FROM latest")
        if known is not None and (known[0] != ledger or known[1] > writes):
            return True
        return bool(file) and not _is_same_file(file, file_identity(self.path))

    def check_own(self) -> None:
        """Check that the file is the ledger's own, as far as :meth:`is_from_elsewhere` can tell.

        :raises LedgerError: when it is not: what it says may be older than what is there; or when nobody can say.
        """
        self._in_use.read()
        if self.is_from_elsewhere():
            raise LedgerError(f"{self.path} {FROM_ELSEWHERE}", hint=TAKE_OVER)

    def take_over(self, *, compared: bool) -> None:
        """Take the ledger, which comes from elsewhere, for the one in use.

        :param compared: it was compared with what is there, and does not count as one from elsewhere any more.
        """
        values = (file_identity(self.path), _new_id(), not compared)
        self._write([("UPDATE latest SET file = ?, id = ?, uncompared = ?", values)])
        now = None
        while now != (now := self._rows("SELECT id, writes FROM latest")[0]):  # another process may take it over, too
            self._in_use.replace(*now)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _create(self) -> None:
        from nvdimm_driver.state.schema import SCHEMAS

        found = self._rows("PRAGMA user_version")[0][0]
        if found > SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path} has schema version {found}, this nvdimm_driver knows {SCHEMA_VERSION}",
                hint="a newer nvdimm_driver wrote it: install that version again",
            )
        # If two processes turn on WAL at the same time, SQLite fails one with "locked", whatever the timeout.
        folder = _lock_folder(self.path)
        try:
            found = self._rows("PRAGMA user_version")[0][0]
            if found == SCHEMA_VERSION:
                return  # another process was first
            self._write([("PRAGMA journal_mode = WAL", ())], begin="")
            self._db.create_function("real_path", 1, real_path)
            self._db.create_function("real_paths", 1, _real_paths)
            statements = [part for schema in SCHEMAS[found:] for part in schema.split(";\n") if part.strip()]
            own: list[tuple[str, Sequence[Any]]] = []
            known = self._in_use.known()
            if found == 0 and known is not None:  # the one in use was lost
                own.append(("UPDATE latest SET uncompared = 1", ()))
            if found < 11 and (found == 0 or known is None):  # else it is a backup
                own.append(("UPDATE latest SET file = ?", (file_identity(self.path),)))
            if found < 12:
                own.append(("UPDATE latest SET id = ?", (_new_id(),)))
            version = (f"PRAGMA user_version = {SCHEMA_VERSION}", ())
            self._write([*[(part, ()) for part in statements], *own, version])
            if found == 0:
                self._in_use.replace(*self._rows("SELECT id, writes FROM latest")[0])
        finally:
            os.close(folder)

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        """Return what a query finds. On a full disk, SQLite has no room for its index of the write-ahead log."""
        return self.reserve.spend(lambda: self._read(sql, values))

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._db.execute(sql, [_bindable(value) for value in values]).fetchall()
        except sqlite3.Error as error:
            raise self._failed("read", error) from error

    def _write_start(
        self, statements: Sequence[tuple[str, Sequence[Any]]], event: Event | None = None, *, guarded: bool = False
    ) -> bool:
        """Write what a start or its end needs, from the reserve if the disk is full; the event only if it fits, too."""
        try:
            return self.reserve.spend(lambda: self._write(statements, event, guarded=guarded))
        except FullDiskError:
            if event is None:
                raise
            written = self._write(statements, guarded=guarded)
            if written:
                self._tell(event)
            return written

    def _note(self, statements: Sequence[tuple[str, Sequence[Any]]], event: Event | None = None) -> None:
        """Write what nothing depends on; if that fails, only tell the event."""
        try:
            self._write(statements, event)
        except LedgerError:
            if event is not None:
                self._tell(event)

    def _write(
        self,
        statements: Sequence[tuple[str, Sequence[Any]]],
        event: Event | None = None,
        *,
        begin: str = "BEGIN IMMEDIATE",
        guarded: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> bool:
        """Execute the statements in one transaction, and record the event.

        :param guarded: do nothing, and return False, when the first statement changes no row.
        :param check: called in the transaction, before the statements: what it reads stays as it is until they are
            executed, and if it raises, none is.
        """
        try:
            if begin:
                self._db.execute(begin)
            check()
            for number, (sql, values) in enumerate([*statements, *_recording(event)]):
                changed = self._db.execute(sql, values).rowcount
                if guarded and number == 0 and changed != 1:
                    self._db.execute("ROLLBACK")
                    return False
            if begin:
                ledger, writes = self._count()
                self._db.execute("COMMIT")
                self._check_same()
                self._in_use.advance(ledger, writes)
        except (sqlite3.Error, UnicodeEncodeError) as error:
            raise self._failed("write", error) from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        if event is not None:
            self._tell(event)
        return True

    def _count(self) -> tuple[str, int]:
        """Count a write, in its transaction; return the ledger's id and number of writes.

        A ledger that was written less often than the one in use gets an id of its own: otherwise its number would reach
        that one's. Nobody else writes now, so in the ledger in use, the number is higher than in the file.
        """
        ((ledger, writes),) = self._db.execute(COUNT).fetchall()
        if self._in_use.is_beyond(ledger, writes):
            ledger = _new_id()
            self._db.execute("UPDATE latest SET id = ?", (ledger,))
        return ledger, writes

    def _check_same(self) -> None:
        """Check that the file that was written is the ledger still, which this process may have opened long ago.

        :raises LedgerError: when 'nvdimmctl check --repair' or somebody else has put another in its place.
        """
        if file_number(self.path) != self._number:
            raise LedgerError(f"{self.path} was replaced by another process meanwhile", hint="try again")

    def _failed(self, what: str, error: sqlite3.Error | UnicodeEncodeError) -> LedgerError:
        """Return the error for a query or a transaction that failed."""
        if isinstance(error, UnicodeEncodeError):
            return LedgerError(
                f"{self.path} cannot have '{escaped(error.object)}': it is not UTF-8", hint="rename the file"
            )
        extended = getattr(error, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return DamagedLedgerError(f"{self.path} is damaged: {error}", hint=REBUILD)
        failed = f"cannot {what} {self.path}"
        why = _write_error(os.path.dirname(self.path) or ".") if code in UNWRITTEN else 0
        if extended in FULL or why in (errno.ENOSPC, errno.EDQUOT):
            return own_file_error(failed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if why:
            return own_file_error(failed, OSError(why, os.strerror(why)))
        if code == sqlite3.SQLITE_READONLY:
            refused = OSError(errno.EACCES, str(error))  # the folder can be written, and not the file
            return LedgerError(f"{failed}: {error}", hint=hint_of(refused))
        if code in UNWRITTEN:
            return FullDiskError(f"{failed}: {error}", hint="is the disk full?")
        return LedgerError(f"cannot {what} {self.path}: {error}")


def _write_error(folder: str) -> int:
    """Return the errno with which a file of 64 KiB in a folder fails, or 0. Nothing is left behind."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, 64 << 10)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno or 0
    return 0


def file_number(path: str) -> int | None:
    """Return the number of the inode that a ledger's path leads to; None when nothing is there."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def file_identity(path: str) -> str:
    """Return what tells the file at a path from each other one that was or will be there; empty when nothing is.

    The number of an inode is used again; the time at which it was made, where the file system has that, differs. The
    file must not be opened: to close it would give up all locks that SQLite has on it in this process (fcntl(2)).

    :raises LedgerError: when it cannot be found out.
    """
    import ctypes
    import struct

    found = ctypes.create_string_buffer(256)  # struct statx
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_INO | STATX_BTIME, found):
        if (code := ctypes.get_errno()) == errno.ENOENT:
            return ""
        raise own_file_error(f"cannot look at {path}", OSError(code, os.strerror(code)))
    (mask,), (number,) = struct.unpack_from("I", found), struct.unpack_from("Q", found, 32)
    if not mask & STATX_BTIME:
        return f"{number}:{UNKNOWN_TIME}"
    seconds, nanoseconds = struct.unpack_from("qI", found, 80)
    return f"{number}:{seconds}.{nanoseconds:09}"


def _is_same_file(one: str, other: str) -> bool:
    """Return True for two of :func:`file_identity`; of times, only where both are known: a new kernel may tell one."""
    numbers, times = zip(one.split(":"), other.split(":"), strict=True)
    return numbers[0] == numbers[1] and (times[0] == times[1] or UNKNOWN_TIME in times)


def _new_id() -> str:
    return os.urandom(16).hex()


def _lock_folder(path: str) -> int:
    """Keep other processes from making or renaming a ledger, until the descriptor that is returned is closed."""
    import fcntl

    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    return folder


def _bindable(value: Any) -> Any:
    """Return a value for SQLite, whose text is UTF-8. A path that is not is no domain's, and equal to none as bytes."""
    return os.fsencode(value) if isinstance(value, str) and escaped(value) != value else value


def set_aside(path: str, number: int | None) -> str | None:
    """Rename a damaged ledger, so that the next who opens it makes a new one; return its new name.

    :param number: the :func:`file_number` of the damaged one. None is returned when another process has replaced it.
    :raises LedgerError: when it cannot be renamed.
    """
    folder = _lock_folder(path)
    try:
        known = in_use.beside(path)
        known.follow(known)  # a version that wrote no such file has made it: who comes next must know that one was lost
        return _rename(path) if file_number(path) == number else None
    finally:
        os.close(folder)


def _rename(path: str) -> str:
    aside = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        if os.path.exists(aside):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        # The write-ahead log first: it must not be taken for that of the new ledger.
        for suffix in ("-wal", "-shm", ""):
            if os.path.exists(path + suffix):
                os.rename(path + suffix, aside + suffix)
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be renamed to {aside}: {error.strerror}", hint=hint_of(error) or "try again"
        ) from error
    return aside


def _real_paths(nvdimms: str) -> str:
    """Return a description of NVDIMMs (:func:`.lifecycle.saved_guest.describe`) with paths without symbolic links."""
    import json

    found = json.loads(nvdimms) if nvdimms else None
    if found is None:
        return nvdimms
    return json.dumps([{**each, "path": real_path(each["path"])} for each in found])


def _recording(event: Event | None) -> list[tuple[str, Sequence[Any]]]:
    """Return the statements that write an event. SQLite makes the JSON: importing json takes longer than the rest."""
    if event is None:
        return []
    pairs = [escaped(part) if isinstance(part, str) else part for pair in event.detail.items() for part in pair]
    return [
        (
            "INSERT INTO event (time, kind, uuid, name, domid, detail) "
            f"VALUES (?, ?, ?, ?, ?, json_object({', '.join('?' * len(pairs))}))",
            (time.time(), event.kind, event.uuid, event.name, event.domid, *pairs),
        ),
        ("DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?", (KEPT_EVENTS,)),
    ]
