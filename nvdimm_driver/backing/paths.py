# SPDX-License-Identifier: Apache-2.0
"""Paths of backings: resolved once, when somebody names one, and opened without symbolic links ever after.

A user can own a symbolic link that leads into a pool, and turn it at any moment. So the path that the ledger keeps, and
that libvirt's definition has, is the one that the link led to when the domain was defined.
"""

from __future__ import annotations

import os

from nvdimm_driver.errors import BackingError


def resolve(path: str) -> str:
    """Return the path that a path leads to: absolute, without symbolic links, ``..`` and double slashes.

    Nothing needs to be there. Call this where a path comes in, and pass on only what it returns.
    """
    return os.path.realpath(path)


def resolve_new(path: str) -> str:
    """Return the path that a path leads to, at which a backing will be made if there is none.

    :raises BackingError: when the path is a symbolic link to nothing: its file system may not be mounted.
    """
    real = resolve(path)
    if os.path.islink(path) and not os.path.lexists(real):
        raise BackingError(
            f"{path}: is a symbolic link to {real}, and nothing is there",
            hint="mount the file system of that path, or name the path itself to make a new file",
        )
    return real
