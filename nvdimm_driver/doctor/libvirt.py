# SPDX-License-Identifier: Apache-2.0
"""Check libvirt's daemon, and nvdimmd in front of it, as a client of theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self

from nvdimm_driver.doctor.finding import Finding, could_not, failed, noted, passed, warned
from nvdimm_driver.errors import ConfigError, NvdimmError, ProtocolError
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, Unpacker
from nvdimm_driver.xml import definition_files
from nvdimm_driver.xml.definition_files import DefinitionFiles
from nvdimm_driver.xml.parse_domain import extract

URI = "xen:///system"
TIMEOUT = 30.0
"""Seconds to wait for an answer: libvirtd, and an nvdimmd that its socket starts, may have to start first."""
ASK_TIMEOUT = 5.0
"""Seconds to wait for an answer on which little depends."""
XML_SECURE, XML_INACTIVE = 1, 2
"""VIR_DOMAIN_XML_SECURE, VIR_DOMAIN_XML_INACTIVE (include/libvirt/libvirt-domain.h)."""
NO_DOMAIN = 42
"""VIR_ERR_NO_DOMAIN (include/libvirt/virterror.h)."""
_RECEIVE = 65536

_DOMAIN = """<domain type='xen'>
  <name>nvdimmctl-doctor</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='xenfv'>hvm</type>{table}</os>
  <devices>{devices}</devices>
</domain>"""
_NVDIMM = (
    "<memory model='nvdimm' access='shared'><source><path>/nvdimmctl-doctor</path></source>"
    "<target><size unit='MiB'>2</size></target></memory>"
)
_TABLE = "<acpi><table type='{}'>/nvdimmctl-doctor</table></acpi>"
_TABLE_TYPES = ("rawset", "slic")
"""libvirt's names for the tables that libxl gives a guest by ``acpi_firmware``, the newer name first."""


def daemon_socket(direct: str, socket: str) -> str:
    """Return the path of libvirt's own socket: the first one where nvdimmd has taken the place of the other."""
    return direct if os.path.exists(direct) else socket


