# SPDX-License-Identifier: Apache-2.0
"""Label areas of NVDIMMs: finding them in a backing, and serving them to a running guest with a stopped QEMU.

The AML that serves them without a process is in acpi/label_methods.py.
"""
