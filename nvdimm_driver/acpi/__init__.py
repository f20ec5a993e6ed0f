"""ACPI tables for a guest's NVDIMMs: their formats, and two ways to make them."""
