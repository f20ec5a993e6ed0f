# SPDX-License-Identifier: Apache-2.0
"""Libvirt's domain XML: parse its NVDIMMs, rewrite it for libxl and restore it for the user.

No other folder knows the name of an element.
"""
