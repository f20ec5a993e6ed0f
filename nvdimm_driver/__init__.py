"""Persistent memory (vNVDIMM) for Xen HVM guests that are managed by libvirt."""
