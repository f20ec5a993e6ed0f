# SPDX-License-Identifier: Apache-2.0
"""Nova's compute driver for Xen hosts. It runs in nova-compute, which is not root, and runs nvdimmctl for all it needs.

driver.py and host.py override methods of Nova's classes; patches.py adds xen to Nova's tables and functions, which
cannot be overridden; compatibility.py checks that the installed Nova is the one that these are written for.
"""
