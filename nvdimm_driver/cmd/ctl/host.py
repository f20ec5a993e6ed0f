# SPDX-License-Identifier: Apache-2.0
"""Commands for the host: describe it, install the driver and remove it."""

from __future__ import annotations

import argparse
import os

from nvdimm_driver.cmd.ctl.base import Action


class HostFile(Action):
    """Print a description of this host, as the file that 'plan --host' takes."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.backing.host_file import read_host

        del parsed_args
        print(read_host().to_json())


class Register(Action):
    """Install libvirt's hook, the device model, the state folder and nvdimmd. Can be repeated."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--if-registered", action="store_true", help="do nothing where the hook is not installed yet, for upgrades"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd import register
        from nvdimm_driver.driver import load_driver

        if parsed_args.if_registered and not os.path.exists(register.libvirt_hook(self.app.conf).path):
            return
        for line in register.register(self.app.conf):
            print(line)
        driver = load_driver(self.app.conf)
        driver.note_pools()
        for record in driver.restart_lost():  # the version before may have held nothing
            print(f"hold the backings of {record.name}, which runs")
        for record, renewed in driver.renew_label_servers():
            print(
                f"renewed the label server of {record.name}"
                if renewed
                else f"did not renew the label server of {record.name}: shut that domain down soon, and start it again"
            )


class Unregister(Action):
    """Remove what 'register' installed. The ledger and all data stay."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver import registered
        from nvdimm_driver.cmd import register

        del parsed_args
        # The guests were started with the registered state folder, whatever the options say now.
        self.app.conf.set_override("state_dir", registered.state_dir(self.app.conf))
        conf = self.app.conf
        for line in register.unregister(conf, register.find_running(conf), register.find_saved(conf)):
            print(line)
