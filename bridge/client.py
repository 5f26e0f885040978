"""A client of the daemon: requests that can be awaited, over TCP or UDP.

    async with connect() as backline:
        job = await backline.fill("my-song", "piano", bpm=120)
        async for phase, fraction in job.progress():
            print(phase, fraction)
        result = await job.result()
        print(result.takes[0].files["piano"])

A request that is not answered is sent again; the daemon starts no job twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from bridge.jobs import EXTENSIONS
from bridge.osc import Framing, Malformed, Message, Value, read_packet, write_message
from bridge.protocol import ENDED, PATHS, PORT, named
from engine.errors import BacklineError

RESEND = 0.5  # seconds
RESENDS = 10
PATIENCE = 6.0  # seconds without a word of a job before its state is asked for
NUMBERS = {int: "i", float: "f", bool: "i"}


class DaemonError(BacklineError):
    """What the daemon refused, or why a job failed; `code` is one of bridge.protocol.ERRORS."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code


class JobCancelled(DaemonError):
    """The job was cancelled."""


@dataclass(frozen=True)
class MadeTake:
    """One take: its folder, and its wavs by stem."""

    number: int
    folder: Path
    files: dict[str, Path]


@dataclass(frozen=True)
class JobResult:
    """What a job left. seconds: how long the engine worked. note: what went otherwise, or empty."""

    id: str
    folder: Path
    takes: list[MadeTake]
    seconds: float
    provider: str
    note: str


