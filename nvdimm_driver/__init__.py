"""Persistent memory (vNVDIMM) for Xen HVM guests managed by libvirt."""
