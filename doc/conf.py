"""Sphinx configuration: the HTML pages, and the man page nvdimmctl(8) from commands.rst."""

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

# source, name, description, authors, section
man_pages = [
    ("commands", "nvdimmctl", "persistent memory for Xen domains managed by libvirt", [], 8),
    ("nvdimmd", "nvdimmd", "between libvirt's clients and libvirtd, for Xen domains with NVDIMMs", [], 8),
]
