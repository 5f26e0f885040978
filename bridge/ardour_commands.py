"""`backline ardour install|uninstall|status|fill|split|follow`."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.ardour_follow import Following, follow
from bridge.ardour_jobs import fill, split
from bridge.console import print_json, print_table, progress, say
from bridge.daemon_engine import daemon_engine
from bridge.filling import Engine, Placed, local_engine
from bridge.models import find_bundle
from bridge.options import DeviceName, HostChords, Json, ModelName, QualityName, Seed, Text
from bridge.serve_commands import read_token
from engine.errors import BacklineError, UsageError
from engine.manifest import Quality
from engine.model import Device, Model
from engine.take import Settings
from plugin_host.ardour import ArdourHost, State, look, untried
from plugin_host.ardour_link import PORT, ArdourGone, link
from plugin_host.ardour_setup import configuration, install, uninstall
from plugin_host.host import Span

PORTS = 20  # that Ardour tries, from its default on
STATUS_SECONDS = 3.0

app = typer.Typer(help="Play in a running Ardour; docs/daw.md.", no_args_is_help=True)

Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Ardour's OSC port.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="Ardour's configuration folder; the newest if not given.")
]
Role = Annotated[
    list[str] | None, typer.Option("--role", help="What a track plays: 'Track 3=piano'; repeatable.")
]
Free = Annotated[bool, typer.Option("--free", help="The music does not follow the session's tempo.")]
DaemonPort = Annotated[
    int | None, typer.Option("--daemon", help="Let the daemon on this port play, instead of --model here.")
]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="The token that the daemon asks for.")]


@app.command("install")
def install_actions(config: Config = None, json_output: Json = False) -> None:
    """Add Backline's actions to Ardour, which must not be running."""
    done = install(configuration(config))
    if json_output:
        print_json({"status": "done", "config": str(done.config), "slots": done.slots})
        return
    print(
        f"{len(done.slots)} actions are in {done.config}; `backline ardour uninstall` takes them out again."
    )
    print("In Ardour they are under Edit > Lua Scripts, and the first of them are buttons in the toolbar.")
    print("Switch on OSC for each session: Edit > Preferences > Control Surfaces > Open Sound Control.")
    say("With OSC on, every machine of the network can control Ardour: it asks for no password.")


@app.command("uninstall")
def uninstall_actions(config: Config = None, json_output: Json = False) -> None:
    """Take Backline's actions out of Ardour, which must not be running."""
    folder = configuration(config)
    removed = uninstall(folder)
    if json_output:
        print_json({"status": "done", "config": str(folder), "removed": removed})
    else:
        print(f"Backline's actions are {'no longer' if removed else 'not'} in {folder}.")


@app.command()
def status(
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Look at one OSC port only.")
    ] = None,
    config: Config = None,
    json_output: Json = False,
) -> None:
    """The Ardours that run, and their sessions."""
    found = []
    way = link(port or PORT, config)
    for number in [port] if port else range(PORT, PORT + PORTS):
        try:
            found.append((number, look(replace(way, port=number), pickup=STATUS_SECONDS)))
        except BacklineError as error:
            if port:
                raise
            if not isinstance(error, ArdourGone):  # something listens there that may be no Ardour
                say(str(error))
    if not found:
        raise ArdourGone(
            f"No Ardour answers on the OSC ports from {PORT} to {PORT + PORTS - 1}: it does not run, or OSC "
            "is not switched on for its session."
        )
    if json_output:
        print_json({"ardours": [_told(number, state) for number, state in found]})
        return
    for number, state in found:
        _show(number, state)


@app.command("fill")
def fill_tracks(
    port: Port = PORT,
    config: Config = None,
    start: Annotated[int | None, typer.Option("--from", help="First sample; needs --to.")] = None,
    end: Annotated[int | None, typer.Option("--to", help="Sample at which it ends.")] = None,
    text: Text = None,
    chords: HostChords = None,
    role: Role = None,
    free: Free = False,
    model: ModelName = None,
    device: DeviceName = "auto",
    daemon: DaemonPort = None,
    token_file: TokenFile = None,
    seed: Seed = None,
    quality: QualityName = None,
    json_output: Json = False,
) -> None:
    """Play the armed tracks over the selected time, or the whole session."""
    host = _open(port, config, role, free)
    engine = _engine(model, device, daemon, token_file, quality)
    with progress("fill") as callback:
        placed = fill(
            host,
            engine,
            span=_span(start, end),
            chords=chords,
            text=text,
            seed=_seed(seed),
            callback=callback,
            warn=say,
        )
    _report("fill", placed, json_output)


