# SPDX-License-Identifier: Apache-2.0
"""ACPI tables for a guest's NVDIMMs: their formats, and the builders ``native`` and ``qemu``."""
