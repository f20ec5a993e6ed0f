# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl plan``: print everything that defining and starting a domain would do."""

from __future__ import annotations

import argparse
import sys

from nvdimm_driver.cmd.ctl.domain_file import FileAction, domain_in, driver_for, host_option, read_xml


class ShowPlan(FileAction):
    """Print everything that defining and starting a domain would do, and change nothing."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        host_option(parser)
        parser.add_argument("--json", action="store_true", help="print JSON, with sizes and addresses in bytes")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.xml.edit_devices import with_paths, with_slots
        from nvdimm_driver.xml.hooks import XmlHooks

        xml = read_xml(parsed_args.file)
        domain = domain_in(xml, parsed_args.file, self.app.conf)
        plan = driver_for(self.app.conf, parsed_args.host).plan(domain)
        if parsed_args.json:
            print(render.plan_json(plan))
            return
        paths = {old.path: new.path for old, new in zip(domain.nvdimms, plan.domain.nvdimms, strict=True)}
        complete = with_slots(with_paths(xml, paths), plan.domain)
        diff = render.xml_diff(xml, XmlHooks.from_conf(self.app.conf).rewrite(complete))
        sys.stdout.write(render.plan_text(plan, diff))
