"""Label areas of NVDIMMs: found in a backing, and served to a running guest by a stopped QEMU.

The AML that serves them without a process is in acpi/label_methods.py.
"""
