"""Backings of NVDIMMs: files on a DAX file system, device-dax devices, raw pmem block devices."""
