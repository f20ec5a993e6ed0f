# SPDX-License-Identifier: Apache-2.0
"""The lab's only error."""


class LabError(Exception):
    """The lab, or a command in it, failed; the text has everything that is known about it."""
