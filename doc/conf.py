"""Sphinx configuration: the HTML pages, and the man page nvdimmctl(8) from commands.rst."""

from importlib.metadata import version as installed_version

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

# source, name, description, authors, section
man_pages = [
    ("commands", "nvdimmctl", "persistent memory for Xen domains managed by libvirt", [], 8),
    ("nvdimmd", "nvdimmd", "between libvirt's clients and libvirtd, for Xen domains with NVDIMMs", [], 8),
]
