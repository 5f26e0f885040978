"""`backline session ...`: the built-in track host at the command line; docs/session.md."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bridge.console import print_json, print_table, progress, say
from bridge.filling import Engine, Placed, Warn, fill_armed, local_engine, split_to_tracks
from bridge.models import find_bundle
from bridge.options import DeviceName, Force, HostChords, Json, ModelName, QualityName, Seed, Steps
from bridge.pictures import Row, draw
from engine.audio import read, resample, write
from engine.errors import BacklineError, UsageError
from engine.model import Device, Model
from engine.take import Settings
from plugin_host.exchange_formats import export_session
from plugin_host.exchange_import import import_session
from plugin_host.exchange_rpp import audio_folder
from plugin_host.host import Placement, Span, audible, mix_down
from plugin_host.plugins import BUILT_IN, Control, describe, find_plugin, installed, keep_preset
from plugin_host.roles import OTHER
from plugin_host.session import SessionHost, find_track
from plugin_host.session_file import LONGEST_NAME, MarkerPoint, Parameter, PluginState, TempoPoint, TrackState

USUAL_ROLES = ("bass", "drums", "guitar", "piano", OTHER)
COLUMNS = 12  # of the picture of the regions
SAMPLES = "smp"  # ends a time that is given in samples

app = typer.Typer(
    help="A session without a DAW: tracks, regions and takes, effects, fills; docs/session.md.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The session's folder.")]
TrackName = Annotated[str, typer.Argument(help="A track's name or number.")]
TrackNames = Annotated[list[str], typer.Argument(help="Names or numbers of tracks.")]
Off = Annotated[bool, typer.Option("--off", help="The opposite.")]
From = Annotated[str, typer.Option("--from", help="Where it begins: seconds, or samples as 44100smp.")]
To = Annotated[str | None, typer.Option("--to", help="Where it ends; the session's end if not given.")]
At = Annotated[str, typer.Option("--at", help="Where it lies: seconds, or samples as 44100smp.")]
PluginSeconds = Annotated[
    float | None,
    typer.Option("--plugin-seconds", min=0.1, help="How long a VST3 may take before it is left out."),
]
NEGATIVE = {"ignore_unknown_options": True}  # so that -6 is a number and no option


@app.command()
def new(
    folder: Folder,
    rate: Annotated[int, typer.Option("--rate", min=8000, max=192000, help="Sample rate, Hz.")] = 44100,
    tempo: Annotated[float, typer.Option("--tempo", min=1, max=1000, help="Beats per minute.")] = 120.0,
    metre: Annotated[str, typer.Option("--metre", help="Beats in a bar, as 4/4.")] = "4/4",
    first_bar: Annotated[
        str, typer.Option("--first-bar", help="Where a bar begins: seconds, or samples as 44100smp.")
    ] = "0",
    source: Annotated[
        Path | None, typer.Option("--from", help="A .dawproject or .rpp to take everything from.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Make a session: an empty one, or one from another DAW's file."""
    if source is not None:
        host = import_session(source, folder)
    else:
        beats, unit = _metre(metre)
        host = SessionHost.create(
            folder,
            sample_rate=rate,
            tempo=tempo,
            numerator=beats,
            denominator=unit,
            first_bar=_time(first_bar, rate),
        )
    _done(
        host, json_output, f"{folder} is a session of {len(host.tracks())} tracks at {host.sample_rate} Hz."
    )


