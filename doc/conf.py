"""Sphinx configuration: the HTML pages, and the man pages: of nvdimmd, nvdimmctl, and each of its commands."""

import sys
from importlib.metadata import entry_points
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

commands = {entry.name.replace("_", "-"): entry for entry in entry_points(group="nvdimm_driver.nvdimmctl")}

# source, name, description, authors, section
man_pages = [
    ("commands", "nvdimmctl", "persistent memory for Xen domains managed by libvirt", [], 8),
    ("nvdimmd", "nvdimmd", "between libvirt's clients and libvirtd, for Xen domains with NVDIMMs", [], 8),
    ("commands/complete", "nvdimmctl-complete", "print a script for bash's completion", [], 8),
    *[
        (f"commands/{name}", f"nvdimmctl-{name}", entry.load().__doc__.splitlines()[0].rstrip("."), [], 8)
        for name, entry in commands.items()
    ],
]
