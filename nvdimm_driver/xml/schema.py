# SPDX-License-Identifier: Apache-2.0
"""Validation of domain XML against the schema that libvirt has installed, as ``virsh define --validate`` asks for.

Libvirt itself gets rewritten XML, whose NVDIMMs are in the metadata, where its schema allows anything.
"""

from __future__ import annotations

from pathlib import Path

from nvdimm_driver.errors import ConfigError, SchemaError
from nvdimm_driver.xml.document import parse

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def check_schema(xml: str, schema: Path = SCHEMA) -> None:
    """Check domain XML, as the user wrote it, against libvirt's schema.

    :raises DomainXmlError: when the XML cannot be parsed.
    :raises SchemaError: with libvirt's words, when it is not valid.
    :raises ConfigError: when the schema cannot be read.
    """
    parse(xml)  # it has no DTD, and stays within the limits
    from lxml import etree  # only here: it takes long

    try:
        validator = etree.RelaxNG(etree.parse(schema))
    except (OSError, etree.LxmlError) as error:
        raise ConfigError(f"cannot read {schema}: {error}", hint="libvirt installs it; or do not validate") from error
    if not validator.validate(etree.fromstring(xml.encode())):
        problems = "".join(f"\n{entry.message}" for entry in validator.error_log)
        raise SchemaError(
            f"XML document failed to validate against schema: Unable to validate doc against {schema}{problems}",
            hint="'nvdimmctl plan FILE' says what is wrong with an NVDIMM",
        )
