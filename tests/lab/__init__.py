"""The lab: a real Xen host with emulated NVDIMMs, in QEMU, for tests that need the real thing.

`base` turns Debian packages into a root tree and kernels, `image` turns those into what QEMU boots, `host` runs
one Xen host and its dom0, and `guest` speaks to the Linux guest that looks at its NVDIMMs.
"""
