"""Nova's compute driver for Xen hosts. It runs in nova-compute, which is not root, and asks nvdimmctl for all it needs.

patches.py adds xen to what Nova has no seam for.
"""
