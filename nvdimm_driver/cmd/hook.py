# SPDX-License-Identifier: Apache-2.0
"""The libxl hook: ``50-nvdimm NAME OPERATION SUBOPERATION EXTRA``, domain XML on stdin (libvirt.org/hooks.html).

libvirt holds the domain's lock while the hook runs. When it fails, the client that starts the domain gets its stderr.
The hook itself is a shell script (:data:`.register.HOOK`), which starts this where there is something to do. The one
that earlier versions have installed starts it always.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nvdimm_driver.host_text import decode, printable, use_utf8

MARK = b"urn:nvdimm-driver:"
"""In every rewritten XML. Other domains are not the driver's: the hook ends before it imports anything for them."""


def main(argv: Sequence[str] | None = None, xml: bytes | None = None, files: Sequence[str] | None = None) -> int:
    """Run one hook operation; return its exit status.

    :param files: as for :func:`.conf.load`.
    """
    use_utf8()
    _, name, operation, *_ = [*(sys.argv if argv is None else argv), "", ""]
    if name == "Domain-0" or operation not in ("prepare", "release"):
        return 0
    text = sys.stdin.buffer.read() if xml is None else xml
    if MARK not in text:
        return 0
    return _run(operation, name, decode(text), files)


def _run(operation: str, name: str, xml: str, files: Sequence[str] | None) -> int:
    import logging

    from nvdimm_driver import apparmor, conf, logs
    from nvdimm_driver.driver import load_driver
    from nvdimm_driver.errors import NvdimmError
    from nvdimm_driver.state.events import Event, failure
    from nvdimm_driver.xml.document import parse
    from nvdimm_driver.xml.hooks import XmlHooks
    from nvdimm_driver.xml.parse_domain import check_started_ram, extract, uuid_of

    apparmor.enter(apparmor.HOOK)
    uuid = ""
    try:
        options = conf.load(files)
        logs.to_file("hook", options)
        logging.getLogger(__name__).debug("the hook is called: %s of domain %s", operation, name)
        root = parse(xml).root
        uuid = uuid_of(root) or ""
        if operation == "prepare":
            try:
                domain = extract(XmlHooks.from_conf(options).restore(xml), stored=True)
                if domain is not None:
                    check_started_ram(root)
            except NvdimmError as error:
                load_driver(options).ledger.record_failure(uuid, error)
                raise
            if domain is not None:
                load_driver(options).prepare(domain)
            return 0
        fault = load_driver(options).release(uuid)  # whatever is wrong with its XML
    except (NvdimmError, OSError) as error:
        if not (isinstance(error, NvdimmError) and error.recorded):
            logs.tell(Event("hook-failed", uuid, name, None, {"operation": operation, **failure(error)}))
        print(printable(f"nvdimm-driver: {error}"), file=sys.stderr)  # virsh shows it in a terminal
        return 1
    if fault:
        # libvirt gets only libxl's error for a start that failed in the device model: give its log the reason.
        print(printable(f"nvdimm-driver: domain {name} did not start: {fault}"), file=sys.stderr)
        return 1
    return 0
