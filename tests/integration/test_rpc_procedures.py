# SPDX-License-Identifier: Apache-2.0
"""Check the numbers of libvirt's procedures in nvdimm_driver, and which of them pass, against the installed libvirt.

Three parts of the installed libvirt are asked; nothing of them is copied here:

* The systemtap tapset, which libvirt's build makes of ``remote_protocol.x``, has every procedure's name and number.
* ``libvirt-api.xml``, which libvirt's build makes of the public functions and their comments, tells which procedures
  carry domain XML. A procedure has the name of its function. A procedure without a function is an event or a step of a
  migration; steps of a migration count as carrying domain XML.
* libvirtd with its libxl driver tells which procedures the driver implements. A procedure is called with zeros, which
  every procedure takes as arguments: empty strings, absent options, empty lists. libvirtd refuses some of them itself
  before it asks the driver, such as an empty name of a domain that migrates, from 11.3 on: VIR_ERR_INVALID_ARG. It is
  called again with a name before the zeros. VIR_ERR_NO_SUPPORT means that the driver does not implement it; success,
  or another error, that it does.

A procedure of a newer libvirt fails the test only when it carries domain XML and the libxl driver implements it.

Wireshark's dissector of libvirt has the names of all arguments, also those of the steps of a migration. It is not used:
it takes twelve more packages, and the names would have to be searched for in a shared library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.errors import VIR_ERR_INVALID_ARG, VIR_ERR_NO_SUPPORT
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.intercept import MIGRATE_DEST_XML, PASSED, TABLE
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import TYPED_PARAM_STRING, DomainRef, LibvirtError, Packer, RemoteError, TypedParam
from tests.integration.libvirtd import Libvirtd

TAPSET = Path("/usr/share/systemtap/tapset/libvirt_functions.stp")
API = Path("/usr/share/libvirt/api/libvirt-api.xml")
XML = re.compile("xml|metadata", re.IGNORECASE)
MIGRATE_PARAM = "VIR_MIGRATE_PARAM_"
ZEROS = bytes(1024)
NAME = bytes(Packer().string("db1"))
DOMAIN = DomainRef("db1", "7c7b0e2e-4a6e-4f0e-9a3b-000000000001", -1)


def numbers(program: int) -> dict[str, int]:
    """Return the numbers of a program's procedures by their names."""
    block = re.search(
        rf'\(program == {program} && version == {wire.VERSION}\)(.*?)"unknown"', TAPSET.read_text(), re.DOTALL
    )
    assert block, f"{TAPSET} does not know program {program:#x}, version {wire.VERSION}"
    found = re.findall(r'\(proc == (\d+)\) \{\s+procstr = "(\w+)"', block[1])
    return {name: int(number) for number, name in found}


class Api:
    """libvirt's public functions.

    :ivar params: the typed parameters that are XML: macro to name.
    :ivar functions: by the procedure's name without underscores: ``virDomainFSFreeze`` is ``domain_fsfreeze``.
    """

    def __init__(self) -> None:
        root = ElementTree.parse(API).getroot()
        macros = {macro.get("name", ""): macro.get("string", "") for macro in root.iter("macro")}
        self.params = {name: text for name, text in macros.items() if "_PARAM_" in name and XML.search(name)}
        self.functions = {
            function.get("name", "").removeprefix("vir").lower(): function for function in root.iter("function")
        }

    def carries_domain_xml(self, procedure: str) -> bool:
        """Return True also for a step of a migration."""
        function = self.functions.get(procedure.replace("_", ""))
        if function is None:
            return procedure.startswith("domain_") and not procedure.startswith("domain_event_")
        return "domain" in procedure and self.has_xml(function)

    def has_xml(self, function: ElementTree.Element) -> bool:
        """Return True for XML in a parameter, in a typed parameter, or in the string that is returned."""
        words = [parameter.get("name", "") for parameter in function.iterfind("arg")]
        returned = function.find("return")
        if returned is not None and returned.get("type") == "char *":
            words.append(returned.get("info", ""))
        families = {re.sub("_PARAM_.*", "_PARAM_", name) for name in self.params}
        comment = function.findtext("info", "")
        return any(XML.search(word) for word in words) or any(family in comment for family in families)


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.fixture(scope="module")
def procedures() -> Mapping[str, int]:
    return numbers(wire.PROGRAM)


@pytest.fixture(scope="module")
def with_xml(api: Api, procedures: Mapping[str, int]) -> set[str]:
    return {name for name in procedures if api.carries_domain_xml(name)}


