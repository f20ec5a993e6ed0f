# SPDX-License-Identifier: Apache-2.0
"""Persistent memory (vNVDIMM) for Xen HVM guests managed by libvirt."""
