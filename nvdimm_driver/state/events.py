# SPDX-License-Identifier: Apache-2.0
"""Events of domains with NVDIMMs, for the ledger, ``nvdimmctl monitor`` and the logs; and the format of log lines.

Imports next to nothing: the device model uses it and must start fast.
"""

from __future__ import annotations

import os
import time

from nvdimm_driver.host_text import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = str | int | float | None

KINDS = {
    "defined": "INFO",
    "undefined": "INFO",
    "forgotten": "INFO",
    "mark-found": "WARNING",
    "prepared": "INFO",
    "started": "INFO",
    "start-failed": "ERROR",
    "released": "INFO",
    "put-away": "INFO",
    "plugged": "INFO",
    "unplugged": "INFO",
    "label-server-started": "INFO",
    "label-server-gone": "WARNING",
    "holder-gone": "WARNING",
    "bytes-lost": "WARNING",
    "backing-replaced": "WARNING",
}
"""The events that the ledger keeps, each with its log level."""
LOGGED = {
    "dying": "WARNING",
    "bad-blocks": "WARNING",
    "outside-pools": "WARNING",
    "misplaced-labels": "WARNING",
    "put-away-failed": "ERROR",
    "left-immutable": "WARNING",
    "left-deleted": "ERROR",
    "blocks-moved": "ERROR",
    "blocks-shared": "ERROR",
    "hook-failed": "ERROR",
    "label-server-failed": "ERROR",
    "hold-failed": "ERROR",
    "plug-unanswered": "WARNING",
}
"""Events that only the log has, if their level is above INFO."""


class Event:
    """Something that happened to a domain.

    :ivar domid: None when the domain did not run.
    :ivar detail: further fields; sizes in bytes, times in the unit that their name ends with. Keys that every event or
        log line has are reserved: id, time, event, domain, uuid, domid, program, pid, level.
    :ivar id: its number in the ledger; 0 if it is not there (yet).
    :ivar time: seconds since the epoch.
    """

    __slots__ = ("detail", "domid", "id", "kind", "name", "time", "uuid")

    def __init__(
        self,
        kind: str,
        uuid: str,
        name: str,
        domid: int | None,
        detail: Mapping[str, Value],
        *,
        id: int = 0,
        time: float = 0.0,
    ) -> None:
        self.kind = kind
        self.uuid = uuid
        self.name = name
        self.domid = domid
        self.detail = detail
        self.id = id
        self.time = time

    @property
    def level(self) -> str:
        """Log level, by its name in :mod:`logging`."""
        return KINDS.get(self.kind) or LOGGED.get(self.kind, "INFO")

    def fields(self) -> dict[str, Value]:
        """Return everything except id and time, in the order in which it is printed."""
        return {"event": self.kind, "domain": self.name, "uuid": self.uuid, "domid": self.domid, **self.detail}

    def __str__(self) -> str:
        return logfmt(self.fields())


def unheard(event: Event) -> None:
    """Ignore the event."""


def failure(error: Exception) -> dict[str, Value]:
    """Return the detail of an event that reports an error."""
    return {"error": type(error).__name__, "message": escaped(str(error))}


def utc(seconds: float) -> str:
    """Return a time in ISO 8601, to the millisecond, such as ``2026-11-25T18:44:11.120Z``."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def logfmt(fields: Mapping[str, Value]) -> str:
    """Return fields as ``key=value``, always on one line; a value with a space or a quote in it is quoted."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def log_line(seconds: float, program: str, level: str, fields: Mapping[str, Value], form: str) -> str:
    """Return a line of the log file, with the pid of this process.

    :param form: ``text`` or ``json``.
    """
    if form == "json":
        import json

        head = {"time": utc(seconds), "program": program, "pid": os.getpid(), "level": level}
        return escaped(json.dumps({**head, **fields}, ensure_ascii=False))
    return f"{utc(seconds)} {program}[{os.getpid()}] {level} {logfmt(fields)}"


def _quoted(value: Value) -> str:
    if value is None:
        return "-"
    text = str(value)
    if text and text.isprintable() and not any(each in text for each in " \"'=\\"):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
