# SPDX-License-Identifier: Apache-2.0
"""AppArmor profiles of the driver's programs (etc/apparmor.d/nvdimm-driver): each program goes into its own.

So a profile holds for Debian's Python and for one in a virtual environment, and for a program that libvirt runs
unconfined. Imports nothing: the device model uses it.
"""

NVDIMMD, HOOK, DEVICE_MODEL, LABEL_SERVER = "nvdimmd", "nvdimm-hook", "nvdimm-device-model", "nvdimm-label-server"
PROFILES = (NVDIMMD, HOOK, DEVICE_MODEL, LABEL_SERVER)


def enter(profile: str) -> bool:
    """Continue this thread, and what it starts, under a profile; return False if that cannot be.

    It cannot be without AppArmor, without the profile, or when the profile that the process has does not allow it. A
    process with ``no_new_privs`` can only get a profile in addition to its own (Linux:
    security/apparmor/domain.c:aa_change_profile).
    """
    return any(_order(f"{order} {profile}") for order in ("changeprofile", "stack"))


def _order(text: str) -> bool:
    """Write an order to the kernel, which takes it in one write alone."""
    try:
        with open("/proc/thread-self/attr/apparmor/current", "wb", buffering=0) as file:
            file.write(text.encode())
    except OSError:
        return False
    return True
