# SPDX-License-Identifier: Apache-2.0
"""``nvdimmd``: the proxy between libvirt's clients and libvirtd, which makes NVDIMMs work for every client."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from oslo_config import cfg

from nvdimm_driver import apparmor, conf, logs
from nvdimm_driver.driver import XenNvdimmDriver, load_driver
from nvdimm_driver.errors import ConfigError, NvdimmError
from nvdimm_driver.host_text import use_utf8
from nvdimm_driver.rpc.handler_types import Peer
from nvdimm_driver.rpc.intercept import Interceptor
from nvdimm_driver.rpc.proxy import Listener, serve
from nvdimm_driver.xml.hooks import XmlHooks

LOG = logging.getLogger(__name__)
FIRST_DESCRIPTOR = 3
"""sd_listen_fds(3): SD_LISTEN_FDS_START."""
READ_ONLY_NAME = "nvdimmd-ro.socket"
BACKLOG = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nvdimmd``; serves until SIGTERM or SIGINT."""
    use_utf8()
    arguments = sys.argv[1:] if argv is None else argv
    apparmor.enter(apparmor.NVDIMMD)
    try:
        files = list(arguments) or None
        options = conf.load(files)
        logs.to_journal("nvdimmd", options)
        _look_at_pools(options)
        with sockets(options) as (clients, readers):
            asyncio.run(_serve(options, files, clients, readers))
    except (NvdimmError, OSError) as error:
        print(f"nvdimmd: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, NvdimmError) else ConfigError.exit_code
    return 0


def _look_at_pools(options: cfg.ConfigOpts) -> None:
    """Note what the pools say of NVDIMMs now, and whose devices are.

    A ledger that cannot be used keeps no client from libvirt.

    :raises ConfigError: when the options are wrong.
    """
    try:
        with closing(load_driver(options)) as driver:
            driver.note_pools()
            driver.mark_devices()
    except ConfigError:
        raise
    except NvdimmError as error:
        LOG.warning("it is not noted which pools NVDIMMs are in, and whose devices are: %s", error)


async def _serve(
    options: cfg.ConfigOpts, files: list[str] | None, clients: socket.socket, readers: socket.socket
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    make_driver = driver_maker(files)
    interceptor = Interceptor(make_driver, XmlHooks.from_conf(options), options.libvirt.save_dir)
    rpc = options.rpc
    upstream = _first(rpc.libvirt_direct_socket, rpc.libvirt_socket)
    upstream_ro = _first(rpc.libvirt_direct_socket_ro, rpc.libvirt_socket_ro)
    listeners = [
        Listener(clients, upstream, False, interceptor.table(), may_write(rpc.group, upstream)),
        Listener(readers, upstream_ro, True, interceptor.table(read_only=True), partial(may_connect, upstream_ro)),
    ]
    writing = asyncio.create_task(repeat(metrics_writer(options, make_driver), options.metrics.interval, stop))
    notify("READY=1")
    await serve(listeners, stop)
    notify("STOPPING=1")
    await writing


def driver_maker(files: list[str] | None) -> Callable[[], XenNvdimmDriver]:
    """Return the function that makes a driver by the options of now: a new pool works at once, as for the hook.

    :param files: as for :func:`.conf.load`.
    """
    return lambda: load_driver(conf.load(files))


def metrics_writer(options: cfg.ConfigOpts, make_driver: Callable[[], XenNvdimmDriver]) -> Callable[[], None] | None:
    """Return the function that writes metrics for Prometheus; None if the operator wants none.

    :raises ConfigError: when prometheus_client is not installed.
    """
    if not options.metrics.textfile:
        return None
    from nvdimm_driver.metrics import write

    return partial(write, make_driver, options.metrics.textfile)


async def repeat(write: Callable[[], None] | None, seconds: float, stop: asyncio.Event) -> None:
    """Write metrics at this interval until `stop`; log an error unless it is the same as the last time."""
    last_error = ""
    while write and not stop.is_set():
        try:
            await asyncio.to_thread(write)
            last_error = ""
        except Exception as error:
            if str(error) != last_error:
                LOG.error("metrics: %s", error, exc_info=not isinstance(error, NvdimmError | OSError))
            last_error = str(error)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def _first(direct: str, usual: str) -> str:
    return direct if Path(direct).exists() else usual


def may_write(group: str, upstream: str) -> Callable[[Peer], bool]:
    """Return the function that admits clients which may write: root, and members of a group.

    :param upstream: path of libvirtd's socket, which they must be able to open themselves.
    :raises ConfigError: when there is no such group.
    """
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {group!r}", hint="set [rpc] group in the options") from None

    def allowed(peer: Peer) -> bool:
        return peer.uid == 0 or (gid in (peer.gid, *peer.groups) and may_connect(upstream, peer))

    return allowed


def may_connect(path: str, peer: Peer) -> bool:
    """Return True when a peer may open a socket itself, by its owner, group and mode (unix(7)), or none is there."""
    try:
        found = os.stat(path)
    except OSError:
        return True  # the connection says why
    if peer.uid == 0:
        return True
    if peer.uid == found.st_uid:
        return bool(found.st_mode & stat.S_IWUSR)
    if found.st_gid in (peer.gid, *peer.groups):
        return bool(found.st_mode & stat.S_IWGRP)
    return bool(found.st_mode & stat.S_IWOTH)


@contextmanager
def sockets(options: cfg.ConfigOpts) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the sockets to serve, the second for read-only clients: systemd's, or our own, which go at the end.

    :raises ConfigError: when systemd has passed one socket only, or another program serves a path.
    """
    inherited = activated()
    if inherited:
        if len(inherited) != 2:
            raise ConfigError(
                "systemd passed only one of the two sockets", hint="systemctl start nvdimmd.socket nvdimmd-ro.socket"
            )
        with inherited[False] as clients, inherited[True] as readers:
            yield clients, readers
        return
    gid = grp.getgrnam(options.rpc.group).gr_gid
    with bound(options.rpc.socket, 0o660, gid) as clients, bound(options.rpc.socket_ro, 0o666, gid) as readers:
        yield clients, readers


def activated() -> dict[bool, socket.socket]:
    """Return the sockets that systemd has passed (sd_listen_fds(3)); the key True is for read-only clients."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    count = int(os.environ.get("LISTEN_FDS", "0"))
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count)
    return {name == READ_ONLY_NAME: socket.socket(fileno=fd) for name, fd in zip(names, descriptors, strict=False)}


@contextmanager
def bound(path: str, mode: int, gid: int) -> Iterator[socket.socket]:
    """Yield a listening socket at a path, and delete it at the end: a stale one would cut off every client.

    :raises ConfigError: when another program serves the path.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        if _is_served(path):
            raise ConfigError(
                f"{path} is served by another program", hint="stop that program, such as virtxend or another nvdimmd"
            )
        Path(path).unlink(missing_ok=True)
        previous = os.umask(0o777)
        try:
            listener.bind(path)
        finally:
            os.umask(previous)
        try:
            os.chown(path, -1, gid)
            os.chmod(path, mode)
            listener.listen(BACKLOG)
            yield listener
        finally:
            Path(path).unlink(missing_ok=True)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def notify(state: str) -> None:
    """Send a state to systemd (sd_notify(3)), if systemd has started this process."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
            service.connect("\0" + address[1:] if address.startswith("@") else address)
            service.send(state.encode())


if __name__ == "__main__":
    sys.exit(main())
