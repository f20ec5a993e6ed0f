# SPDX-License-Identifier: Apache-2.0
"""The words by which people and programs name a domain: its uuid, its name, or its id while it runs.

Users choose the names of their domains, which can be the uuid or the id of another. So a word in the form of a uuid
never means a name, and a word that means two domains means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote
from uuid import UUID

from nvdimm_driver.errors import NotFoundError, UsageError
from nvdimm_driver.model import Record


def find_named(records: Sequence[Record], word: str) -> Record:
    """Return the domain that a word names.

    :raises NotFoundError: when there is none.
    :raises UsageError: when there are several.
    """
    uuid = uuid_in(word)
    found = [record for record in records if (record.uuid == uuid if uuid else word in _names(record))]
    if not found:
        raise NotFoundError(f"no domain {word!r} with NVDIMMs", hint="'nvdimmctl list' shows all")
    if len(found) > 1:
        meant = ", ".join(f"{record.uuid} (named {record.name})" for record in found)
        raise UsageError(f"{word!r} is the name or id of {len(found)} domains: {meant}", hint="give the uuid")
    return found[0]


def find_with_slot(records: Sequence[Record], word: str) -> tuple[Record, int | None]:
    """Return the domain and the slot that ``DOMAIN:SLOT`` names, or the domain, and no slot, that ``DOMAIN`` does.

    :raises NotFoundError: when there is none.
    :raises UsageError: when there are several.
    """
    name, _, slot = word.rpartition(":")
    if not name or not slot.isdecimal():
        return find_named(records, word), None
    names = {record.name for record in records}
    if uuid_in(name) or word not in names:
        return find_named(records, name), int(slot)
    if name in names:
        raise UsageError(f"{word!r} is a domain, and a slot of domain {name}", hint="give the uuid")
    return find_named(records, word), None


def uuid_in(word: str) -> str | None:
    """Return the uuid that a word is, in any of its forms, as text in lower case; None when it is none."""
    try:
        return str(UUID(word))
    except ValueError:
        return None


def word_for(name: str, uuid: str) -> str:
    """Return a word for a shell's command that names this domain and no other: its name or, if need be, its uuid."""
    ambiguous = uuid_in(name) or name.isdecimal() or name.startswith(("/", "-")) or ":" in name
    return uuid if ambiguous else quote(name)


def release_of(uuid: str, slot: int, options: str = "") -> str:
    """Return the command that gives up the NVDIMM in one slot of a domain, and no other NVDIMM of it.

    It names the domain by its uuid: another domain can have its name by now.
    """
    return f"nvdimmctl release {options}--slot {slot} {uuid}"


def _names(record: Record) -> set[str]:
    start = record.start
    return {record.name} if start is None or start.domid is None else {record.name, str(start.domid)}
