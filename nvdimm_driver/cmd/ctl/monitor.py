# SPDX-License-Identifier: Apache-2.0
"""Commands that watch domains with NVDIMMs: events and metrics."""

from __future__ import annotations

import argparse
import select
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Action, up_to_date
from nvdimm_driver.state.events import KINDS, Event, utc

if TYPE_CHECKING:
    from nvdimm_driver.state.ledger import Ledger

POLL_SECONDS = 0.5


class Monitor(Action):
    """Print the events of domains with NVDIMMs as they happen, one JSON object per line, until interrupted."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--domain", metavar="DOMAIN", help="print only events of the domain of that name, uuid or id"
        )
        parser.add_argument(
            "--event", action="append", choices=sorted(KINDS), help="print only events of this kind; can be repeated"
        )
        parser.add_argument(
            "--since",
            metavar="ID",
            type=_event_id,
            help="begin after the event with this id, 0 for all events that are kept (default: only new events)",
        )
        parser.add_argument(
            "--no-follow",
            action="store_true",
            help="end after the last event; without --since, print all events that are kept",
        )
        parser.add_argument("--timeout", metavar="SECONDS", type=float, help="end after this many seconds")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.registered import ledger_path
        from nvdimm_driver.state.ledger import Ledger

        with closing(Ledger(ledger_path(self.app.conf))) as ledger:
            try:
                _watch(ledger, parsed_args)
            except KeyboardInterrupt:
                return


class Metrics(Action):
    """Print metrics in Prometheus' text format, or write them to a file."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "-o", "--output", metavar="FILE", help="write to this file, atomically, instead of to standard output"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.errors import ConfigError
        from nvdimm_driver.metrics import render, write

        if not parsed_args.output:
            print(render(up_to_date(self.app)).decode(), end="")
            return
        try:
            write(lambda: up_to_date(self.app), parsed_args.output)
        except OSError as error:
            raise ConfigError(f"cannot write {parsed_args.output}: {error.strerror}") from error


def line(event: Event) -> str:
    """Return an event as monitor prints it."""
    import json

    return json.dumps({"id": event.id, "time": utc(event.time), **event.fields()}, ensure_ascii=False)


def _watch(ledger: Ledger, wanted: argparse.Namespace) -> None:
    """Print events as they happen.

    :raises BrokenPipeError: when the reader of standard output is gone.
    """
    deadline = None if wanted.timeout is None else time.monotonic() + wanted.timeout
    key = wanted.domain
    if key and not key.isdigit() and not _is_known(ledger, key):
        print(
            f"no domain {key!r} with NVDIMMs is known, now or in the events ('nvdimmctl list' shows all)",
            file=sys.stderr,
        )
    last = wanted.since
    if last is None:
        last = 0 if wanted.no_follow else ledger.last_event()
    reader = select.poll()
    reader.register(sys.stdout, 0)
    while True:
        for event in ledger.events(last):
            last = event.id
            if _is_wanted(event, wanted):
                print(line(event), flush=True)
        if wanted.no_follow or (deadline is not None and time.monotonic() >= deadline):
            return
        if reader.poll(1000 * POLL_SECONDS):
            raise BrokenPipeError


def _is_known(ledger: Ledger, key: str) -> bool:
    """Return whether a domain has that name or uuid, or an event that is kept is of one that had it."""
    if ledger.named(key) or ledger.find_domain(key) is not None:
        return True
    return any(key in (event.name, event.uuid) for event in ledger.events())


def _is_wanted(event: Event, wanted: argparse.Namespace) -> bool:
    if wanted.event and event.kind not in wanted.event:
        return False
    return wanted.domain is None or wanted.domain in (event.name, event.uuid, str(event.domid))


def _event_id(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of an event")
    return number