class Connection:
    """A connection to a libvirt daemon's socket, with ``xen:///system`` open.

    :param timeout: seconds for each answer; None for no limit.
    :raises OSError: when it cannot connect, or gets no answer in time.
    :raises LibvirtError: with the daemon's reason.
    :raises ProtocolError: when the answer is not libvirt's protocol.
    """

    def __init__(self, path: str, timeout: float | None = TIMEOUT) -> None:
        self._reader = wire.Reader()
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            # the daemon lists the authentication methods, none among them; it answers no other call before this
            self.call(Procedure.AUTH_LIST)
            self.call(Procedure.CONNECT_OPEN, bytes(Packer().optional_string(URI).uint32(0)))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError, LibvirtError, ProtocolError):
            self.call(Procedure.CONNECT_CLOSE)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def version(self) -> tuple[int, int, int]:
        """Return libvirt's version: major, minor, release."""
        number = Unpacker(self.call(Procedure.CONNECT_GET_LIB_VERSION)).uint64()
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    def to_native(self, xml: str) -> str:
        """Return xl's configuration for a domain XML. Nothing is defined."""
        arguments = bytes(Packer().string("xen-xl").string(xml).uint32(0))
        return Unpacker(self.call(Procedure.CONNECT_DOMAIN_XML_TO_NATIVE, arguments)).string()

    def domains(self) -> list[DomainRef]:
        """Return all domains, defined or running."""
        reply = Unpacker(self.call(Procedure.CONNECT_LIST_ALL_DOMAINS, bytes(Packer().int32(1).uint32(0))))
        return [reply.domain() for _ in range(reply.uint32())]

    def xml(self, domain: DomainRef, *, inactive: bool, secure: bool = False) -> str:
        """Return the XML of a domain as libvirt has it: of its definition, or of its guest, if that runs.

        :param secure: with passwords, as it is to be defined again.
        """
        flags = (XML_INACTIVE if inactive else 0) | (XML_SECURE if secure else 0)
        arguments = bytes(Packer().domain(domain).uint32(flags))
        return Unpacker(self.call(Procedure.DOMAIN_GET_XML_DESC, arguments)).string()

    def define(self, xml: str) -> None:
        """Define a domain."""
        self.call(Procedure.DOMAIN_DEFINE_XML_FLAGS, bytes(Packer().string(xml).uint32(0)))

    def find(self, uuid: str) -> DomainRef | None:
        """Return the domain of that uuid, defined or running; None when there is none."""
        try:
            return Unpacker(self.call(Procedure.DOMAIN_LOOKUP_BY_UUID, bytes(Packer().uuid(uuid)))).domain()
        except LibvirtError as error:
            if RemoteError.unpack(error.payload).code == NO_DOMAIN:
                return None
            raise

    def has_managed_save(self, name: str, uuid: str, save_dir: str) -> bool:
        """Return True if libvirt has the image of a saved guest of a defined domain.

        :param save_dir: its folder, from which it starts also what it does not know (:mod:`.rpc.libvirt_calls`).
        """
        if definition_files.has_managed_save(save_dir, name, uuid):
            return True
        arguments = bytes(Packer().domain(DomainRef(name, uuid, -1)).uint32(0))
        try:
            return Unpacker(self.call(Procedure.DOMAIN_HAS_MANAGED_SAVE_IMAGE, arguments)).int32() == 1
        except LibvirtError as error:
            if RemoteError.unpack(error.payload).code == NO_DOMAIN:
                return False
            raise

    def call(self, procedure: int, payload: bytes = b"") -> bytes:
        """Make a call; return the payload of its reply."""
        self._serial += 1
        header = wire.Header(wire.PROGRAM, wire.VERSION, procedure, wire.CALL, self._serial, wire.OK)
        self._socket.sendall(wire.pack(header, payload))
        while True:
            message = self._next()
            if message.header.kind == wire.REPLY and message.header.serial == self._serial:
                break
        if message.header.status != wire.OK:
            raise LibvirtError(message.payload)
        return message.payload

    def _next(self) -> wire.Message:
        while (message := self._reader.next_message()) is None:
            data = self._socket.recv(_RECEIVE)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._reader.receive(data)
        return message


def definition_of(path: str, restore: Callable[[str], str], uuid: str) -> DomainSpec | None:
    """Return a domain's NVDIMMs as libvirt's definition has them; None when it has none, or there is no definition.

    :param path: path of the daemon's socket.
    :param restore: restores domain XML that libvirt has.
    :raises ConfigError: when libvirt cannot be asked.
    """
    try:
        with Connection(path, ASK_TIMEOUT) as connection:
            found = connection.find(uuid)
            return extract(restore(connection.xml(found, inactive=True)), stored=True) if found else None
    except (OSError, LibvirtError, ProtocolError) as error:
        raise ConfigError(f"{path}: libvirt cannot be asked: {error}", hint="start libvirtd (or virtxend)") from error


def check_libvirt(path: str) -> Iterator[Finding]:
    """Check that libvirt's daemon has the libxl driver; report its version, and the ACPI tables it takes from users.

    :param path: path of its socket.
    """
    try:
        with Connection(path) as connection:
            yield passed("libvirt", f"{'.'.join(map(str, connection.version()))}, with its Xen driver")
            yield check_table_type(connection)
    except (OSError, LibvirtError, ProtocolError) as error:
        yield _unreachable(
            "libvirt", path, error, "install libvirt's Xen driver, and run: systemctl start libvirtd (or virtxend)"
        )
        yield failed("ACPI table type", "cannot be checked without libvirt")


