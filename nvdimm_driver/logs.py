# SPDX-License-Identifier: Apache-2.0
"""Logging of the programs: one line per event, in the format and from the level on that the options set."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from nvdimm_driver.host_text import open_log
from nvdimm_driver.state.events import Event, log_line, logfmt

if TYPE_CHECKING:
    from io import TextIOWrapper

    from oslo_config import cfg

    from nvdimm_driver.state.events import Value

LOG = logging.getLogger(__name__)


def tell(event: Event) -> None:
    """Log an event."""
    LOG.log(logging.getLevelNamesMapping()[event.level], event)


def to_file(program: str, conf: cfg.ConfigOpts) -> None:
    """Make this process log to the operator's log file, or to stderr when that cannot be written."""
    handler: logging.Handler
    try:
        handler = _File(conf.log_file)
    except OSError as error:
        _complain(conf.log_file, error)
        handler = logging.StreamHandler()
    _to(handler, LineFormatter(program, conf.log_format), conf.log_level)


def to_journal(program: str, conf: cfg.ConfigOpts) -> None:
    """Make this process log to stderr, for the journal, which adds time and program to lines of text by itself."""
    form = LineFormatter(program, conf.log_format) if conf.log_format == "json" else BareFormatter()
    _to(logging.StreamHandler(), form, conf.log_level)


class _File(logging.FileHandler):
    """A log file. A line that cannot be written, as on a full disk, is lost: no guest waits for a log."""

    def _open(self) -> TextIOWrapper:
        return open_log(self.baseFilename)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        _complain(self.baseFilename, error)


def _complain(path: str, error: OSError) -> None:
    print(f"nvdimm-driver: cannot log to {path}: {error.strerror}", file=sys.stderr)


class BareFormatter(logging.Formatter):
    """Formats level and fields."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname} {logfmt(self.fields(record))}"

    def fields(self, record: logging.LogRecord) -> dict[str, Value]:
        """Return the fields of an event, or the message of any other record, and the traceback if there is one."""
        fields: dict[str, Value] = {"msg": record.getMessage()}
        if isinstance(record.msg, Event):
            fields = record.msg.fields()
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return fields


class LineFormatter(BareFormatter):
    """Formats time, program, process, level and fields."""

    def __init__(self, program: str, form: str) -> None:
        super().__init__()
        self._program = program
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        return log_line(record.created, self._program, record.levelname, self.fields(record), self._form)


def _to(handler: logging.Handler, formatter: logging.Formatter, level: str) -> None:
    """Log from that level on; below INFO only the driver's own lines, not those of libraries."""
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=max(logging.INFO, logging.getLevelNamesMapping()[level]))
    logging.getLogger("nvdimm_driver").setLevel(level)
