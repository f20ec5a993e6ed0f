# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os
import shlex
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.logs import BareFormatter, LineFormatter, tell
from nvdimm_driver.state.events import KINDS, Event, log_line, logfmt, utc
from tests.unit.doubles import UUID

STARTED = Event("started", UUID, "db1", 3, {"map_ms": 12})
FAILED = Event("start-failed", UUID, "db 1", None, {"error": "XenError", "message": 'said "EPERM"\nand more'})


def record(message: object, level: int = logging.INFO) -> logging.LogRecord:
    made = logging.LogRecord("x", level, "x.py", 1, message, None, None)
    made.created = 1764096251.5
    return made


def test_times_are_utc_to_the_millisecond() -> None:
    assert utc(1764096251.0015) == "2025-11-25T18:44:11.001Z"
    assert utc(0) == "1970-01-01T00:00:00.000Z"


def test_an_event_is_a_line_of_words() -> None:
    assert str(STARTED) == f"event=started domain=db1 uuid={UUID} domid=3 map_ms=12"
    assert str(FAILED) == (
        f'event=start-failed domain="db 1" uuid={UUID} domid=- error=XenError message="said \\"EPERM\\"\\nand more"'
    )


@given(st.text())
def test_no_value_breaks_the_line_or_makes_another_key(text: str) -> None:
    """Users choose a domain's name. A shell, which quotes in the same way, reads printable text back unchanged."""
    line = logfmt({"a": text, "b": 1})
    assert line.isprintable()
    words = shlex.split(line)
    assert (len(words), words[1]) == (2, "b=1")
    if text.isprintable():
        assert words[0] == f"a={text}"


def test_the_log_has_program_process_and_level() -> None:
    pid = os.getpid()
    text = f"2025-11-25T18:44:11.500Z hook[{pid}] INFO event=started domain=db1 uuid={UUID} domid=3 map_ms=12"
    assert LineFormatter("hook", "text").format(record(STARTED)) == text
    assert log_line(1764096251.5, "hook", "INFO", STARTED.fields(), "text") == text
    assert BareFormatter().format(record(STARTED)) == text.partition("] ")[2]
    assert json.loads(LineFormatter("hook", "json").format(record(FAILED, logging.ERROR))) == {
        "time": "2025-11-25T18:44:11.500Z",
        "program": "hook",
        "pid": pid,
        "level": "ERROR",
        **FAILED.fields(),
    }


def test_what_is_no_event_is_one_line_too() -> None:
    try:
        raise ZeroDivisionError("a\nb")
    except ZeroDivisionError:
        failing = record("it broke", logging.ERROR)
        failing.exc_info = sys.exc_info()
    line = BareFormatter().format(failing)
    assert line.startswith('ERROR msg="it broke" trace="Traceback')
    assert line.endswith('ZeroDivisionError: a\\nb"')
    assert "\n" not in line


def test_each_event_is_logged_with_its_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for kind in [*KINDS, "dying", "provisioning"]:
            tell(Event(kind, UUID, "db1", None, {}))
    assert [entry.levelname for entry in caplog.records] == [*KINDS.values(), "WARNING", "INFO"]
