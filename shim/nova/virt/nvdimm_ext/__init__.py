# SPDX-License-Identifier: Apache-2.0
"""What ``compute_driver = nvdimm_ext.XenLibvirtDriver`` names: Nova puts ``nova.virt.`` before it, whatever it is
(nova/virt/driver.py:load_compute_driver).
"""

from nvdimm_driver.nova.compute.driver import XenLibvirtDriver

__all__ = ["XenLibvirtDriver"]