@pytest.fixture(scope="module")
def libxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """Yield a connection to libvirtd with its libxl driver."""
    with Libvirtd(tmp_path_factory.mktemp("libvirtd")) as libvirtd:
        libvirtd.start()
        with Connection(str(libvirtd.folder / "run/libvirt/libvirt-sock")) as connection:
            yield connection


def refusal(libxl: Connection, procedure: int, arguments: bytes) -> RemoteError | None:
    """Return the error that libvirtd replies, None for success."""
    try:
        libxl.call(procedure, arguments)
    except LibvirtError as error:
        return RemoteError.unpack(error.payload)
    return None


def implements(libxl: Connection, procedure: int) -> bool:
    error = refusal(libxl, procedure, ZEROS)
    if error is not None and error.code == VIR_ERR_INVALID_ARG:
        error = refusal(libxl, procedure, NAME + ZEROS)
    return error is None or error.code != VIR_ERR_NO_SUPPORT


def test_every_number_is_libvirts(procedures: Mapping[str, int]) -> None:
    ours = {procedure.name.lower(): procedure.value for procedure in Procedure}
    assert ours == {name: procedures.get(name) for name in ours}


def test_keepalives_numbers_are_libvirts() -> None:
    assert numbers(wire.KEEPALIVE_PROGRAM) == {"ping": wire.KEEPALIVE_PING, "pong": wire.KEEPALIVE_PONG}


@pytest.mark.parametrize(
    "procedure",
    [
        pytest.param("domain_define_xml", id="parameter"),
        pytest.param("domain_save_params", id="typed parameter"),
        pytest.param("domain_get_xml_desc", id="returned"),
        pytest.param("domain_migrate_prepare3_params", id="migration"),
    ],
)
def test_procedures_with_domain_xml_are_found(with_xml: set[str], procedure: str) -> None:
    assert procedure in with_xml


def test_other_procedures_are_not(with_xml: set[str]) -> None:
    assert not {"domain_get_info", "domain_event_lifecycle", "network_define_xml", "connect_compare_cpu"} & with_xml


def test_every_function_with_domain_xml_has_a_procedure(api: Api, procedures: Mapping[str, int]) -> None:
    """Leave out the functions that migrate: libvirt's client library makes several calls of each."""
    known = {name.replace("_", "") for name in procedures}
    unknown = {
        name
        for name, function in api.functions.items()
        if "domain" in name and name not in known and api.has_xml(function)
    }
    # virDomainCreateLinux is an old name of virDomainCreateXML
    assert {name for name in unknown if not name.startswith("domainmigrate")} == {"domaincreatelinux"}


def test_every_procedure_with_domain_xml_is_handled_or_passed_for_a_reason(
    libxl: Connection, procedures: Mapping[str, int], with_xml: set[str]
) -> None:
    others = with_xml - {procedure.name.lower() for procedure in TABLE}
    assert set(PASSED) <= others
    assert implements(libxl, Procedure.DOMAIN_GET_XML_DESC)
    unseen = [name for name in sorted(others - set(PASSED)) if implements(libxl, procedures[name])]
    assert unseen == [], "belong in TABLE or, with the reason, in PASSED of nvdimm_driver/rpc/intercept.py"


@pytest.mark.parametrize(
    ("procedure", "arguments"),
    [
        ("domain_save_flags", Packer().domain(DOMAIN).string("/db1.save")),
        ("domain_restore_flags", Packer().string("/db1.save")),
    ],
)
def test_libxl_refuses_other_xml_for_a_saved_domain(
    libxl: Connection, procedures: Mapping[str, int], procedure: str, arguments: Packer
) -> None:
    error = refusal(libxl, procedures[procedure], bytes(arguments.optional_string("<domain/>").uint32(0)))
    assert error is not None
    assert error.message == "argument unsupported: xml modification unsupported"


def test_libxl_refuses_xml_in_other_parameters_of_a_migration(libxl: Connection, api: Api) -> None:
    others = {text for name, text in api.params.items() if name.startswith(MIGRATE_PARAM)} - {MIGRATE_DEST_XML}
    assert others
    for name in others:
        params = Packer().typed_params([TypedParam(name, TYPED_PARAM_STRING, "<domain/>")])
        error = refusal(libxl, Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS, bytes(params.opaque(b"").uint32(0)))
        assert error is not None
        assert error.message == f"argument unsupported: parameter '{name}' not supported"
