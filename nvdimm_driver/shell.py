# SPDX-License-Identifier: Apache-2.0
"""Commands in hints. Root pastes them into a shell, and users have chosen names of domains and files in them.

Such a command stands in a hint without quotation marks around it: they would end at the first one of its own. A
program that follows symbolic links is named with a path only where nobody but root can turn one
(:func:`.backing.paths.others_can_turn`), or without the path.
"""

from __future__ import annotations

import shlex

NOT_AS_ROOT = (
    "not as root, but as a user who may write to its folder: a link of such a user's could lead root elsewhere"
)
"""How to do what no command is given for."""


def command(*words: object) -> str:
    """Return a command for a shell, each word quoted that needs it."""
    return shlex.join(map(str, words))


def repair_of(path: str) -> str:
    """Return the command that repairs what concerns one file or device, and nothing else."""
    return command("nvdimmctl", "check", "--repair", path)
