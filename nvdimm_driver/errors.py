# SPDX-License-Identifier: Apache-2.0
"""All errors, for people (message and hint), scripts (exit code) and libvirt clients (error code).

Imports next to nothing: the device model, which has to start fast, uses it.
"""

import errno
import os

# include/libvirt/virterror.h
VIR_ERR_INTERNAL_ERROR = 1
VIR_ERR_NO_SUPPORT = 3
VIR_ERR_INVALID_ARG = 8
VIR_ERR_OPERATION_FAILED = 9
VIR_ERR_XML_ERROR = 27
VIR_ERR_RPC = 39
VIR_ERR_OPERATION_INVALID = 55
VIR_ERR_CONFIG_UNSUPPORTED = 67
VIR_ERR_OPERATION_TIMEOUT = 68
VIR_ERR_XML_INVALID_SCHEMA = 92
VIR_ERR_DEVICE_MISSING = 99


class NvdimmError(Exception):
    """An error that an operator can read.

    :param message: what is wrong and where.
    :param hint: what to do about it; may be empty.
    :ivar recorded: True when the ledger has it as the reason of a failed start.
    """

    exit_code = 1
    libvirt_code = VIR_ERR_INTERNAL_ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.recorded = False

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM)
_READ_ONLY = "if Linux made it so after an error, 'dmesg' has that error; mount it read-write again"


def hint_of(error: OSError) -> str:
    """Return what to do about an error with a file of the driver's own; empty when the error says all there is."""
    if error.errno in _REFUSED:
        denied = "root is refused, too: is it immutable (lsattr), or does AppArmor deny it (dmesg)?"
        return "run as root" if os.geteuid() else denied
    if error.errno in _FULL:
        return "make room, and try again"
    return {errno.EROFS: _READ_ONLY, errno.EIO: "look at the kernel's log: dmesg"}.get(error.errno or 0, "")


class DomainXmlError(NvdimmError):
    """The domain XML is invalid."""

    libvirt_code = VIR_ERR_XML_ERROR


class SchemaError(NvdimmError):
    """The domain XML was to be validated, and does not match libvirt's schema."""

    libvirt_code = VIR_ERR_XML_INVALID_SCHEMA


class DeviceMissingError(NvdimmError):
    """The domain has no such NVDIMM."""

    libvirt_code = VIR_ERR_DEVICE_MISSING


class UnsupportedError(NvdimmError):
    """The domain XML is valid, but asks for something that Xen or this driver cannot do."""

    libvirt_code = VIR_ERR_CONFIG_UNSUPPORTED


class LayoutError(NvdimmError):
    """The NVDIMMs do not fit the guest's physical address space or its table space."""

    libvirt_code = VIR_ERR_CONFIG_UNSUPPORTED


class BackingError(NvdimmError):
    """A backing file or device is missing, unfit, or has been replaced or changed."""

    libvirt_code = VIR_ERR_OPERATION_FAILED


class UnwrittenError(BackingError):
    """Parts of a backing file are not allocated, or not written; they read as zeros, and are nowhere in the memory."""


class TurnedError(BackingError):
    """A part of a resolved path has become a symbolic link: what was at the path is not there any more."""


class InUseError(NvdimmError):
    """A backing belongs to, or is in use by, another domain."""

    exit_code = 4
    libvirt_code = VIR_ERR_OPERATION_INVALID


class UnansweredError(NvdimmError):
    """The guest has not done in time what it was asked for. It may do so later."""

    exit_code = 6
    libvirt_code = VIR_ERR_OPERATION_TIMEOUT


class GuardError(NvdimmError):
    """A mapping that must never be made: of RAM, of memory that is not pmem, or of another running domain's memory."""

    exit_code = 5
    libvirt_code = VIR_ERR_OPERATION_FAILED


class AcpiError(NvdimmError):
    """ACPI tables could not be built, or do not match the guest's layout."""

    libvirt_code = VIR_ERR_INTERNAL_ERROR


class XenError(NvdimmError):
    """A call to the hypervisor or to xenstore failed."""

    libvirt_code = VIR_ERR_OPERATION_FAILED


class NoWriteBackError(XenError):
    """The hypervisor refuses to cache a guest's NVDIMMs."""


class LedgerError(NvdimmError):
    """The ledger cannot be read or written, or lacks a record that it must have."""

    libvirt_code = VIR_ERR_OPERATION_FAILED


class FullDiskError(LedgerError):
    """The file system of the ledger is full, as far as SQLite can tell."""


def own_file_error(problem: str, error: OSError) -> LedgerError:
    """Return the error for a file of the driver's own that cannot be made or written.

    :param problem: what is wrong with which file.
    """
    if error.errno in _FULL:
        return FullDiskError(f"{problem}: the disk is full", hint=hint_of(error))
    why = "its file system is read-only" if error.errno == errno.EROFS else error.strerror
    return LedgerError(f"{problem}: {why}", hint=hint_of(error))


class DamagedLedgerError(LedgerError):
    """The ledger's file is damaged."""


class NotFoundError(NvdimmError):
    """There is no domain, pool or file of that name."""

    exit_code = 3
    libvirt_code = VIR_ERR_OPERATION_FAILED


class RefusedError(NvdimmError):
    """The operator's own rules forbid the operation, or it destroys data and was not forced."""

    exit_code = 5
    libvirt_code = VIR_ERR_OPERATION_INVALID


class UsageError(NvdimmError):
    """The command line is ambiguous, or contradicts itself."""

    exit_code = 2
    libvirt_code = VIR_ERR_INVALID_ARG


class BusyError(NvdimmError):
    """Too much is under way to begin more."""

    libvirt_code = VIR_ERR_OPERATION_FAILED


class InterruptedWork(NvdimmError):
    """The user has interrupted long work, which can be continued."""

    exit_code = 130
    libvirt_code = VIR_ERR_OPERATION_FAILED


class ConfigError(NvdimmError):
    """An option or an installation step is missing or wrong."""

    libvirt_code = VIR_ERR_OPERATION_FAILED


class PluginError(NvdimmError):
    """A plug-in has failed with an error that is none of the driver's: a fault in the plug-in."""

    libvirt_code = VIR_ERR_INTERNAL_ERROR


class ProtocolError(NvdimmError):
    """A libvirt client or libvirtd sent something that is not libvirt RPC, or a message exceeds its limits."""

    libvirt_code = VIR_ERR_RPC