def check_emulators(path: str, restore: Callable[[str], str], emulators: Emulators) -> Iterator[Finding]:
    """Check that each defined domain with NVDIMMs names a QEMU that it may have: others do not start.

    :param path: path of the daemon's socket.
    :param restore: restores domain XML that libvirt has.
    """
    check, wrong = "emulators", False
    try:
        with Connection(path) as connection:
            texts = [(each.name, connection.xml(each, inactive=True)) for each in connection.domains()]
    except (OSError, LibvirtError, ProtocolError):
        yield failed(check, "cannot be checked without libvirt")
        return
    for name, xml in texts:
        try:
            domain = extract(restore(xml), stored=True)
            if domain is not None:
                emulators.check(domain)
        except NvdimmError as error:
            wrong = True
            yield failed(check, f"{error.message}: domain {name} does not start", error.hint)
    if not wrong:
        yield passed(check, "domains with NVDIMMs name none that they may not have")


def check_definitions(stored: DefinitionFiles) -> Finding:
    """Check that the driver can read libvirt's definitions: it goes by them before a domain gets a device.

    :raises ConfigError: when it cannot.
    """
    check = "definitions"
    unknown = [domain.name for domain in stored if domain.text]
    if unknown:
        return warned(
            check,
            f"of {', '.join(unknown)}, the driver cannot parse the definition: no other domain gets a device that is "
            "named in it",
            "see what is in it: virsh dumpxml --inactive DOMAIN",
        )
    if not stored.folders:
        return warned(
            check,
            "[libvirt] definition_dirs is empty: after the ledger was lost, nothing says whose a device is",
            "remove the option, unless libvirt keeps no domains here",
        )
    return passed(check, "those of libvirt can be read, and say whose the devices are")


def check_table_type(connection: Connection) -> Finding:
    """Report the type that libvirt gives to a guest's own ACPI tables; the driver's do not go through libvirt."""
    check = "ACPI table type"
    for name in _TABLE_TYPES:
        try:
            config = connection.to_native(_DOMAIN.format(table=_TABLE.format(name), devices=""))
        except LibvirtError:
            continue
        if "acpi_firmware" in config:
            return noted(
                check,
                f"libvirt takes a guest's own tables as <os><acpi><table type='{name}'>; the device model adds those "
                "of NVDIMMs",
            )
    return noted(check, "libvirt takes no tables of a guest's own; those of NVDIMMs do not go through libvirt")


def check_nvdimmd(path: str, device_model: str, timeout: float = TIMEOUT) -> Finding:
    """Check that nvdimmd answers clients and rewrites a domain with an NVDIMM. Nothing is defined.

    :param path: path of its socket.
    """
    hint = "systemctl start nvdimmd.socket; 'nvdimmctl register' installs it, 'journalctl -u nvdimmd' has its log"
    try:
        with Connection(path, timeout) as connection:
            config = connection.to_native(_DOMAIN.format(table="", devices=_NVDIMM))
    except (OSError, LibvirtError, ProtocolError) as error:
        return _unreachable("nvdimmd", path, error, hint)
    if device_model not in config:
        return failed("nvdimmd", f"{path} is served, but not by nvdimmd: NVDIMMs are not rewritten", hint)
    return passed("nvdimmd", f"rewrites domains for clients of {path}")


def check_service(enabled: bool | None) -> Finding:
    """Check that nvdimmd starts at boot.

    :param enabled: True when nvdimmd.socket is enabled; None on a host without systemd.
    """
    check = "nvdimmd, boot"
    if enabled is None:
        return noted(check, "no systemd on this host starts it", "start it at boot, before libvirt's clients")
    if enabled:
        return passed(check, "nvdimmd.socket is enabled")
    return warned(check, "nvdimmd.socket is not enabled: it does not start at boot", "repeat 'nvdimmctl register'")


def _unreachable(check: str, path: str, error: OSError | LibvirtError | ProtocolError, hint: str) -> Finding:
    if isinstance(error, LibvirtError):
        return failed(check, f"{path}: {RemoteError.unpack(error.payload).message}", hint)
    if isinstance(error, TimeoutError):
        return failed(check, f"{path}: no answer in time", hint)
    if isinstance(error, OSError):
        return failed(check, f"{path}: {error.strerror or error}", hint)
    return could_not(check, error)