@dataclass(eq=False)
class ClientJob:
    """A job that the daemon accepted. state, phase, fraction: as last heard."""

    id: str
    client: Client
    state: str = "queued"
    phase: str = ""
    fraction: float = 0.0
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    takes: dict[int, MadeTake] = field(default_factory=dict)
    ending: asyncio.Future[JobResult] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def result(self, *, keep: bool = False) -> JobResult:
        """Waits for the end. Raises DaemonError where the job failed and JobCancelled where it was cancelled.

        The daemon may remove the files some time after this, unless `keep`: then `fetched()` says when.
        """
        try:
            while not self.ending.done():
                self.heard.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.heard.wait(), PATIENCE)
                    continue
                await self.client.status(self.id)  # a lost end; where the daemon is gone this raises
            result = await self.ending
        finally:
            if self.ending.done():
                self.client.jobs.pop(self.id, None)
        if not keep:
            await self.fetched()
        return result

    async def progress(self) -> AsyncIterator[tuple[str, float]]:
        """(phase, fraction) as it goes on, until the job ends in whatever way."""
        while not self.ending.done():
            self.heard.clear()
            try:
                await asyncio.wait_for(self.heard.wait(), PATIENCE)
            except TimeoutError:
                await self.client.status(self.id)
                continue
            yield self.phase, self.fraction

    async def cancel(self) -> None:
        """Asks for the end; `result` raises JobCancelled when it has come."""
        await self.client.request("/backline/job/cancel", self.id, answer="/backline/job/state")

    async def fetched(self) -> None:
        """Tells the daemon that the results are taken, so that it may remove them one day."""
        await self.client.request("/backline/job/fetched", self.id, answer="/backline/job/state")


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that was sent: its address, what answers it, and the job it names, or ""."""

    address: str
    answer: str
    job_id: str
    future: asyncio.Future[dict[str, Any]]


class Client:
    """A connection to a daemon; made by `connect`. welcome: what the daemon said of itself."""

    def __init__(self, name: str, token: str | None):
        self.name, self.token = name, token
        self.welcome: dict[str, Any] = {}
        self.jobs: dict[str, ClientJob] = {}
        self.events: asyncio.Queue[Message] = asyncio.Queue(1000)
        self.closed: BacklineError | None = None
        self._waiting: list[_Waiting] = []
        self._listing: dict[str, dict[str, Any]] | None = None
        self._send: Any = None

    async def generate(self, seconds: float, *, id: str | None = None, **options: Value) -> ClientJob:
        """A whole band; options as in docs/osc.md, such as text="slow jazz", takes=4."""
        return await self._job("generate", id, {"seconds": float(seconds)}, options)

    async def fill(
        self,
        context: str | Path | Mapping[str, str | Path],
        armed: str,
        *,
        id: str | None = None,
        **options: Value,
    ) -> ClientJob:
        """The armed stems ("piano,guitar"), to go with a folder of stems or with files by stem."""
        if isinstance(context, str | Path):
            return await self._job("fill", id, {"folder": str(context), "armed": armed}, options)
        files = {f"stem:{name}": str(path) for name, path in context.items()}
        return await self._job("fill", id, {"folder": "", "armed": armed}, files | options)

    async def split(self, mix: str | Path, *, id: str | None = None, **options: Value) -> ClientJob:
        """One wav per stem of the file `mix`."""
        return await self._job("split", id, {"mix": str(mix)}, options)

    async def continue_(
        self, source: str | Path, seconds: float, *, id: str | None = None, **options: Value
    ) -> ClientJob:
        """What a folder of stems, a take's folder or a file plays next."""
        return await self._job("continue", id, {"source": str(source), "seconds": float(seconds)}, options)

    async def status(self, job_id: str) -> dict[str, Any]:
        """A job's state by the names of docs/osc.md."""
        return await self.request("/backline/job/status", job_id, answer="/backline/job/state")

    async def list_jobs(self, offset: int = 0, count: int = 20) -> list[dict[str, Any]]:
        """Jobs, the newest first."""
        return await self._list("/backline/job/list", offset, count, answer="/backline/job/listed")

    async def models(self) -> list[dict[str, Any]]:
        """The models there are."""
        return await self._list("/backline/model/list", answer="/backline/model/listed")

    async def _list(self, address: str, *arguments: Value, answer: str) -> list[dict[str, Any]]:
        self._listing = {}
        try:
            await self.request(address, *arguments, answer=answer)
            return list(self._listing.values())
        finally:
            self._listing = None

    async def subscribe(self, topic: str) -> None:
        """From now on the messages of a topic are in `events`."""
        await self.request("/backline/subscription/add", topic, answer="/backline/subscription/added")

    async def request(self, address: str, *arguments: Value, answer: str) -> dict[str, Any]:
        """Sends until the answer comes. Raises DaemonError for an error, BacklineError for silence."""
        named_id = str(arguments[0]) if arguments and address.startswith("/backline/job/") else ""
        if address == "/backline/job/list":
            named_id = ""
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        entry = _Waiting(address, answer, named_id, waiting)
        self._waiting.append(entry)
        try:
            for _ in range(RESENDS):
                if self.closed is not None:
                    raise self.closed
                self._send(message_of(address, [*arguments, *self._envelope()]))
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(asyncio.shield(waiting), RESEND)
        finally:
            self._waiting.remove(entry)
        raise BacklineError(
            "The daemon does not answer: is `backline serve` running, and does it ask for a token?"
        )

    def _envelope(self) -> list[Value]:
        return [] if self.token is None else ["token", self.token]

    async def _job(
        self, task: str, job_id: str | None, arguments: Mapping[str, Value], options: Mapping[str, Value]
    ) -> ClientJob:
        """Sends a job; files that the daemon may not read are copied to where it may, if we can."""
        job = ClientJob(job_id or new_id(task), self)
        self.jobs[job.id] = job
        inputs = Path(self.welcome["root"]) / "inputs" / job.id
        asked = {name: _absolute(name, value) for name, value in {**arguments, **options}.items()}
        try:
            try:
                answer = await self._ask(task, job.id, asked, len(arguments))
            except DaemonError as error:
                if error.code != "path" or not os.access(inputs.parent, os.W_OK):
                    raise
                staged = await asyncio.to_thread(_copy_in, asked, inputs)
                try:
                    answer = await self._ask(task, job.id, staged, len(arguments))
                except DaemonError:
                    shutil.rmtree(inputs, ignore_errors=True)
                    raise
        except BaseException:
            self.jobs.pop(job.id, None)
            raise
        if answer["state"] not in ENDED:
            job.state = answer["state"]
        return job

    async def _ask(
        self, task: str, job_id: str, asked: Mapping[str, Value], positional: int
    ) -> dict[str, Any]:
        values = list(asked.values())[:positional]
        pairs = [word for name, value in list(asked.items())[positional:] for word in (name, value)]
        return await self.request(
            f"/backline/job/{task}", job_id, *values, *pairs, answer="/backline/job/accepted"
        )

    def hear(self, packet: bytes) -> None:
        """A packet of the daemon."""
        try:
            messages = read_packet(packet)
        except Malformed:
            return
        for message in messages:
            self._hear(message)

    def _hear(self, message: Message) -> None:
        try:
            values = dict(named(message.address, message.arguments))
        except KeyError:
            return  # a newer daemon's word
        job = self.jobs.get(str(values.get("id", "")))
        if job is not None:
            _tell_job(job, message.address, values)
        if self._listing is not None and message.address in ("/backline/job/state", "/backline/model/entry"):
            self._listing[str(values.get("id", values.get("name")))] = values
        for entry in self._waiting:
            if entry.future.done() or entry.job_id != str(values.get("id", entry.job_id)):
                continue
            if message.address == entry.answer:
                entry.future.set_result(values)
            elif message.address == "/backline/error" and values["address"] in ("", entry.address):
                entry.future.set_exception(DaemonError(values["code"], values["sentence"]))
        if self.events.full():
            self.events.get_nowait()
        self.events.put_nowait(message)

    def lost(self) -> None:
        """The connection has ended."""
        self.closed = BacklineError("The connection to the daemon was lost.")
        for entry in self._waiting:
            if not entry.future.done():
                entry.future.set_exception(self.closed)
                entry.future.exception()  # looked at, so that nobody who does not wait is warned of it
        for job in self.jobs.values():
            if not job.ending.done():
                job.ending.set_exception(self.closed)
                job.ending.exception()
            job.heard.set()


