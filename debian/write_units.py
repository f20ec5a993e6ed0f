#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Write the units of the default options into the package. With these options, 'nvdimmctl register' writes none."""

import sys
from pathlib import Path

from nvdimm_driver import conf
from nvdimm_driver.cmd import systemd_units

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
for name, text in systemd_units.texts(conf.load([]), "/usr/bin/python3", "libvirtd").items():
    (folder / name).write_text(text, encoding="utf-8")