@app.command()
def add(
    folder: Folder,
    files: Annotated[list[Path] | None, typer.Argument(help="Audio files, a new track for each.")] = None,
    track: Annotated[
        str | None, typer.Option("--track", help="The track they go to; made where there is none.")
    ] = None,
    role: Annotated[str | None, typer.Option("--role", help="What it plays; guessed from the name.")] = None,
    at: At = "0",
    json_output: Json = False,
) -> None:
    """Add audio files, or an empty track to arm."""
    host = _open(folder)
    position = _time(at, host.sample_rate)
    wanted = None if role is None else _role(role)
    if not files:
        if track is None:
            raise UsageError("Say what to add: audio files, or --track with the name of an empty track.")
        made = host.create_track(track, wanted)
        _done(
            host,
            json_output,
            f"Track {made.id}, {made.name!r}, plays {made.role or 'nobody knows what yet'}.",
        )
        return
    known = {item.name.casefold(): item.id for item in host.tracks()}
    target = None if track is None else known.get(track.casefold())
    with tempfile.TemporaryDirectory(prefix="backline-") as scratch:
        placements = []
        for number, path in enumerate(files):
            sound = read(path, shortest=0)
            if sound.sample_rate != host.sample_rate:
                say(f"{path} was resampled from {sound.sample_rate} to {host.sample_rate} Hz.")
            wav = Path(scratch) / f"{number}.wav"
            write(wav, resample(sound, host.sample_rate))
            name = path.stem if target or track is None else track
            placements.append(Placement(wav, position, name, target, wanted))
        if track is not None and target is None and len(files) > 1:  # all of them on the one new track
            placements = _on_one_track(host, placements, track, wanted)
        ids = host.place_all(f"add {', '.join(path.name for path in files)}", placements)
    names = {item.id: f"{item.name!r} ({item.role or 'role unknown'})" for item in host.tracks()}
    _done(host, json_output, "Added: " + ", ".join(names[track_id] for track_id in dict.fromkeys(ids)) + ".")


@app.command()
def arm(folder: Folder, tracks: TrackNames, off: Off = False, json_output: Json = False) -> None:
    """Arm tracks for the next fill, or disarm them with --off."""
    host = _open(folder)
    for word in tracks:
        track = find_track(host, word)
        host.arm(track.id, not off)
        if not off and track.role in (None, OTHER):
            say(f"What {track.name!r} plays is not known: say it with `backline session role`.")
    _done(host, json_output, f"{'Disarmed' if off else 'Armed'}: {', '.join(tracks)}.")


@app.command()
def mute(folder: Folder, tracks: TrackNames, off: Off = False, json_output: Json = False) -> None:
    """Mute tracks, or let them sound again with --off."""
    _set_all(folder, tracks, json_output, muted=not off)


@app.command()
def solo(folder: Folder, tracks: TrackNames, off: Off = False, json_output: Json = False) -> None:
    """Let only the soloed tracks sound; --off ends it."""
    _set_all(folder, tracks, json_output, soloed=not off)


@app.command(context_settings=NEGATIVE)
def gain(
    folder: Folder,
    track: TrackName,
    decibels: Annotated[float, typer.Argument(help="0 leaves it as it is.")],
    json_output: Json = False,
) -> None:
    """Set a track's gain in dB."""
    _set_all(folder, [track], json_output, gain_db=decibels)


@app.command(context_settings=NEGATIVE)
def pan(
    folder: Folder,
    track: TrackName,
    position: Annotated[float, typer.Argument(help="-1 is left, 0 the centre, 1 right.")],
    json_output: Json = False,
) -> None:
    """Set a track's place between left and right."""
    _set_all(folder, [track], json_output, pan=position)


@app.command()
def rename(folder: Folder, track: TrackName, name: str, json_output: Json = False) -> None:
    """Give a track another name; what it plays stays."""
    _set_all(folder, [track], json_output, name=name)


@app.command()
def role(folder: Folder, track: TrackName, plays: str, json_output: Json = False) -> None:
    """Say what a track plays: bass, drums, guitar, piano, or other."""
    _set_all(folder, [track], json_output, role=_role(plays))


@app.command()
def remove(
    folder: Folder,
    track: TrackName,
    region: Annotated[int | None, typer.Option("--region", min=1, help="Only this region.")] = None,
    json_output: Json = False,
) -> None:
    """Take a track, or a region of it, out of the session; undo brings it back."""
    host = _open(folder)
    found = find_track(host, track)
    if region is None:
        host.remove_track(found.id)
    else:
        host.remove_region(found.id, region - 1)
    _done(host, json_output, f"Removed {'' if region is None else f'region {region} of '}{found.name!r}.")


