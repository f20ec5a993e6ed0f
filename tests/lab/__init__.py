# SPDX-License-Identifier: Apache-2.0
"""The lab: a real Xen host with emulated NVDIMMs, in QEMU, for tests that need one.

`base` builds a root tree and kernels from Debian packages, `image` builds from those what QEMU boots, `host` runs
one Xen host and its dom0, and `guest` talks to the Linux guest that examines its NVDIMMs.
"""