@app.command("split")
def split_tracks(
    source: Annotated[
        Path | None, typer.Argument(help="An audio file; the selected region if not given.")
    ] = None,
    port: Port = PORT,
    config: Config = None,
    position: Annotated[int, typer.Option("--at", min=0, help="Where a file begins, in samples.")] = 0,
    model: ModelName = None,
    device: DeviceName = "auto",
    daemon: DaemonPort = None,
    token_file: TokenFile = None,
    seed: Seed = None,
    quality: QualityName = None,
    json_output: Json = False,
) -> None:
    """Take the selected region, or a file, apart: one new track per stem and one for the residual."""
    host = _open(port, config, None, False)
    engine = _engine(model, device, daemon, token_file, quality)
    with progress("split") as callback:
        placed = split(host, engine, source, position=position, seed=_seed(seed), callback=callback)
    _report("split", placed, json_output)


@app.command("follow")
def follow_ardour(
    port: Port = PORT,
    config: Config = None,
    on_arm: Annotated[
        bool, typer.Option("--on-arm", help="Fill tracks as they are armed, with the transport stopped.")
    ] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0.2, help="Seconds of quiet before a fill on arm.")
    ] = 1.5,
    text: Text = None,
    role: Role = None,
    free: Free = False,
    model: ModelName = None,
    device: DeviceName = "auto",
    daemon: DaemonPort = None,
    token_file: TokenFile = None,
    seed: Seed = None,
    quality: QualityName = None,
) -> None:
    """Stay with Ardour: its actions fill and split; with --on-arm, arming fills. Ends with Ctrl-C."""
    link(port, config)  # what is not installed is said at once
    roles = _roles(role)
    engine = _engine(model, device, daemon, token_file, quality)
    following = Following(
        find=lambda: ArdourHost.open(port, config=config, roles=roles, free=free),
        engine=engine,
        say=lambda sentence: say(f"{time.strftime('%H:%M:%S')} {sentence}"),
        on_arm=on_arm,
        patience=wait,
        text=text,
        seed=seed,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    follow(following, stop)
    say("No longer following.")


def _open(port: int, config: Path | None, role: list[str] | None, free: bool) -> ArdourHost:
    host = ArdourHost.open(port, config=config, roles=_roles(role), free=free)
    if sentence := untried(host.look()):
        say(sentence)
    return host


def _engine(
    model: str | None, device: Device, daemon: int | None, token_file: Path | None, quality: Quality | None
) -> Engine:
    if daemon is not None:
        token = None if token_file is None else read_token(token_file)
        return daemon_engine(daemon, token=token, quality=quality, warn=say)
    opened = Model.open(find_bundle(model), device)
    for warning in opened.warnings:
        say(warning)
    return local_engine(opened, Settings(quality=quality), warn=say)


def _roles(values: Sequence[str] | None) -> dict[str, str]:
    """["Track 3=piano"] -> {"Track 3": "piano"}."""
    found = {}
    for value in values or []:
        name, sign, role = value.rpartition("=")
        if not (name and sign and role.strip()):
            raise UsageError(f"--role {value!r} makes no sense: write NAME=ROLE, such as 'Track 3=piano'.")
        found[name] = role.strip().lower()
    return found


def _span(start: int | None, end: int | None) -> Span | None:
    if start is None and end is None:
        return None
    if start is None or end is None or not 0 <= start < end:
        raise UsageError("--from and --to go together, and --to must be the later one.")
    return Span(start, end)


def _seed(seed: int | None) -> int:
    return secrets.randbelow(1 << 31) if seed is None else seed


def _report(task: str, placed: Sequence[Placed], json_output: bool) -> None:
    if json_output:
        print_json({"status": "done", "task": task, "regions": [vars(part) for part in placed]})
        return
    rows = [[part.name, part.role, str(part.position), str(part.length)] for part in placed]
    print_table(None, ["track", "plays", "from sample", "samples"], rows)


def _told(port: int, state: State) -> dict[str, Any]:
    span = state.selection
    return {
        "port": port,
        "version": state.version,
        "tried": untried(state) is None,
        "session": state.session,
        "name": state.name,
        "sample_rate": state.sample_rate,
        "tempo": state.tempo,
        "position": state.position,
        "rolling": state.rolling,
        "recording": state.recording,
        "selection": None if span is None else [span.start, span.end],
        "tracks": [vars(track) for track in state.tracks],
    }


def _show(port: int, state: State) -> None:
    if sentence := untried(state):
        say(sentence)
    transport = "recording" if state.recording else "rolling" if state.rolling else "stopped"
    print(
        f"{state.name} ({state.session}) in Ardour {state.version} on port {port}: {state.sample_rate} Hz, "
        f"{state.tempo:g} bpm, {transport} at sample {state.position}."
    )
    marks = ("armed", "muted", "soloed")
    rows = [
        [track.name, ", ".join(mark for mark in marks if getattr(track, mark)), str(track.regions)]
        for track in state.tracks
    ]
    print_table(None, ["track", "", "regions"], rows)
