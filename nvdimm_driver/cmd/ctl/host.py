# SPDX-License-Identifier: Apache-2.0
"""Commands on the host: describe it, register the driver, unregister it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvdimm_driver.cmd.ctl.base import Action


class HostFile(Action):
    """Print the host's pmem namespaces as the file that 'plan --host' takes."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.backing.host_file import read_host

        del parsed_args
        print(read_host().to_json())


class Register(Action):
    """Install the libvirt hook, the device model and the folders. Can be repeated."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd import register
        from nvdimm_driver.driver import load_driver

        del parsed_args
        for line in register.register(self.app.conf):
            print(line)
        for record in load_driver(self.app.conf).renew_label_servers():
            print(f"renewed the label server of {record.name}")


class Unregister(Action):
    """Remove what 'register' installed. The ledger and all data stay."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd import register
        from nvdimm_driver.driver import load_driver

        del parsed_args
        running: list[str] = []
        # Not what the options say now: the guests were started with what is registered.
        self.app.conf.set_override("state_dir", register.registered_state_dir(self.app.conf))
        if Path(self.app.conf.state_dir).exists():
            driver = load_driver(self.app.conf)
            driver.reconcile()
            running = [record.name for record in driver.ledger.domains() if record.start]
        for line in register.unregister(self.app.conf, running):
            print(line)