@app.command()
def move(
    folder: Folder,
    track: TrackName,
    at: Annotated[str, typer.Option("--at", help="Where to: seconds, or samples as 44100smp.")],
    region: Annotated[int, typer.Option("--region", min=1)] = 1,
    json_output: Json = False,
) -> None:
    """Move a region in time."""
    host = _open(folder)
    found = find_track(host, track)
    host.move_region(found.id, region - 1, _time(at, host.sample_rate))
    _done(host, json_output, f"Region {region} of {found.name!r} begins at {at}.")


@app.command()
def tempo(
    folder: Folder,
    bpm: Annotated[float, typer.Argument(min=1, max=1000, help="Beats per minute.")],
    metre: Annotated[str | None, typer.Option("--metre", help="Beats in a bar, as 4/4.")] = None,
    at: At = "0",
    json_output: Json = False,
) -> None:
    """Set the tempo and metre from a point on, at which a bar begins."""
    host = _open(folder)
    position = _time(at, host.sample_rate)
    points = host.state.tempo_map
    before = ([point for point in points if point.position <= position] or [points[0]])[-1]
    beats, unit = _metre(metre) if metre else (before.numerator, before.denominator)
    point = TempoPoint(position=position, bpm=bpm, numerator=beats, denominator=unit)
    first = () if position else points[:1]  # a new start replaces the first point, wherever that was
    kept = [other for other in points if other.position != position and other not in first]
    host.set_tempo([*kept, point])
    _done(host, json_output, f"{bpm:g} bpm, {beats}/{unit} from {at} on.")


@app.command()
def marker(
    folder: Folder,
    name: Annotated[str | None, typer.Argument(help="A chord, or any name; none lists them.")] = None,
    at: At = "0",
    remove: Annotated[bool, typer.Option("--remove", help="Take away the marker that is there.")] = False,
    json_output: Json = False,
) -> None:
    """Set a marker, take one away, or list them; `fill --chords markers` plays their chords."""
    host = _open(folder)
    position = _time(at, host.sample_rate)
    points = host.state.markers
    if remove:
        if position not in {point.position for point in points}:
            raise UsageError(f"There is no marker at {at}.")
        host.set_markers([point for point in points if point.position != position])
    elif name is not None:
        if not name.strip() or len(name) > LONGEST_NAME:
            raise UsageError(f"A marker's name has 1 to {LONGEST_NAME} characters.")
        host.set_markers([*points, MarkerPoint(position=position, name=name.strip())])
    if json_output:
        _done(host, True, "")
        return
    rows = [[f"{point.position / host.sample_rate:.3f} s", point.name] for point in host.state.markers]
    print_table("markers", ["at", "name"], rows)


@app.command()
def takes(
    folder: Folder,
    track: TrackName,
    region: Annotated[int, typer.Option("--region", min=1, help="Which region, as listed.")] = 1,
    choose: Annotated[int | None, typer.Option("--choose", min=1, help="The take that is to sound.")] = None,
    json_output: Json = False,
) -> None:
    """List a track's regions and their takes, or choose a take."""
    host = _open(folder)
    found = find_track(host, track)
    if choose is not None:
        host.choose_take(found.id, region - 1, choose - 1)
        found = find_track(host, found.id)
    if json_output:
        _done(host, True, "")
        return
    rows = []
    for number, part in enumerate(found.regions, 1):
        for index, take in enumerate(part.takes):
            span = f"{part.position / host.sample_rate:.3f} to {part.end / host.sample_rate:.3f} s"
            mark = "chosen" if index == part.chosen else ""
            rows.append([str(number), str(index + 1), take.name, span, take.file, mark])
    print_table(found.name, ["region", "take", "name", "where", "file", ""], rows)


