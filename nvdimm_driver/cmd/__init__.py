# SPDX-License-Identifier: Apache-2.0
"""The programs that libvirt, libxl, systemd and the operator run."""
