# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl``: the operator's command."""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cliff.app import App
from cliff.commandmanager import CommandManager

from nvdimm_driver.cmd.ctl.terminal import for_terminal
from nvdimm_driver.host_text import ESCAPED, use_open_streams, use_utf8

if TYPE_CHECKING:
    from oslo_config import cfg


class Nvdimmctl(App):
    """The application: it has the options of all commands, and prints the errors."""

    def __init__(self) -> None:
        super().__init__(
            description="Persistent memory (NVDIMMs) for Xen domains managed by libvirt.",
            version=version("nvdimm_driver"),
            command_manager=CommandManager("nvdimm_driver.nvdimmctl"),
            deferred_help=True,
        )
        self.conf: cfg.ConfigOpts

    def build_option_parser(self, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        """Return the parser of the options of all commands.

        Cliff's own has ``--log-file``, with which somebody who may run one command as root could write any file, and
        takes abbreviations.
        """
        del kwargs
        parser = argparse.ArgumentParser(description=args[0], add_help=False, allow_abbrev=False)
        parser.set_defaults(log_file=None)  # cliff asks for it
        parser.add_argument("--version", action="version", version=f"nvdimmctl {args[1]}")
        verbosity = parser.add_mutually_exclusive_group()
        verbosity.add_argument(
            "-v",
            "--verbose",
            action="count",
            dest="verbose_level",
            default=self.DEFAULT_VERBOSE_LEVEL,
            help="Log each step to standard error.",
        )
        verbosity.add_argument(
            "-q", "--quiet", action="store_const", dest="verbose_level", const=0, help="Log only warnings and errors."
        )
        parser.add_argument("--debug", action="store_true", help="Print the traceback of an error.")
        parser.add_argument(
            "-h", "--help", action="store_true", dest="deferred_help", help="Print help, also that of a command."
        )
        parser.add_argument(
            "--config-file",
            action="append",
            help="Read this configuration file instead of the standard ones. Can be repeated.",
        )
        return parser

    def interact(self) -> None:
        """End without a command: cliff would read commands, and end without a word where nobody types any."""
        self.parser.print_usage(sys.stderr)
        print("nvdimmctl: there is no command: 'nvdimmctl --help' lists all", file=sys.stderr)
        sys.exit(2)

    def run_subcommand(self, argv: list[str]) -> int:
        """Run a command and return its exit status; cliff would print an NvdimmError without its hint and return 1.

        What a library or the system says of what was typed, or of a disk, is an error of one line, too.
        """
        try:
            command_class, name, rest = self.command_manager.find_command(argv)
            if name == "help" and rest:
                argv = rest
                self.command_manager.find_command(argv)
        except ValueError:
            return int(super().run_subcommand(argv))
        command = command_class(self, self.options, cmd_name=name)
        parsed_args = command.get_parser(f"{self.NAME} {name}").parse_args(rest)
        from nvdimm_driver import conf
        from nvdimm_driver.errors import NvdimmError

        try:
            self.conf = conf.load(self.options.config_file)
            status = int(command.run(parsed_args))
            sys.stdout.flush()
            return status
        except NvdimmError as error:
            return self._failed(str(error), error.exit_code)
        except BrokenPipeError:
            return 141
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            with suppress(OSError):
                sys.stdout.close()  # Python would try at its end to write again what could not be written
            return self._failed(f"{file}{error.strerror or error}")
        except (ValueError, MemoryError) as error:
            return self._failed(str(error) or "there is not enough memory")
        except KeyboardInterrupt:
            print("nvdimmctl: interrupted", file=sys.stderr)
            return 130

    def _failed(self, text: str, status: int = 1) -> int:
        """Print an error, with its traceback if that was asked for; return the exit status."""
        if self.options.debug:
            traceback.print_exc()
        print(f"nvdimmctl: {text}", file=sys.stderr)
        return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nvdimmctl``."""
    use_open_streams()
    use_utf8()
    sys.stdout.reconfigure(errors=ESCAPED)  # type: ignore[union-attr]
    sys.stdout, sys.stderr = for_terminal(sys.stdout), for_terminal(sys.stderr)
    gc.disable()  # commands are short, and a list of 10,000 NVDIMMs makes a hundred thousand objects that all stay
    return Nvdimmctl().run(list(sys.argv[1:] if argv is None else argv))
