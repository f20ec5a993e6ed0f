# SPDX-License-Identifier: Apache-2.0
"""Who may connect to nvdimmd: nobody whom libvirtd's own socket keeps out."""

from __future__ import annotations

import grp
import os
import socket
from pathlib import Path

import pytest

from nvdimm_driver.cmd.nvdimmd import may_connect, may_write
from nvdimm_driver.rpc.handler_types import Peer

ROOT, OWNER, MEMBER, SECOND, OTHER = Peer(0, 0, 1), Peer(7, 9, 1), Peer(5, 8, 1), Peer(5, 9, 1, (1, 8)), Peer(5, 9, 1)
GROUP = "adm"


@pytest.fixture
def upstream(tmp_path: Path) -> str:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    os.chown(path, 7, 8)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [
        (0o666, [ROOT, OWNER, MEMBER, SECOND, OTHER]),
        (0o660, [ROOT, OWNER, MEMBER, SECOND]),
        (0o600, [ROOT, OWNER]),
        (0o606, [ROOT, OWNER, OTHER]),
        (0o444, [ROOT]),
    ],
)
def test_the_mode_of_libvirtds_socket_holds(upstream: str, mode: int, allowed: list[Peer]) -> None:
    os.chmod(upstream, mode)
    peers = [ROOT, OWNER, MEMBER, SECOND, OTHER]
    assert [peer for peer in peers if may_connect(upstream, peer)] == allowed


def test_a_socket_that_is_not_there_is_for_the_connection_to_tell(tmp_path: Path) -> None:
    assert may_connect(str(tmp_path / "none"), OTHER)


def test_a_member_of_the_group_may_write_if_libvirtd_lets_it(upstream: str) -> None:
    gid = grp.getgrnam(GROUP).gr_gid
    member = Peer(5, 9, 1, (gid,))
    allowed = may_write(GROUP, upstream)
    os.chmod(upstream, 0o666)
    assert [allowed(peer) for peer in (ROOT, member, OTHER)] == [True, True, False]
    os.chmod(upstream, 0o600)
    assert [allowed(peer) for peer in (ROOT, member)] == [True, False]
