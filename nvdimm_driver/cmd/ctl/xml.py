# SPDX-License-Identifier: Apache-2.0
"""Commands that rewrite domain XML for libvirt, and restore it."""

from __future__ import annotations

import argparse
import sys

from nvdimm_driver.cmd.ctl.domain_file import FileAction, read_xml


class Rewrite(FileAction):
    """Rewrite a domain XML with NVDIMMs for libvirt's libxl driver, and print it."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.xml.hooks import XmlHooks

        sys.stdout.write(XmlHooks.from_conf(self.app.conf).rewrite(read_xml(parsed_args.file)))


class Restore(FileAction):
    """Restore the user's domain XML from a rewritten one, and print it."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.xml.hooks import XmlHooks

        sys.stdout.write(XmlHooks.from_conf(self.app.conf).restore(read_xml(parsed_args.file)))
