# SPDX-License-Identifier: Apache-2.0
"""Entry points: the programs that libvirt, libxl and the operator run."""
