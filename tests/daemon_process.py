"""A daemon in a process of its own, and a raw OSC conversation with it over UDP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pythonosc.osc_message import OscMessage

from bridge.client import message_of
from bridge.osc import Value
from bridge.protocol import named

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that neither UDP nor TCP uses now."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port = int(tcp.getsockname()[1])
            with contextlib.suppress(OSError):
                udp.bind(("127.0.0.1", port))
                return port


@dataclass
class Running:
    """A daemon that runs."""

    process: subprocess.Popen[bytes]
    port: int
    root: Path

    @property
    def log(self) -> str:
        return (self.root / "daemon.log").read_text("utf-8")


def start(root: Path, model: Path | None, *options: object, port: int | None = None) -> Running:
    """Starts a daemon; `wait_loaded` waits for its model."""
    port = port or free_port()
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "bridge.cli", "serve", "--root", str(root), "--port", str(port)]
    command += ["--threads", "1"] + ([] if model is None else ["--model", str(model)])
    with (root.parent / f"{root.name}.err").open("ab") as err:
        process = subprocess.Popen(
            [*command, *map(str, options)],
            stdout=err,
            stderr=err,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    return Running(process, port, root)


def stop(running: Running, number: int = signal.SIGTERM) -> int:
    """Ends a daemon; returns its exit status."""
    if running.process.poll() is None:
        running.process.send_signal(number)
    return running.process.wait(20)


@contextlib.contextmanager
def daemon(root: Path, model: Path | None, *options: object) -> Iterator[Running]:
    """A daemon whose model is loaded."""
    running = start(root, model, *options)
    try:
        wait_loaded(running)
        yield running
    finally:
        stop(running)


@dataclass
class Talk:
    """A UDP socket that speaks to a daemon. heard: every message so far, (address, values by name)."""

    port: int
    host: str = "127.0.0.1"
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.bind((self.host, 0))

    def send(self, address: str, *arguments: Value) -> None:
        self.raw(message_of(address, list(arguments)))

    def raw(self, packet: bytes) -> None:
        self.socket.sendto(packet, (self.host, self.port))

    def hear(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        """The next message, None where none comes."""
        self.socket.settimeout(max(0.001, seconds))
        try:
            message = OscMessage(self.socket.recv(1 << 16))
        except TimeoutError:
            return None
        self.heard.append((message.address, dict(named(message.address, message.params))))
        return self.heard[-1]

    def until(self, *addresses: str, seconds: float = 20.0, **wanted: Any) -> dict[str, Any]:
        """The next message of one of these addresses whose values are as wanted."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            heard = self.hear(deadline - time.monotonic())
            if heard and heard[0] in addresses and wanted.items() <= heard[1].items():
                return heard[1]
        raise AssertionError(f"{addresses} {wanted} did not come; heard: {self.heard[-12:]}")

    def ask(self, address: str, *arguments: Value, answer: str, seconds: float = 20.0) -> dict[str, Any]:
        """Sends and waits for this answer, or for /backline/error where that is not it: an AssertionError."""
        self.send(address, *arguments)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            heard = self.hear(deadline - time.monotonic())
            if heard and heard[0] == answer:
                return heard[1]
            if heard and heard[0] == "/backline/error":
                raise AssertionError(f"{address} was refused: {heard[1]}")
        raise AssertionError(f"{address} was not answered by {answer}; heard: {self.heard[-12:]}")

    def refused(self, address: str, *arguments: Value, code: str) -> str:
        """Sends what must be refused with this code; returns the sentence."""
        self.send(address, *arguments)
        values = self.until("/backline/error", seconds=5)
        assert values["code"] == code, values
        return str(values["sentence"])

    def end_of(self, job: str, seconds: float = 60.0) -> str:
        """done, cancelled or error: how the job ended."""
        ends = {f"/backline/job/{end}": end for end in ("done", "cancelled", "error")}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            heard = self.hear(0.5)
            if heard and heard[0] in ends and heard[1]["id"] == job:
                return ends[heard[0]]
        raise AssertionError(f"{job} did not end; heard: {self.heard[-12:]}")

    def close(self) -> None:
        self.socket.close()


def wait_loaded(running: Running, seconds: float = 60.0) -> dict[str, Any]:
    """The welcome of a daemon whose model is loaded."""
    deadline = time.monotonic() + seconds
    talk = Talk(running.port)
    try:
        while time.monotonic() < deadline:
            assert running.process.poll() is None, (
                running.root.parent / f"{running.root.name}.err"
            ).read_text()
            with contextlib.suppress(OSError):
                talk.send("/backline/hello", "waiting")
                heard = talk.hear(0.2)
                if heard and heard[0] == "/backline/welcome" and heard[1]["state"] in ("loaded", "failed"):
                    return heard[1]
            time.sleep(0.05)
    finally:
        talk.close()
    raise AssertionError("the daemon did not load its model")


def workers(running: Running) -> list[int]:
    """The process ids of a daemon's children."""
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def resident(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
