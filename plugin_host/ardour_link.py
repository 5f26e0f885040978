"""Talking to a running Ardour: OSC carries triggers and events, one Lua file per command does the work.

Ardour's OSC can neither place audio nor tell tempo or selection, its Lua can. So a command is written to a
private folder, `/access_action` makes Ardour run it, and its answer comes back as a file. One client at a
time: a lock in the folder keeps a command for one Ardour from being run by another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pythonosc.osc_message import OscMessage
from pythonosc.osc_message_builder import OscMessageBuilder

from engine.errors import BacklineError
from plugin_host.ardour_setup import bridge_slot, lua_text, mailbox, quoted

PORT = 3819  # Ardour's own default; a second Ardour takes the next free one
HOST = "127.0.0.1"
PICKUP_SECONDS = 15.0  # until Ardour begins with a command: it may be drawing, or saving
WORK_SECONDS = 600.0  # until it is done with one that moves audio: a long bounce or import
TALK_SECONDS = 30.0  # until it is done with any other
AGAIN_SECONDS = 0.5  # a trigger is sent again after this: UDP may lose one
REFUSAL_SECONDS = 0.02  # until the system says that nobody listens on a port of this machine
STALE_SECONDS = 3600.0

# Feedback of /set_surface: strip buttons, heartbeat, transport, and answers at their own addresses.
FEEDBACK = 1 + 8 + 16 + 16384
STRIP_TYPES = 159
SILENCE_SECONDS = 4.0  # a heartbeat comes every second; without one the subscription is lost


class ArdourGone(BacklineError):
    """Ardour does not run, or no longer."""


class SessionChanged(BacklineError):
    """Another session is open by now than the one a command was for."""


@dataclass(frozen=True)
class Link:
    """A way to one Ardour: its OSC port, the folder for commands, the place of the bridge in its actions."""

    port: int
    folder: Path
    slot: int


def link(port: int = PORT, config: Path | None = None) -> Link:
    """The way to the Ardour on `port`. Raises BacklineError where Backline's action is not installed."""
    folder = mailbox()
    for path in folder.glob("answer-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
    return Link(port, folder, bridge_slot(config))


def ask(
    way: Link,
    call: str,
    *arguments: Any,
    session: str | None = None,
    pickup: float = PICKUP_SECONDS,
    work: float = TALK_SECONDS,
) -> Any:
    """Run one function of lua/library.lua inside Ardour and return its answer.

    session: the session it is meant for. pickup, work: seconds until Ardour has begun and ended. Raises
    ArdourGone, SessionChanged, and BacklineError where Ardour does not answer or the function fails.
    """
    answer = way.folder / f"answer-{secrets.token_hex(8)}"
    body = f"function() return {call}({', '.join(map(literal, arguments))}) end"
    command = f"{lua_text('library.lua')}\nanswer({quoted(str(answer))}, {literal(session)}, {body})\n"
    try:
        with FileLock(way.folder / "lock", timeout=WORK_SECONDS):
            result = _run(way, command.encode("utf-8", "surrogateescape"), answer, pickup, work)
    except Timeout:
        raise BacklineError("Another Backline has been talking to Ardour for ten minutes.") from None
    if "moved" in result:
        raise SessionChanged(f"Ardour has another session open by now: {result['moved']}.")
    if "error" in result:
        raise BacklineError(f"Ardour could not do it: {result['error']}.")
    return result["value"]


def send(way: Link, address: str, *arguments: Any) -> None:
    """One OSC message to Ardour. Raises ArdourGone where nobody listens."""
    with _connected(way.port) as channel:
        _send(channel, way.port, message(address, *arguments))
        _hear(channel, way.port, REFUSAL_SECONDS)


def _run(way: Link, command: bytes, answer: Path, pickup: float, work: float) -> dict[str, Any]:
    waiting = way.folder / "command.lua"
    _write(waiting, command)
    trigger = message("/access_action", f"LuaAction/script-{way.slot}")
    started = time.monotonic()
    try:
        with _connected(way.port) as channel:
            while True:
                # A command that is taken needs no trigger; it is sent all the same, to hear of its end.
                _send(channel, way.port, trigger)
                again = time.monotonic() + AGAIN_SECONDS
                while time.monotonic() < again:
                    if answer.exists():
                        return json.loads(answer.read_bytes().decode("utf-8", "surrogateescape"))
                    _hear(channel, way.port, 0.005)
                spent = time.monotonic() - started
                if spent > (pickup if waiting.exists() else work):
                    raise BacklineError(
                        f"Ardour on port {way.port} did not answer within {spent:.0f} s: is a dialog open in "
                        "it, or was it started before `backline ardour install`?"
                    )
    finally:
        for path in (waiting, answer):
            path.unlink(missing_ok=True)


def subscribe(port: int) -> socket.socket:
    """A socket to which Ardour sends what happens, beginning with the state as it is now."""
    channel = _connected(port)
    _send(channel, port, message("/set_surface", 0, STRIP_TYPES, FEEDBACK, 0, 0, 0))
    return channel


def unsubscribe(channel: socket.socket) -> None:
    """Ask for no more events and close the socket."""
    with contextlib.suppress(OSError):
        channel.send(message("/set_surface", 0, STRIP_TYPES, 0, 0, 0, 0))
    channel.close()


def events(channel: socket.socket, port: int, seconds: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What Ardour says within `seconds`, as address and arguments. Raises ArdourGone."""
    until = time.monotonic() + seconds
    while True:
        datagram = _hear(channel, port, max(0.0, until - time.monotonic()))
        # Ardour sends no bundles, and python-osc can be hung with one.
        if datagram and datagram.startswith(b"/"):
            with contextlib.suppress(
                Exception
            ):  # whatever a datagram holds, it is no reason to stop listening
                heard = OscMessage(datagram)
                yield heard.address, tuple(heard.params)
        if time.monotonic() >= until:
            return


def literal(value: Any) -> str:
    """A value as Lua source."""
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"[{literal(key)}] = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "{" + ", ".join(map(literal, value)) + "}"
    return quoted(str(value))


def message(address: str, *arguments: Any) -> bytes:
    """An OSC message; int, float and str as i, f and s."""
    builder = OscMessageBuilder(address)
    for argument in arguments:
        builder.add_arg(argument)
    return builder.build().dgram


def announce(way: Link, session: str) -> None:
    """Tell Backline's actions inside Ardour that somebody listens for them, again every few seconds."""
    _write(way.folder / f"following-{_key(session)}", f"{int(time.time())}\n".encode())


def withdraw(way: Link, session: str) -> None:
    """Nobody listens any more."""
    for name in ("following", "request"):
        (way.folder / f"{name}-{_key(session)}").unlink(missing_ok=True)


def take_request(way: Link, session: str) -> str | None:
    """What the user asked for with one of the actions since the last call: "fill" or "split"."""
    path = way.folder / f"request-{_key(session)}"
    try:
        word = path.read_text("utf-8").strip()
        path.unlink()
    except OSError:
        return None
    return word


def _connected(port: int) -> socket.socket:
    # Connected, so that a port on which nobody listens is an error and not silence.
    channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    channel.connect((HOST, port))
    return channel


def _send(channel: socket.socket, port: int, datagram: bytes) -> None:
    try:
        channel.send(datagram)
    except ConnectionError as error:
        raise _gone(port) from error


def _hear(channel: socket.socket, port: int, seconds: float) -> bytes | None:
    """One datagram, or None where none comes."""
    if not select.select([channel], [], [], seconds)[0]:
        return None
    try:
        return channel.recv(65536)
    except ConnectionError as error:
        raise _gone(port) from error


def _gone(port: int) -> ArdourGone:
    return ArdourGone(
        f"No Ardour answers on OSC port {port}: it does not run, or OSC is not switched on for its session."
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BacklineError(f"{path} could not be written: {error.strerror or error}.") from error


def _key(session: str) -> str:
    """A session as part of a file name, as lua/request.lua makes it."""
    return re.sub(rb"[^A-Za-z0-9]", b"_", os.fsencode(session))[-120:].decode("ascii")