@app.command()
def fill(
    folder: Folder,
    start: From = "0",
    end: To = None,
    text: Annotated[str | None, typer.Option("--text", help="How it should sound, in words.")] = None,
    chords: HostChords = None,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Seed = None,
    quality: QualityName = None,
    steps: Steps = None,
    plugin_seconds: PluginSeconds = None,
    json_output: Json = False,
) -> None:
    """Play the armed tracks along with what the others sound like; each fill is a new take."""
    host = _open(folder)
    warnings: list[str] = []
    host.warn = _telling(warnings)
    host.plugin_seconds = plugin_seconds
    span = _span(host, start, end)
    engine = _engine(model, device, Settings(steps=steps, quality=quality), host.warn)
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    with progress("fill") as callback:
        placed = fill_armed(
            host, engine, span=span, chords=chords, text=text, seed=seed, callback=callback, warn=host.warn
        )
    _report("fill", host, placed, seed, warnings, json_output)


@app.command()
def split(
    folder: Folder,
    source: Annotated[str, typer.Argument(help="A track's name or number, or an audio file.")],
    start: From = "0",
    end: To = None,
    at: Annotated[str, typer.Option("--at", help="Where a file is to lie.")] = "0",
    region: Annotated[
        int | None, typer.Option("--region", min=1, help="Only this region of the track.")
    ] = None,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Seed = None,
    quality: QualityName = None,
    steps: Steps = None,
    json_output: Json = False,
) -> None:
    """Take a track, a region or a file apart: a new track per stem and one for what is left."""
    host = _open(folder)
    seed = 0 if seed is None else seed
    file = Path(source)
    named = any(source.casefold() in (track.name.casefold(), track.id) for track in host.tracks())
    span = None
    what: str | Path = file
    if named or not file.is_file():
        track = find_track(host, source)
        what = track.id
        span = _region_span(track, region) if region else _part(host, start, end)
    warnings: list[str] = []
    engine = _engine(model, device, Settings(steps=steps, quality=quality), _telling(warnings))
    with progress("split") as callback:
        placed = split_to_tracks(
            host,
            engine,
            what,
            span=span,
            position=_time(at, host.sample_rate),
            seed=seed,
            callback=callback,
        )
    _report("split", host, placed, seed, warnings, json_output)


@app.command()
def plugins(
    folder: Folder,
    track: TrackName,
    add_effect: Annotated[
        list[str] | None, typer.Option("--add", help="An effect of `session effects`, or a .vst3.")
    ] = None,
    set_value: Annotated[
        list[str] | None, typer.Option("--set", help="N.parameter=value, N the place in the chain.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", help="N=FILE.vstpreset, the whole state of a VST3.")
    ] = None,
    bypass: Annotated[list[int] | None, typer.Option("--bypass", help="Leave effect N out.")] = None,
    enable: Annotated[list[int] | None, typer.Option("--enable", help="Take it in again.")] = None,
    remove_effect: Annotated[list[int] | None, typer.Option("--remove", help="Remove effect N.")] = None,
    json_output: Json = False,
) -> None:
    """Show a track's effects, or change them; numbers count the chain with what is added at its end."""
    host = _open(folder)
    found = find_track(host, track)
    chain: list[PluginState | None] = [*found.plugins, *(find_plugin(word) for word in add_effect or [])]
    for number in [*(bypass or []), *(enable or []), *(remove_effect or [])]:
        _effect(chain, number)
    for text in preset or []:
        number, file = _numbered(text, "=")
        chain[number - 1] = _with_preset(host, _effect(chain, number), Path(file))
    for text in set_value or []:
        number, assignment = _numbered(text, ".")
        name, _, value = assignment.partition("=")
        plugin = _effect(chain, number)
        values = plugin.parameters | {name.strip(): _value(value.strip())}
        chain[number - 1] = plugin.model_copy(update={"parameters": values})
    for number in bypass or []:
        chain[number - 1] = _effect(chain, number).model_copy(update={"enabled": False})
    for number in enable or []:
        chain[number - 1] = _effect(chain, number).model_copy(update={"enabled": True})
    for number in remove_effect or []:
        chain[number - 1] = None
    kept, controls = _described(host, found, [plugin for plugin in chain if plugin is not None])
    if tuple(kept) != found.plugins:
        host.set_plugins(found.id, kept, f"{found.name}: plugins")
    if json_output:
        _done(host, True, "")
        return
    for number, (plugin, shown) in enumerate(zip(kept, controls, strict=True), 1):
        state = "" if plugin.enabled else ", bypassed"
        rows = [[control.name, _shown(control), _range(control)] for control in shown]
        print_table(f"{number}. {plugin.name}{state}", ["parameter", "value", "range"], rows)
    if not kept:
        print(f"{found.name!r} has no effects.")


