# SPDX-License-Identifier: Apache-2.0
"""A guest's physical address space: where NVDIMMs go in it, and which machine frames may be mapped there.

Pure. The modules that the device model uses import nothing heavy.
"""
