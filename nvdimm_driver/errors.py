"""What can go wrong, for people (message and hint), scripts (exit code) and libvirt clients (error code).

Imports nothing: the device model, which has to start fast, uses it.
"""

# include/libvirt/virterror.h
VIR_ERR_INTERNAL_ERROR = 1
VIR_ERR_NO_SUPPORT = 3
VIR_ERR_INVALID_ARG = 8
VIR_ERR_OPERATION_FAILED = 9
VIR_ERR_XML_ERROR = 27
VIR_ERR_RPC = 39
VIR_ERR_OPERATION_INVALID = 55
VIR_ERR_CONFIG_UNSUPPORTED = 67


class NvdimmError(Exception):
    """An error that an operator can read.

    :param message: what is wrong and where.
    :param hint: what to do about it; may be empty.
    """

    exit_code = 70  # sysexits.h: EX_SOFTWARE
    libvirt_code = VIR_ERR_INTERNAL_ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class DomainXmlError(NvdimmError):
    """The domain XML says something that cannot be right."""

    exit_code = 65  # EX_DATAERR
    libvirt_code = VIR_ERR_XML_ERROR


class UnsupportedError(NvdimmError):
    """The domain XML asks, correctly, for something that Xen or this driver cannot do."""

    exit_code = 65
    libvirt_code = VIR_ERR_CONFIG_UNSUPPORTED


class LayoutError(NvdimmError):
    """The NVDIMMs do not fit the guest's physical address space or its table space."""

    exit_code = 65
    libvirt_code = VIR_ERR_CONFIG_UNSUPPORTED


class BackingError(NvdimmError):
    """A backing file or device is missing, unfit, or not what it was."""

    exit_code = 66  # EX_NOINPUT
    libvirt_code = VIR_ERR_OPERATION_FAILED


class InUseError(NvdimmError):
    """A backing belongs to, or is in use by, another domain."""

    exit_code = 75  # EX_TEMPFAIL
    libvirt_code = VIR_ERR_OPERATION_INVALID


class GuardError(NvdimmError):
    """A mapping that must never be made: not pmem, RAM, or another running domain's."""

    exit_code = 77  # EX_NOPERM
    libvirt_code = VIR_ERR_OPERATION_FAILED


class AcpiError(NvdimmError):
    """ACPI tables could not be built, or what was built is not what was asked for."""

    exit_code = 70
    libvirt_code = VIR_ERR_INTERNAL_ERROR


class XenError(NvdimmError):
    """A call to the hypervisor or to xenstore failed."""

    exit_code = 71  # EX_OSERR
    libvirt_code = VIR_ERR_OPERATION_FAILED


class LedgerError(NvdimmError):
    """The ledger cannot be read or written, or has no record of what was asked for."""

    exit_code = 74  # EX_IOERR
    libvirt_code = VIR_ERR_OPERATION_FAILED


class ConfigError(NvdimmError):
    """An option or an installation step is missing or wrong."""

    exit_code = 78  # EX_CONFIG
    libvirt_code = VIR_ERR_OPERATION_FAILED


class ProtocolError(NvdimmError):
    """A libvirt client or libvirtd sent what is not libvirt RPC, or a message would not fit into it."""

    exit_code = 76  # EX_PROTOCOL
    libvirt_code = VIR_ERR_RPC
