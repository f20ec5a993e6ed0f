"""Sphinx configuration: the HTML pages, and the man pages: of nvdimmd, nvdimmctl, and each of its commands."""

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "nvdimm_driver"
author = "the nvdimm_driver developers"
release = version = installed_version("nvdimm_driver")

extensions = ["oslo_config.sphinxext", "raised"]
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
