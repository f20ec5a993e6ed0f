"""The one error of the lab."""


class LabError(Exception):
    """The lab, or a command in it, failed; the text has all that is known about it."""
