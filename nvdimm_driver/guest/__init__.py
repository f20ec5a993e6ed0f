"""A guest's physical address space: where NVDIMMs go in it, and which machine frames may be mapped there.

Pure, and what the device model imports of it imports nothing heavy.
"""