def _tell_job(job: ClientJob, address: str, values: dict[str, Any]) -> None:
    word = address.rsplit("/", 1)[1]
    job.heard.set()
    if address == "/backline/error" or job.ending.done():
        return
    if word == "progress":
        job.state, job.phase, job.fraction = "running", values["phase"], values["fraction"]
    elif word in ("accepted", "heartbeat", "state"):
        job.state = values["state"]
    elif word == "take":
        more = values["more"]
        files = {str(stem): Path(str(path)) for stem, path in zip(more[::2], more[1::2], strict=False)}
        job.takes[values["take"]] = MadeTake(values["take"], Path(values["folder"]), files)
    elif word == "done":
        job.state = "done"
        if values["folder"] and len(job.takes) < values["takes"]:
            return  # a take's message was lost: the state is asked for, and says it again
        takes = [job.takes[number] for number in sorted(job.takes)]
        folder = Path(values["folder"])
        job.ending.set_result(
            JobResult(job.id, folder, takes, round(values["seconds"], 3), values["provider"], values["note"])
        )
    elif word == "cancelled":
        job.state = "cancelled"
        job.ending.set_exception(JobCancelled("cancelled", f"The job {job.id} was cancelled."))
    elif word == "error":
        job.state = "error"
        job.ending.set_exception(DaemonError(values["code"], values["sentence"]))
    if job.ending.done():
        job.ending.exception()  # as in `lost`


@asynccontextmanager
async def connect(
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    name: str | None = None,
    transport: Literal["tcp", "udp"] = "tcp",
    token: str | None = None,
) -> AsyncIterator[Client]:
    """A connection that has said hello. Raises BacklineError where no daemon answers."""
    client = Client(name or f"python-{os.getpid()}", token)
    loop = asyncio.get_running_loop()
    try:
        if transport == "tcp":
            stream, _ = await loop.create_connection(lambda: _Tcp(client), host, port)
            closing: Any = stream
        else:
            family = (await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM))[0][0]
            closing, _ = await loop.create_datagram_endpoint(
                lambda: _Udp(client), remote_addr=(host, port), family=family
            )
    except OSError as error:
        raise BacklineError(
            f"No daemon answers at {host} port {port}: start one with `backline serve`."
        ) from error
    try:
        client.welcome = await client.request("/backline/hello", client.name, answer="/backline/welcome")
        yield client
    finally:
        closing.close()


def _is_path(name: str, value: Value) -> bool:
    return bool(value) and isinstance(value, str) and (name in PATHS or name.startswith("stem:"))


def _absolute(name: str, value: Value) -> Value:
    return str(Path(str(value)).expanduser().absolute()) if _is_path(name, value) else value


def _copy_in(asked: Mapping[str, Value], folder: Path) -> dict[str, Value]:
    """The request with its files copied into `folder`, which the daemon removes when the job ends.

    Raises BacklineError where a file cannot be read or there is no room.
    """
    copied = dict(asked)
    try:
        for number, (name, value) in enumerate(asked.items()):
            if not _is_path(name, value):
                continue
            source, target = Path(str(value)), folder / str(number) / Path(str(value)).name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            copied[name] = str(target)
            if not source.is_dir():
                shutil.copyfile(source, target)
                continue
            target.mkdir(mode=0o700, exist_ok=True)
            for path in source.iterdir():
                if path.suffix.lower() in EXTENSIONS and path.is_file():
                    shutil.copyfile(path, target / path.name)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BacklineError(f"{error.filename or folder}: {error.strerror or error}.") from error
    return copied


def message_of(address: str, arguments: list[Value]) -> bytes:
    """A message whose numbers are typed as Python's: int i (h where it needs 64 bits), float f."""
    tags = ""
    for value in arguments:
        tag = "s" if isinstance(value, str) else NUMBERS[type(value)]
        tags += "h" if tag == "i" and not -(1 << 31) <= int(value) < 1 << 31 else tag
    plain = [int(value) if isinstance(value, bool) else value for value in arguments]
    return write_message(address, tags, plain)


def new_id(task: str) -> str:
    """An id that nobody else has."""
    return f"{task}-{secrets.token_hex(6)}"


class _Tcp(asyncio.Protocol):
    def __init__(self, client: Client):
        self.client = client
        self.framing = Framing()
        self.framing.slip = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.client._send = lambda packet: transport.write(self.framing.frame(packet))

    def data_received(self, data: bytes) -> None:
        for packet in self.framing.feed(data):
            self.client.hear(packet)

    def connection_lost(self, error: Exception | None) -> None:
        self.client.lost()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, client: Client):
        self.client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.client._send = cast(asyncio.DatagramTransport, transport).sendto

    def datagram_received(self, data: bytes, address: tuple[Any, ...]) -> None:
        self.client.hear(data)
