"""Following Ardour: its actions fill and split; arming a track fills it, for who wants that.

Arming also means recording. So a fill on arm is opt-in, waits until nothing was armed or disarmed for a
moment, is made with the transport stopped only, and is called off by disarming and by rolling.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bridge.ardour_jobs import fill, split
from bridge.daemon_engine import daemon_engine
from bridge.filling import Engine, Placed
from engine.errors import BacklineError, Cancelled
from plugin_host.ardour import ArdourHost, untried
from plugin_host.ardour_link import (
    SILENCE_SECONDS,
    announce,
    events,
    subscribe,
    take_request,
    unsubscribe,
    withdraw,
)

TICK = 0.1  # seconds
ANNOUNCE_SECONDS = 3.0
RETRY_SECONDS = 1.0
ROLLING = ("/transport_play", "/rewind", "/ffwd", "/loop_toggle", "/toggle_roll")

Say = Callable[[str], None]


@dataclass
class Job:
    """A fill or a split in the making. tracks: whose disarming calls it off; empty for what was asked for.

    played: there is nothing left to call off: Ardour itself looks at what is armed before it places.
    """

    what: str
    tracks: frozenset[str]
    cancel: threading.Event = field(default_factory=threading.Event)
    played: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


@dataclass
class Watching:
    """What is known of one session. seen: the tracks that were armed at the last look.

    due: when arming has been quiet for long enough; called_off: whether the transport rolled meanwhile.
    """

    host: ArdourHost
    channel: socket.socket
    seen: set[str]
    heard: float
    announced: float = 0.0
    due: float | None = None
    called_off: bool = False
    job: Job | None = None


@dataclass(frozen=True)
class Following:
    """How to follow. find: opens the session there is. patience: seconds of quiet before a fill on arm."""

    find: Callable[[], ArdourHost]
    engine: Engine
    say: Say
    on_arm: bool = False
    patience: float = 1.5
    text: str | None = None
    seed: int | None = None


def follow(following: Following, stop: threading.Event) -> None:
    """Follow whatever session is open, through ends and restarts of Ardour, until `stop`."""
    waiting = ""
    while not stop.is_set():
        try:
            watching = _begin(following)
        except BacklineError as error:
            if str(error) != waiting:
                waiting = str(error)
                following.say(f"{waiting} Waiting for it.")
            stop.wait(RETRY_SECONDS)
            continue
        waiting = ""
        try:
            while not stop.is_set():
                _step(following, watching)
        except BacklineError as error:  # it is gone, has another session, or hangs in a dialog
            following.say(str(error))
        finally:
            _leave(watching, stop.is_set())


def follow_with_daemon(
    port: int, daemon: int, token: str | None, on_arm: bool, say: Say, stop: threading.Event
) -> None:
    """Follow the Ardour on an OSC port and let the daemon of this machine play; for `serve --ardour`."""
    try:
        engine = daemon_engine(daemon, token=token, warn=say)
    except BacklineError as error:
        say(f"Ardour is not followed: {error}")
        return
    follow(Following(lambda: ArdourHost.open(port), engine, say, on_arm), stop)


def _begin(following: Following) -> Watching:
    host = following.find()
    state = host.look()
    armed = {track.id for track in state.tracks if track.armed}
    watching = Watching(host, subscribe(host.way.port), armed, time.monotonic())
    withdraw(host.way, host.session)  # what was asked of an earlier follower is forgotten
    following.say(f"Following {state.name} in Ardour {state.version} on port {host.way.port}.")
    if sentence := untried(state):
        following.say(sentence)
    return watching


def _leave(watching: Watching, end: bool) -> None:
    unsubscribe(watching.channel)
    withdraw(watching.host.way, watching.host.session)
    if watching.job is not None and watching.job.thread is not None:
        if end or watching.job.tracks:
            watching.job.cancel.set()
        watching.job.thread.join()  # what was asked for is finished, and kept where Ardour is gone


def _step(following: Following, watching: Watching) -> None:
    """One tick: hear, obey, begin what is due."""
    host, now = watching.host, time.monotonic()
    if now - watching.announced > ANNOUNCE_SECONDS:
        watching.announced = now
        announce(host.way, host.session)
    for address, arguments in events(watching.channel, host.way.port, TICK):
        watching.heard = time.monotonic()
        _hear(following, watching, address, arguments)
    if time.monotonic() - watching.heard > SILENCE_SECONDS:
        host.look()  # raises where Ardour is gone or has another session; else it only forgot us
        watching.channel.close()
        watching.channel = subscribe(host.way.port)
        watching.heard = time.monotonic()
    job = watching.job
    if job is not None and job.thread is not None and not job.thread.is_alive():
        watching.job = None
    if request := take_request(host.way, host.session):
        if watching.job is not None:
            following.say("Something is being played already.")
        else:
            _start(following, watching, Job(request, frozenset()))
    if watching.due is not None and time.monotonic() >= watching.due and watching.job is None:
        _due(following, watching)


def _hear(following: Following, watching: Watching, address: str, arguments: tuple[Any, ...]) -> None:
    job = watching.job
    if address == "/strip/recenable":
        watching.due = time.monotonic() + following.patience
        if arguments and not arguments[-1]:  # what is disarmed and armed again is armed anew
            armed = {track.id for track in watching.host.look().tracks if track.armed}
            watching.seen &= armed
            if job is not None and not job.tracks <= armed:
                _call_off(following, job, "Disarmed")
    elif address in ROLLING and arguments and arguments[-1]:
        watching.called_off = watching.due is not None
        if job is not None and job.tracks:
            _call_off(following, job, "Rolling")


def _call_off(following: Following, job: Job, why: str) -> None:
    if not job.cancel.is_set() and not job.played.is_set():
        following.say(f"{why}: the fill is called off.")
        job.cancel.set()


def _due(following: Following, watching: Watching) -> None:
    """Arming has been quiet for a while: fill what was armed since the last look, if that is wanted."""
    state = watching.host.look()
    armed = {track.id for track in state.tracks if track.armed}
    new, called_off = armed - watching.seen, watching.called_off or state.rolling
    watching.seen, watching.due, watching.called_off = armed, None, False
    if following.on_arm and new and not called_off:
        _start(following, watching, Job("fill", frozenset(armed)))


def _start(following: Following, watching: Watching, job: Job) -> None:
    host = replace(watching.host, careful=bool(job.tracks))
    seed = secrets.randbelow(1 << 31) if following.seed is None else following.seed

    def callback(phase: str, fraction: float) -> None:
        if job.cancel.is_set():
            raise Cancelled("The job was called off.")

    def work() -> None:
        started = time.monotonic()
        try:
            if job.what == "split":
                placed = split(host, following.engine, seed=seed, callback=callback)
            else:
                options: dict[str, Any] = {"text": following.text, "seed": seed, "callback": callback}
                placed = fill(host, following.engine, **options, warn=following.say, then=job.played.set)
        except Cancelled:
            pass  # it was said when it was called off
        except BacklineError as error:
            following.say(str(error))
        except Exception as error:  # one job must not end the following of all others
            following.say(f"Something unexpected went wrong ({type(error).__name__}: {error}).")
        else:
            following.say(_done(job.what, placed, time.monotonic() - started))

    following.say("Filling the armed tracks." if job.what == "fill" else "Splitting the selected region.")
    watching.job = job
    job.thread = threading.Thread(target=work, name="ardour job")
    job.thread.start()


def _done(what: str, placed: list[Placed], seconds: float) -> str:
    names = ", ".join(part.name for part in placed)
    return f"{'Filled' if what == 'fill' else 'Split into'} {names} in {seconds:.1f} s."
