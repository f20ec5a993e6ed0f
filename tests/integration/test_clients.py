# SPDX-License-Identifier: Apache-2.0
"""Many clients at once: nvdimmd, the real libvirtd and its libxl driver, without Xen.

Each client sends and reads by itself, as if it were a process of its own. What is asserted is that each gets what it
asked for, and that nothing of it stays behind when it has gone.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nvdimm_driver.model import MIB
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, Packer, Unpacker
from tests.integration.bench_host import UUID, Host
from tests.integration.test_load import Client
from tests.waiting import wait_until

CLIENTS = 1000
DOMAINS = range(1, 11)
IDLE = 4
"""Sockets of nvdimmd without a client: two to listen, and the pair with which asyncio wakes itself."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"), size=128 * MIB)
    try:
        yield host
    finally:
        host.libvirtd.close()


def descriptors(host: Host) -> Counter[str]:
    """Return how many descriptors of each kind nvdimmd has open."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{host.libvirtd.pid_of('nvdimmd')}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found[os.readlink(link).split(":")[0]] += 1
    return found


def ask(client: Client, number: int) -> None:
    """Ask for a domain's definition."""
    domain = DomainRef(f"db{number}", UUID.format(number), -1)
    client.send(Procedure.DOMAIN_GET_XML_DESC, bytes(Packer().domain(domain).uint32(0)))


def define(client: Client, xml: str) -> None:
    client.send(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(xml)))


def files(reply: wire.Message) -> list[str]:
    """Return the names of the NVDIMMs' files in a definition."""
    assert reply.header.status == wire.OK, reply.payload
    return re.findall(r"/pmem/(\w+)\.img", Unpacker(reply.payload).string())


def test_each_client_gets_its_answer_and_nothing_of_it_stays(host: Host) -> None:
    for number in DOMAINS:
        host.define(f"db{number}", number)
    texts = {number: host.xml(f"db{number}", number).read_text() for number in DOMAINS}
    wait_until(lambda: descriptors(host)["socket"] == IDLE)
    before, records = descriptors(host), [host.record(f"db{number}") for number in DOMAINS]

    clients = [Client(host) for _ in range(CLIENTS)]
    domain = {client: DOMAINS[index % len(DOMAINS)] for index, client in enumerate(clients)}
    for client in clients:
        ask(client, domain[client])
    for client in clients:
        assert files(client.replies(1)[0]) == [f"db{domain[client]}"]
    assert descriptors(host)["socket"] == IDLE + 2 * CLIENTS

    # One for each domain defines it again, all ask again, and a quarter goes away meanwhile.
    order = random.Random(CLIENTS)
    defining = {*clients[: len(DOMAINS)]}
    leaving = {*order.sample(clients, CLIENTS // 4)}
    for client in order.sample(clients, CLIENTS):
        if client in defining:
            define(client, texts[domain[client]])
        ask(client, domain[client])
        if client in leaving:
            client.socket.close()
    for client in clients:
        if client not in leaving:
            replies = {reply.header.procedure: reply for reply in client.replies(1 + (client in defining))}
            assert files(replies.pop(Procedure.DOMAIN_GET_XML_DESC)) == [f"db{domain[client]}"]
            assert [reply.header.status for reply in replies.values()] == [wire.OK] * (client in defining)
            client.socket.close()

    wait_until(lambda: descriptors(host)["socket"] == IDLE)
    assert descriptors(host) == before
    assert [host.record(f"db{number}") for number in DOMAINS] == records
    assert "ERROR" not in host.nvdimmd_log()
