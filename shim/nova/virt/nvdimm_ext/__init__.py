# SPDX-License-Identifier: Apache-2.0
"""The module of ``compute_driver = nvdimm_ext.XenLibvirtDriver``: Nova puts ``nova.virt.`` before every name
(nova/virt/driver.py:load_compute_driver).
"""

from nvdimm_driver.nova.compute.driver import XenLibvirtDriver

__all__ = ["XenLibvirtDriver"]