@app.command()
def effects(json_output: Json = False) -> None:
    """The effects there are: those of pedalboard, and the VST3s of this machine."""
    paths = installed()
    if json_output:
        print_json({"built_in": list(BUILT_IN), "vst3": [str(path) for path in paths]})
        return
    rows = [[name, "built in"] for name in BUILT_IN] + [[path.stem, str(path)] for path in paths]
    print_table(None, ["effect", "where"], rows)


@app.command("bounce")
def bounce_session(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="The wav to write.")],
    start: From = "0",
    end: To = None,
    tail: Annotated[float, typer.Option("--tail", min=0, help="Seconds more, for what rings on.")] = 0.0,
    picture: Annotated[bool, typer.Option("--picture", help="Draw OUT.png beside it.")] = False,
    plugin_seconds: PluginSeconds = None,
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Write what the session sounds like. A plugin that crashes or hangs is left out and named."""
    host = _open(folder)
    warnings: list[str] = []
    host.warn = _telling(warnings)
    host.plugin_seconds = plugin_seconds
    _refuse(out, force)
    span = _span(host, start, end)
    span = Span(span.start, span.end + round(tail * host.sample_rate))
    playing = audible(host.tracks())
    paths = host.export([track.id for track in playing], span)
    parts = {track: read(paths[track.id], shortest=0) for track in playing}
    mix = mix_down(list(parts.values()))
    write(out, mix)
    files = {"mix": str(out)}
    if picture:
        rows = [Row(track.name, part, given=True) for track, part in parts.items()]
        draw(out.with_suffix(".png"), str(folder), [*rows, Row("mix", mix, given=False)])
        files["picture"] = str(out.with_suffix(".png"))
    if json_output:
        told = {"seconds": mix.seconds, "channels": mix.channels, "sample_rate": mix.sample_rate}
        print_json({"status": "done", "task": "bounce", "files": files, **told, "warnings": warnings})
    else:
        print(f"{out}: {mix.seconds:.2f} s, {mix.channels} channels at {mix.sample_rate} Hz.")


@app.command("export")
def export_command(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="What to write: NAME.dawproject or NAME.rpp.")],
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Write the session for other DAWs: as DAWproject, or as an RPP with its audio beside it."""
    host = _open(folder)
    warnings: list[str] = []
    _refuse(out, force)
    if out.suffix.lower() == ".rpp":
        _refuse(audio_folder(out), force)
    export_session(host, out, _telling(warnings))
    if json_output:
        print_json({"status": "done", "task": "export", "files": {"project": str(out)}, "warnings": warnings})
    else:
        print(f"{out} holds {len(host.tracks())} tracks.")


@app.command()
def undo(
    folder: Folder,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many.")] = 1,
    json_output: Json = False,
) -> None:
    """Take the last step back; no wav is ever removed."""
    host = _open(folder)
    _done(host, json_output, _repeated(host.undo, steps, len(host.file.past), "undone"))


@app.command()
def redo(
    folder: Folder,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many.")] = 1,
    json_output: Json = False,
) -> None:
    """Do again what was undone."""
    host = _open(folder)
    _done(host, json_output, _repeated(host.redo, steps, len(host.file.future), "redone"))


def _repeated(step: Callable[[], str], steps: int, possible: int, done: str) -> str:
    """Takes all steps or, where there are not so many, none."""
    if steps > max(1, possible):  # `step` itself says that there is nothing at all
        raise UsageError(f"Only {possible} steps can be {done}, not {steps}.")
    return f"{done.capitalize()}: {', '.join(step() for _ in range(steps))}."


