# SPDX-License-Identifier: Apache-2.0
"""OpenStack Nova: its compute driver (compute/), and what the driver's own programs read of Nova's configuration.

conf.py and pmem_namespaces.py do not need Nova.
"""

RELEASE = 34
"""The release of Nova that the compute driver is made for."""
