# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: the HTML pages, and the man pages of nvdimmd, of nvdimmctl and of each of its commands."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from raised import raised

project = "nvdimm_driver"
author = "the nvdimm_driver developers"
release = version = installed_version("nvdimm_driver")

extensions = ["oslo_config.sphinxext"]
exclude_patterns = ["_build"]
nitpicky = True
highlight_language = "none"

html_theme = "furo"
html_title = f"nvdimm_driver {release}"
html_show_sphinx = False
html_copy_source = False

overview = (Path(__file__).parent / "commands.rst").read_text(encoding="utf-8")
commands = re.findall(r"^:doc:`[a-z ]+ <(commands/([a-z-]+))>`\n   (.+)\.$", overview, re.MULTILINE)

# source, name, description, authors, section
man_pages = [
    ("commands", "nvdimmctl", "persistent memory for Xen domains managed by libvirt", [], 8),
    ("nvdimmd", "nvdimmd", "between libvirt's clients and libvirtd, for Xen domains with NVDIMMs", [], 8),
    *[(page, f"nvdimmctl-{name}", re.sub(r"[*`\\]", "", what), [], 8) for page, name, what in commands],
]


class Raised(Directive):
    """``.. raised:: Kind``: a list of all errors of that kind."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the list: each message and, in parentheses as it is printed, its hint."""
        errors = dict.fromkeys(
            (message, "; ".join(hint for hint in hints if hint.strip("… ")))
            for message, hints in raised(self.arguments[0])
        )
        items = nodes.bullet_list()
        for message, hint in errors:
            said = [nodes.literal(text=message), *([nodes.Text(f" ({hint})")] if hint else [])]
            items += nodes.list_item("", nodes.paragraph("", "", *said))
        return [items]


def setup(app: Sphinx) -> None:
    """Register the directive; Sphinx calls this."""
    app.add_directive("raised", Raised)
