"""What happens to domains with NVDIMMs, in the words of the ledger, of ``nvdimmctl monitor`` and of the logs.

Imports next to nothing: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = str | int | float | None

KINDS = {
    "defined": "INFO",
    "undefined": "INFO",
    "forgotten": "INFO",
    "prepared": "INFO",
    "started": "INFO",
    "start-failed": "ERROR",
    "released": "INFO",
    "put-away": "INFO",
    "label-server-started": "INFO",
    "label-server-gone": "WARNING",
}
"""The events that the ledger keeps, and how serious each is."""
LOGGED = {"dying": "WARNING", "bad-blocks": "WARNING", "hook-failed": "ERROR", "label-server-failed": "ERROR"}
"""Events that only the log has, where they are more than an INFO."""


class Event:
    """Something that happened to a domain.

    :ivar domid: None when the domain did not run.
    :ivar detail: what else there is to say; sizes are in bytes, times in the unit that their name ends with. No key is
        one that an event or a log line has anyway: id, time, event, domain, uuid, domid, program, pid, level.
    :ivar id: its number in the ledger; 0 for one that is not there (yet).
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
        """How serious it is: a name of a level of :mod:`logging`."""
        return KINDS.get(self.kind) or LOGGED.get(self.kind, "INFO")

    def fields(self) -> dict[str, Value]:
        """All of it but number and time, in the order in which it is printed."""
        return {"event": self.kind, "domain": self.name, "uuid": self.uuid, "domid": self.domid, **self.detail}

    def __str__(self) -> str:
        return logfmt(self.fields())


def unheard(event: Event) -> None:
    """Nobody is told."""


def failure(error: Exception) -> dict[str, Value]:
    """The detail of an event that is an error."""
    return {"error": type(error).__name__, "message": str(error)}


def utc(seconds: float) -> str:
    """A time as ISO 8601 has it, to the millisecond, such as ``2026-11-25T18:44:11.120Z``."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def logfmt(fields: Mapping[str, Value]) -> str:
    """Fields as ``key=value``, on one line whatever is in them; a value with a space or a quote in it is quoted."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def log_line(seconds: float, program: str, level: str, fields: Mapping[str, Value], form: str) -> str:
    """A line of the log file, of this process.

    :param form: ``text`` or ``json``.
    """
    if form == "json":
        import json

        head = {"time": utc(seconds), "program": program, "pid": os.getpid(), "level": level}
        return json.dumps({**head, **fields}, ensure_ascii=False)
    return f"{utc(seconds)} {program}[{os.getpid()}] {level} {logfmt(fields)}"


def _quoted(value: Value) -> str:
    if value is None:
        return "-"
    text = str(value)
    if text and text.isprintable() and not any(each in text for each in " \"'=\\"):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