@app.command()
def show(folder: Folder, json_output: Json = False) -> None:
    """The session at a glance."""
    host = _open(folder)
    if json_output:
        _done(host, True, "")
        return
    seconds = host.length / host.sample_rate
    rows = [_row(host, track) for track in host.state.tracks]
    points = host.state.tempo_map
    changes = f" and {len(points) - 1} changes" if len(points) > 1 else ""
    title = (
        f"{folder.resolve().name}: {seconds:.2f} s, {host.sample_rate} Hz, {points[0].bpm:g} bpm, "
        f"{points[0].numerator}/{points[0].denominator}{changes}"
    )
    columns = ["track", "plays", "state", "mix", "effects", "takes", "regions"]
    print_table(title, columns, rows)
    if host.file.past:
        print(f"The last step was: {host.file.label}. {len(host.file.past)} steps can be undone.")


def _open(folder: Path) -> SessionHost:
    return SessionHost.open(folder, warn=say)


def _telling(warnings: list[str]) -> Warn:
    """Says a sentence and keeps it for --json."""

    def warn(sentence: str) -> None:
        say(sentence)
        warnings.append(sentence)

    return warn


def _engine(model: str | None, device: Device, settings: Settings, warn: Warn) -> Engine:
    opened = Model.open(find_bundle(model), device)
    for warning in opened.warnings:
        warn(warning)
    return local_engine(opened, settings, warn=warn)


def _done(host: SessionHost, json_output: bool, sentence: str) -> None:
    """The sentence, or the whole session for scripts."""
    if not json_output:
        print(sentence)
        return
    state = host.state.model_dump(mode="json")
    print_json(
        {"status": "done", "folder": str(host.folder), "revision": host.file.revision, "session": state}
    )


def _report(
    task: str,
    host: SessionHost,
    placed: Sequence[Placed],
    seed: int,
    warnings: Sequence[str],
    json_output: bool,
) -> None:
    rate = host.sample_rate
    if json_output:
        parts = [vars(part) for part in placed]
        print_json({"status": "done", "task": task, "seed": seed, "placed": parts, "warnings": warnings})
        return
    rows = []
    for part in placed:
        regions = next(track.regions for track in host.state.tracks if track.id == part.track_id)
        number = max((len(r.takes) for r in regions if r.position == part.position), default=1)
        where = f"{part.position / rate:.3f} to {(part.position + part.length) / rate:.3f} s"
        rows.append([part.name, part.role, where, str(number)])
    print_table(f"{task}, seed {seed}", ["track", "plays", "where", "take"], rows)


def _set_all(folder: Path, words: Sequence[str], json_output: bool, **values: Any) -> None:
    host = _open(folder)
    for word in words:
        host.set_track(find_track(host, word).id, **values)
    told = ", ".join(f"{key.removesuffix('_db')} {value}" for key, value in values.items())
    _done(host, json_output, f"{', '.join(words)}: {told}.")


def _on_one_track(
    host: SessionHost, placements: Sequence[Placement], name: str, role: str | None
) -> list[Placement]:
    track_id = host.create_track(name, role).id
    return [Placement(part.wav, part.position, part.name, track_id) for part in placements]


def _role(word: str) -> str:
    word = word.strip().lower()
    if word not in USUAL_ROLES:
        say(f"{word!r} is none of {', '.join(USUAL_ROLES)}: only a model that declares it plays it.")
    return word


def _time(text: str, rate: int) -> int:
    """Seconds, or samples that end in smp, as samples. Raises UsageError."""
    try:
        samples = int(text.removesuffix(SAMPLES)) if text.endswith(SAMPLES) else round(float(text) * rate)
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no time: give seconds, or samples as 44100{SAMPLES}.") from None
    if samples < 0:
        raise UsageError(f"{text} is before the session begins.")
    return samples


def _metre(text: str) -> tuple[int, int]:
    beats, _, unit = text.partition("/")
    if not (
        beats.isdigit() and unit.isdigit() and 1 <= int(beats) <= 64 and int(unit) in (1, 2, 4, 8, 16, 32)
    ):
        raise UsageError(f"{text!r} is no metre: give it as 4/4.")
    return int(beats), int(unit)


