"""Libvirt's domain XML: what it says about NVDIMMs, and how it is rewritten for libxl and restored for the user.

No other folder knows the name of an element.
"""
