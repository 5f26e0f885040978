"""The daemon: one process that speaks OSC and never computes, and the engine in another.

Everything here runs on one event loop and must not block it: the database and the deletion of results have a
thread, the engine has a process, and file names are all that is looked at on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bridge import daemon_host as host
from bridge import daemon_jobs as jobs
from bridge.daemon_net import Peer, listen
from bridge.daemon_state import Config, Daemon, event, log, send_error
from bridge.osc import Malformed, Message, read_packet
from bridge.protocol import REPLIES, Refused, check_request, take_envelope
from bridge.store import Root, make_root, open_database, recover, unfetched_bytes
from engine.errors import BacklineError

HANDLERS: dict[str, Callable[[Daemon, Peer, Peer, dict[str, Any]], None]] = {
    "/backline/hello": host.hello,
    "/backline/job/generate": jobs.generate,
    "/backline/job/fill": jobs.fill,
    "/backline/job/split": jobs.split,
    "/backline/job/continue": jobs.continue_,
    "/backline/job/status": jobs.status,
    "/backline/job/cancel": jobs.cancel,
    "/backline/job/fetched": jobs.fetched,
    "/backline/job/list": jobs.list_jobs,
    "/backline/model/list": host.model_list,
    "/backline/model/load": host.model_load,
    "/backline/model/unload": host.model_unload,
    "/backline/track/arm": host.track_arm,
    "/backline/track/rename": host.track_rename,
    "/backline/track/mute": host.track_mute,
    "/backline/track/remove": host.track_remove,
    "/backline/tempo/set": host.tempo_set,
    "/backline/transport/set": host.transport_set,
    "/backline/subscription/add": host.subscribe,
    "/backline/subscription/remove": host.unsubscribe,
}


def receive(daemon: Daemon, peer: Peer, packet: bytes) -> None:
    """Every packet of every socket comes by here; nothing that it holds may raise."""
    try:
        messages = read_packet(packet)
    except Malformed as error:
        refuse(daemon, peer, error, len(packet))
        return
    except Exception:
        log.exception("a packet could not be read")
        return
    for message in messages:
        _dispatch(daemon, peer, message, len(packet))


def refuse(daemon: Daemon, peer: Peer, error: Malformed, size: int) -> None:
    """Answers bytes that could not be read."""
    target = daemon.reply_to.get(peer) or peer
    trusted = daemon.config.token is None or daemon.trusted.get(peer) is not None
    send_error(daemon, peer, target, Refused(error.code, str(error)), size=None if trusted else size)


def forget(daemon: Daemon, peer: Peer) -> None:
    """A TCP connection has ended."""
    for table in (daemon.clients, daemon.reply_to, daemon.trusted, daemon.job_rates, daemon.error_rates):
        table.drop(peer)


def _dispatch(daemon: Daemon, peer: Peer, message: Message, size: int) -> None:
    if message.address in REPLIES:  # our own words: answering them could go round for ever
        return
    target = daemon.reply_to.get(peer) or peer
    trusted = daemon.config.token is None
    job_id = ""
    try:
        message, envelope = take_envelope(message)
        trusted = _is_trusted(daemon, peer, envelope)
        if not trusted:
            raise Refused("token", "This daemon asks for its token: end requests with token and the token.")
        if "reply" in envelope:
            target = peer.at(envelope["reply"])
        if message.tags[:1] == "s" and message.address.startswith("/backline/job/"):
            job_id = str(message.arguments[0])[:64]
        values = check_request(message)
        client = daemon.clients.get(target)
        if client is not None:
            client.seen = time.monotonic()
        HANDLERS[message.address](daemon, peer, target, values)
    except Refused as refused:
        send_error(daemon, peer, target, refused, message.address, job_id, None if trusted else size)
    except Exception:
        log.exception("a request failed")
        bug = Refused("internal", "Something unexpected went wrong: the daemon's log has more.")
        send_error(daemon, peer, target, bug, message.address, job_id)


def _is_trusted(daemon: Daemon, peer: Peer, envelope: dict[str, Any]) -> bool:
    token = daemon.config.token
    if token is None:
        return True
    given = envelope.get("token")
    if given is not None and hmac.compare_digest(given.encode(), token.encode()):
        daemon.trusted.put(peer, True)
        return True
    return given is None and daemon.trusted.get(peer) is not None


async def run(config: Config, ready: Callable[[], None]) -> None:
    """Runs until SIGTERM or SIGINT. Raises BacklineError where it cannot start."""
    os.umask(0o077)
    root = prepare_root(config.root)
    lock = _lock(root)
    try:
        database, reader = open_database(root), open_database(root)
        for row in recover(database, root):
            event("recovered", job=row.id, state=row.state, code=row.code)
    except (sqlite3.Error, OSError) as error:
        raise BacklineError(f"The state in {root.folder} cannot be used: {error}.") from error
    daemon = Daemon(config, root, lock, database, reader, ThreadPoolExecutor(1, "disk"))
    daemon.unfetched = unfetched_bytes(reader)
    daemon.engine.model_path = None if config.model is None else str(config.model)
    daemon.engine.model_name = "default" if config.model is None else config.model.name
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    sockets = await _listen(daemon)
    work = [
        loop.create_task(jobs.keep_worker(daemon)),
        loop.create_task(jobs.tick(daemon)),
    ]
    event("started", pid=os.getpid(), hosts=list(config.hosts), port=config.port, root=str(root.folder))
    ready()
    waiting = loop.create_task(stopped.wait())
    try:
        await asyncio.wait([waiting, *work], return_when=asyncio.FIRST_COMPLETED)
        for task in work:
            if task.done():
                task.result()  # it never ends but by an exception, which must not pass in silence
    finally:
        daemon.stopping = True
        waiting.cancel()
        for each in sockets:
            each.close()
        await jobs.stop(daemon, work)
        daemon.disk.shutdown(wait=True)
        database.close()
        reader.close()
        os.close(lock)
        event("stopped", pid=os.getpid())


async def _listen(daemon: Daemon) -> list[Any]:
    config = daemon.config
    hosts = list(config.hosts)

    def take(peer: Peer, packet: bytes) -> None:
        receive(daemon, peer, packet)

    def turn_down(peer: Peer, error: Malformed, size: int) -> None:
        refuse(daemon, peer, error, size)

    def lost(peer: Peer) -> None:
        forget(daemon, peer)

    if hosts == list(Config.hosts):  # the default: IPv6 where the machine has it
        with contextlib.suppress(OSError):
            return await listen(hosts, config.port, take, turn_down, lost)
        hosts = hosts[:1]
    try:
        return await listen(hosts, config.port, take, turn_down, lost)
    except OSError as error:
        where = f"{', '.join(hosts)} port {config.port}"
        reason = error.strerror or str(error)
        raise BacklineError(f"The daemon cannot listen on {where}: {reason}.") from error


def prepare_root(folder: Path) -> Root:
    """The daemon's folders, made. Raises BacklineError."""
    try:
        return make_root(folder)
    except OSError as error:
        raise BacklineError(f"{folder} cannot be used: {error.strerror or error}.") from error


def _lock(root: Root) -> int:
    """One daemon per root. The worker inherits the lock, so a killed daemon's last one is waited for."""
    handle = os.open(root.lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + 3
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise BacklineError(f"A daemon is running already with the root {root.folder}.") from None
            time.sleep(0.05)