def _span(host: SessionHost, start: str, end: str | None) -> Span:
    """The stretch between two times. Raises UsageError where it is empty."""
    first = _time(start, host.sample_rate)
    last = host.length if end is None else _time(end, host.sample_rate)
    if host.length == 0 and end is None:
        raise BacklineError("The session is empty: there is nothing to listen to.")
    if first >= last:
        raise UsageError(f"Nothing lies between {start} and {end or 'the end of the session'}.")
    return Span(first, last)


def _part(host: SessionHost, start: str, end: str | None) -> Span | None:
    return None if start == "0" and end is None else _span(host, start, end)


def _region_span(track: TrackState, number: int) -> Span:
    if number > len(track.regions):
        raise UsageError(f"The track {track.name!r} has no region {number}.")
    region = track.regions[number - 1]
    return Span(region.position, region.end)


def _effect(chain: Sequence[PluginState | None], number: int) -> PluginState:
    plugin = chain[number - 1] if 1 <= number <= len(chain) else None
    if plugin is None:
        raise UsageError(f"There is no effect {number}: the chain has {len(chain)}.")
    return plugin


def _numbered(text: str, sign: Literal["=", "."]) -> tuple[int, str]:
    number, found, rest = text.partition(sign)
    if not found or not number.strip().isdigit():
        example = "1.mix=0.5" if sign == "." else "1=warm.vstpreset"
        raise UsageError(f"{text!r} does not say which effect: give it as {example}.")
    return int(number), rest


def _value(text: str) -> Parameter:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _with_preset(host: SessionHost, plugin: PluginState, file: Path) -> PluginState:
    if plugin.path is None:
        raise UsageError(f"{plugin.name} is built in and takes no presets: set its parameters.")
    if not file.is_file():
        raise BacklineError(f"{file} does not exist.")
    kept = keep_preset(host.preset_folder(), file.read_bytes())
    return plugin.model_copy(update={"preset": kept, "parameters": {}})


def _described(
    host: SessionHost, track: TrackState, chain: Sequence[PluginState]
) -> tuple[list[PluginState], list[tuple[Control, ...]]]:
    """The chain with the state of each effect kept, and their controls; one that fails now must be new."""
    kept, controls = [], []
    for plugin in chain:
        try:
            found, plugin = describe(plugin, presets=host.preset_folder(), rate=host.sample_rate)
            controls.append(found.controls)
        except BacklineError as error:
            if plugin not in track.plugins:
                raise
            say(str(error))
            controls.append(())
        kept.append(plugin)
    return kept, controls


def _shown(control: Control) -> str:
    value = control.value
    return f"{value:.6g} {control.unit}".strip() if isinstance(value, float) else str(value)


def _range(control: Control) -> str:
    if control.choices:
        return ", ".join(control.choices)
    return "" if control.low is None or control.high is None else f"{control.low:g} to {control.high:g}"


def _refuse(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise BacklineError(f"{path} exists; pass --force to replace it.")
    if not path.parent.is_dir():
        raise BacklineError(f"{path.parent} is not a folder.")


def _row(host: SessionHost, track: TrackState) -> list[str]:
    flags = [("armed", track.armed), ("muted", track.muted), ("solo", track.soloed)]
    side = "C" if track.pan == 0 else f"{'L' if track.pan < 0 else 'R'}{abs(track.pan) * 100:.0f}"
    names = [plugin.name if plugin.enabled else f"({plugin.name})" for plugin in track.plugins]
    return [
        f"{track.id} {track.name}",
        track.role or "?",
        ", ".join(name for name, on in flags if on),
        f"{track.gain_db:+.1f} {side}",
        ", ".join(names),
        str(sum(len(region.takes) for region in track.regions)),
        _picture(track, host.length),
    ]


def _picture(track: TrackState, length: int) -> str:
    """Where the regions lie, over the session's length."""
    cells = []
    for column in range(COLUMNS):
        start, end = column * length / COLUMNS, (column + 1) * length / COLUMNS
        inside = any(region.position < end and region.end > start for region in track.regions)
        cells.append("━" if inside else "·")
    return "".join(cells)
