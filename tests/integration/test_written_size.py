# SPDX-License-Identifier: Apache-2.0
"""What the driver counts of a client's XML is what libvirt makes of it, which has to go through its RPC and be read."""

from __future__ import annotations

import ctypes

import pytest

from nvdimm_driver.xml.client_xml import check_metadata
from tests.integration.test_attackers import MEMBER, Users, shared_users, users

__all__ = ["shared_users", "users"]

LONG = "\u0100" * 60_000
"""In UTF-8, 120 kB, which is within Linux' limit for an argument (MAX_ARG_STRLEN); 420 kB in libvirt's metadata."""


def written_by_libxml2(xml: str) -> bytes:
    """Return an element as libvirt writes it in metadata: a copy, which is in no document that has an encoding."""
    library = ctypes.CDLL("libxml2.so.2")
    for name in ("xmlReadMemory", "xmlDocGetRootElement", "xmlBufferCreate", "xmlBufferContent", "xmlCopyNode"):
        getattr(library, name).restype = ctypes.c_void_p
    pointer = ctypes.c_void_p
    document = library.xmlReadMemory(xml.encode(), len(xml.encode()), None, None, 0)
    node = library.xmlCopyNode(pointer(library.xmlDocGetRootElement(pointer(document))), 1)
    buffer = library.xmlBufferCreate()
    library.xmlNodeDump(pointer(buffer), None, pointer(node), 2, 1)
    return ctypes.string_at(library.xmlBufferContent(pointer(buffer)))


@pytest.mark.parametrize("character", "x<>&'\"\t\n\r\x7f\xe9\u0100\u5ba2\ufffd\U00010000\U0010ffff")
def test_metadata_have_no_more_than_what_is_counted(character: str) -> None:
    text, key, namespace = f"&#{ord(character)};" * 500, "k\u5ba2" * 20, "urn:" + "x" * 500
    value = "<{0}b{1} c\u5ba2='{2}'>{2}<{0}d\u5ba2/></{0}b>"
    written = written_by_libxml2(value.format(f"{key}:", f" xmlns:{key}='{namespace}'", text))
    assert len(written) <= check_metadata(value.format("", "", text).encode(), key, namespace).size


def metadata(users: Users, number: int, key: str, value: str) -> str:
    """Have a member set metadata; return the error."""
    words = ("metadata", "db1", "--uri", f"urn:{number}", "--key", f"{key}{number}", "--set", value, "--config")
    return users.virsh(MEMBER, *words).stderr


def disk(users: Users, number: int, path: str) -> str:
    """Have a member attach a disk; return the error."""
    file = users.own / "disk.xml"
    target = f"<target dev='xvd{'abc'[number]}' bus='xen'/>"
    file.write_text(f"<disk type='file' device='disk'><source file='{path}'/>{target}</disk>")
    file.chmod(0o644)
    return users.virsh(MEMBER, "attach-device", "db1", "/run/member/disk.xml", "--config").stderr


@pytest.mark.parametrize("what", ["attributes", "keys", "disks"])
def test_no_call_keeps_a_domain_from_being_read_and_started(users: Users, what: str) -> None:
    host = users.host
    host.define("db1", 1)
    if what == "attributes":
        refused = [metadata(users, number, "k", f"<b c='{LONG}'/>") for number in range(5)]
    elif what == "keys":
        refused = [metadata(users, 1, "k" * 40_000, "<a>" + "<b/>" * 60 + "</a>")]
    else:
        refused = [disk(users, number, "/" + "a" * 1_500_000) for number in range(2)]
    assert "may have 2 MiB" in refused[-1]
    seen = users.virsh(MEMBER, "dumpxml", "db1")
    assert seen.returncode == 0, seen.stderr
    if what != "disks":  # libxl wants the file
        host.check("start", "db1")
        host.check("destroy", "db1")


def test_a_definition_whose_attributes_grow_is_refused(users: Users) -> None:
    members = "".join(f"<x:b c='{LONG}'/>" for _ in range(5))
    changed = f"<metadata><x:a xmlns:x='urn:x'>{members}</x:a></metadata><devices>"
    done = users.define(users.host.folder / "pmem" / "db1.img", changed=("<devices>", changed))
    assert "may have 2 MiB" in done.stderr
