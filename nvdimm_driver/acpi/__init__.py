"""ACPI tables for a guest's NVDIMMs: their formats, and the builders ``native`` and ``qemu``."""
