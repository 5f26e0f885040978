"""What the daemon knows, and the few things that all of it does: answer, publish, look at file names."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.daemon_net import Bounded, Bucket, Peer, TcpPeer, UdpPeer
from bridge.protocol import PATHS, PORT, Refused, reply
from bridge.store import Root, Row
from engine.model import Device

log = logging.getLogger("backline.daemon")

MAX_CLIENTS = 64
MAX_TRACKS = 512
MAX_SENDERS = 1024  # whose rates are watched
CLIENT_SECONDS = 600.0  # a UDP client that says nothing for so long gets no more events
NEW_JOBS = (10.0, 40.0)  # a second and at once, per sender
ERRORS_PER_SENDER = (10.0, 30.0)
ERRORS_IN_ALL = (100.0, 200.0)


@dataclass(frozen=True)
class Config:
    """How a daemon runs. folders: where files may be read beside the root. token: what senders must know.

    queue: jobs that wait at most. keep_jobs, keep_bytes: fetched results beyond these go, the oldest first.
    timeout: seconds a job may run where it asks for no other.
    """

    root: Path
    hosts: tuple[str, ...] = ("127.0.0.1", "::1")
    port: int = PORT
    model: Path | None = None
    device: Device = "auto"
    threads: int | None = None
    folders: tuple[Path, ...] = ()
    token: str | None = None
    queue: int = 32
    keep_jobs: int = 200
    keep_bytes: int = 20 << 30
    timeout: float = 3600.0


@dataclass
class Client:
    """Somebody who said hello or subscribed. name: its client_id. topics: what it is told of."""

    name: str = ""
    topics: set[str] = field(default_factory=set)
    seen: float = 0.0


@dataclass(eq=False)
class Job:
    """A job that has not ended, or whose end is not on the disk yet.

    row: as the database has it, or will. state: accepting, queued, running or cancelling. target: who asked.
    """

    row: Row
    request: dict[str, Any]
    model: str | None
    live: bool
    timeout: float
    target: Peer
    state: str = "accepting"
    phase: str = ""
    fraction: float = 0.0
    started: float = 0.0
    cancelled: float = 0.0
    timed_out: bool = False
    final: Row | None = None


@dataclass(eq=False)
class Engine:
    """What is known of the worker process and its model."""

    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    seen: float = 0.0
    failures: int = 0
    memory: int = 0
    model_name: str = ""
    model_path: str | None = None
    state: str = "loading"
    bundle: str = ""
    provider: str = ""
    note: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(eq=False)
class Daemon:
    """All state of the protocol process. database: for the disk thread alone; reader: for the event loop."""

    config: Config
    root: Root
    lock: int
    database: sqlite3.Connection
    reader: sqlite3.Connection
    disk: ThreadPoolExecutor
    engine: Engine = field(default_factory=Engine)
    jobs: dict[str, Job] = field(default_factory=dict)
    clients: Bounded[Client] = field(default_factory=lambda: Bounded(MAX_CLIENTS))
    reply_to: Bounded[Peer] = field(default_factory=lambda: Bounded(MAX_CLIENTS))
    trusted: Bounded[bool] = field(default_factory=lambda: Bounded(MAX_CLIENTS))
    job_rates: Bounded[Bucket] = field(default_factory=lambda: Bounded(MAX_SENDERS))
    error_rates: Bounded[Bucket] = field(default_factory=lambda: Bounded(MAX_SENDERS))
    all_errors: Bucket = field(default_factory=lambda: Bucket(*ERRORS_IN_ALL))
    tracks: dict[str, dict[str, Any]] = field(default_factory=dict)
    tempo: tuple[float, int] | None = None
    transport: tuple[str, float] | None = None
    unfetched: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    stopping: bool = False
    failure: str | None = None


def event(name: str, level: int = logging.INFO, **facts: Any) -> None:
    """A line of the log: what happened, and its facts by name."""
    log.log(level, name, extra={"facts": facts})


def background(daemon: Daemon, work: Coroutine[Any, Any, Any]) -> None:
    """Runs `work` beside everything else; a failure is logged and ends nothing."""

    async def guarded() -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a background task failed")

    task = asyncio.get_running_loop().create_task(guarded())
    daemon.tasks.add(task)
    task.add_done_callback(daemon.tasks.discard)


async def on_disk(daemon: Daemon, work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in the thread that owns the database."""
    return await asyncio.get_running_loop().run_in_executor(daemon.disk, work, *arguments)


def send(daemon: Daemon, target: Peer, packet: bytes) -> None:
    """A packet to one peer; what cannot be sent is lost, as UDP loses it."""
    try:
        target.send(packet)
    except (OSError, ValueError):
        event("unsent", logging.DEBUG, host=target.host, port=target.port)


def send_error(
    daemon: Daemon,
    peer: Peer,
    target: Peer,
    refused: Refused,
    address: str = "",
    job_id: str = "",
    size: int | None = None,
) -> None:
    """An error, within the sender's and everybody's rate; with `size` only if it is no longer than that."""
    bucket = daemon.error_rates.get(peer)
    if bucket is None:
        bucket = Bucket(*ERRORS_PER_SENDER)
        daemon.error_rates.put(peer, bucket)
    event("refused", logging.DEBUG, code=refused.code, address=address[:80], job=job_id, host=peer.host)
    if not (bucket.take() and daemon.all_errors.take()):
        return
    packet = reply("/backline/error", refused.code, str(refused), address[:80], job_id)
    if size is None or len(packet) <= size:
        send(daemon, target, packet)


def publish(daemon: Daemon, topic: str, packet: bytes, also: Peer | None = None) -> None:
    """A packet to all who subscribed to a topic, and to one more."""
    if also is not None:
        send(daemon, also, packet)
    for peer, client in daemon.clients.items():
        if topic in client.topics and peer != also:
            assert isinstance(peer, UdpPeer | TcpPeer)
            send(daemon, peer, packet)


def client_of(daemon: Daemon, target: Peer) -> Client:
    """The client at this address, new where there is none; the one that was silent longest makes room."""
    client = daemon.clients.get(target) or Client()
    client.seen = time.monotonic()
    daemon.clients.put(target, client)
    return client


def allowed(daemon: Daemon, name: str) -> str:
    """A file name of a request, links followed. Raises Refused outside the root and allowed folders."""
    path = Path(name)
    if not path.is_absolute():
        raise Refused("path", f"{name!r} is not an absolute file name.")
    folders = [daemon.root.jobs, daemon.root.inputs, *daemon.config.folders]
    try:
        real = path.resolve()
        inside = any(real.is_relative_to(folder) for folder in folders)
        there = inside and real.exists()
    except (OSError, RuntimeError, ValueError):
        inside = there = False
    if not inside:
        where = f"{daemon.root.inputs}, {daemon.root.jobs} or a folder of --allow"
        raise Refused("path", f"{name!r} is not in {where}.")
    if not there:
        raise Refused("path", f"{name!r} does not exist.")
    return str(real)


def resolved(daemon: Daemon, values: dict[str, Any]) -> dict[str, Any]:
    """The request with every file name checked and resolved. Raises Refused."""
    found = dict(values)
    for name, value in values.items():
        kind = "stem:" if name.startswith("stem:") else name
        if kind in PATHS and value:
            found[name] = allowed(daemon, value)
    return found


def plain(values: dict[str, Any]) -> str:
    """A request as text that is equal for equal requests."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def model_state(daemon: Daemon) -> bytes:
    engine = daemon.engine
    name = engine.bundle or engine.model_name
    return reply("/backline/model/state", name, engine.state, engine.provider, engine.note)
