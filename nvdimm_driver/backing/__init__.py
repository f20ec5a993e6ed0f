# SPDX-License-Identifier: Apache-2.0
"""Backings of NVDIMMs: files on a DAX file system, device-dax devices, raw pmem block devices."""
