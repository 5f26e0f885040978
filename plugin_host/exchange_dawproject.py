"""DAWproject 1.0 (https://github.com/bitwig/dawproject): a zip of project.xml, metadata.xml, audio, presets.

Times are written in seconds, so that every clip stays at its sample.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import soundfile

from engine.audio import Audio
from engine.errors import BacklineError
from plugin_host.exchange import ReadItem, ReadProject, ReadTake, ReadTrack, Segment, Warn, segments
from plugin_host.plugins import describe, find_plugin
from plugin_host.session import SessionHost
from plugin_host.session_file import AUDIO, PLUGINS, PluginState, TempoPoint, TrackState

PROJECT, METADATA = "project.xml", "metadata.xml"
DEFAULT_RATE = 44100  # of a project without audio
DYNAMICS = ("Compressor", "Limiter", "NoiseGate")  # pedalboard's that DAWproject describes too
# Elements of those devices in the schema's order: parameter of pedalboard, unit, factor into that unit.
CONTROLS = {
    "Attack": ("attack_ms", "seconds", 1e-3),
    "Ratio": ("ratio", "linear", 1.0),
    "Release": ("release_ms", "seconds", 1e-3),
    "Threshold": ("threshold_db", "decibel", 1.0),
}
TAKES_LOST = "DAWproject has no takes: of each region only the chosen one was written."


def write_dawproject(host: SessionHost, path: Path, warn: Warn) -> None:
    """The session as one file: tempo map, tracks, mixer, plugins with their state, regions and their wavs."""
    files: dict[str, Path] = {}
    project = _project(host, files)
    if any(len(region.takes) > 1 for track in host.state.tracks for region in track.regions):
        warn(TAKES_LOST)
    metadata = Element("MetaData")
    SubElement(metadata, "Title").text = _text(host.folder.resolve().name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.writestr(PROJECT, _xml(project))
                archive.writestr(METADATA, _xml(metadata))
                for name, source in files.items():
                    archive.write(source, name)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BacklineError(f"{path} could not be written: {error.strerror or error}.") from error


def read_dawproject(path: Path) -> ReadProject:
    """Audio clips with their tracks, mixer, plugins and tempo; what is stretched plays at its own speed.

    Raises BacklineError for what is no DAWproject.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = ElementTree.fromstring(archive.read(PROJECT))
            held = set(archive.namelist())
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError, OSError) as error:
        raise BacklineError(f"{path} is not a DAWproject that can be read.") from error
    try:
        return _read(path, root, held)
    except (KeyError, ValueError, AttributeError) as error:
        raise BacklineError(f"{path} has a project.xml that is not understood: {error}.") from error


def _project(host: SessionHost, files: dict[str, Path]) -> Element:
    number = itertools.count()

    def make_id() -> str:
        return f"id{next(number)}"

    state = host.state
    project = Element("Project", version="1.0")
    SubElement(project, "Application", name="Backline", version=version("backline"))
    transport = SubElement(project, "Transport")
    first = state.tempo_map[0]
    tempo, metre = make_id(), make_id()
    SubElement(transport, "Tempo", id=tempo, unit="bpm", value=_number(first.bpm), min="1", max="1000")
    SubElement(
        transport,
        "TimeSignature",
        id=metre,
        numerator=str(first.numerator),
        denominator=str(first.denominator),
    )
    structure = SubElement(project, "Structure")
    master = make_id()
    track_ids = []
    for track in state.tracks:
        track_ids.append(make_id())
        _write_track(structure, host, track, track_ids[-1], master, make_id, files)
    last = SubElement(structure, "Track", id=make_id(), name="Master", contentType="audio", loaded="true")
    channel = SubElement(last, "Channel", id=master, role="master", audioChannels="2", solo="false")
    _mixer(channel, TrackState(id="0", name="Master"), make_id)
    arrangement = SubElement(project, "Arrangement", id=make_id())
    lanes = SubElement(arrangement, "Lanes", id=make_id(), timeUnit="seconds")
    for track, track_id in zip(state.tracks, track_ids, strict=True):
        lane = SubElement(lanes, "Lanes", id=make_id(), track=track_id)
        clips = SubElement(lane, "Clips", id=make_id())
        for segment in segments(track):
            _write_clip(clips, host, segment, make_id, files)
    if state.markers:
        markers = SubElement(arrangement, "Markers", id=make_id(), timeUnit="seconds")
        for point in state.markers:
            time = _number(point.position / state.sample_rate)
            SubElement(markers, "Marker", time=time, name=_text(point.name))
    _write_tempo_map(arrangement, state.tempo_map, state.sample_rate, tempo, metre, make_id)
    SubElement(project, "Scenes")
    return project


def _write_track(
    structure: Element,
    host: SessionHost,
    track: TrackState,
    track_id: str,
    master: str,
    make_id: Callable[[], str],
    files: dict[str, Path],
) -> None:
    role = {} if track.role is None else {"comment": f"role: {track.role}"}
    node = SubElement(
        structure,
        "Track",
        id=track_id,
        name=_text(track.name),
        contentType="audio",
        loaded="true",
        attrib=role,
    )
    channels = [_channels(host.folder / AUDIO / region.take.file) for region in track.regions]
    channel = SubElement(
        node,
        "Channel",
        id=make_id(),
        destination=master,
        role="regular",
        audioChannels=str(max(channels, default=1)),
        solo=_bool(track.soloed),
    )
    if track.plugins:
        devices = SubElement(channel, "Devices")
        for plugin in track.plugins:
            _write_device(devices, host, plugin, make_id, files)
    _mixer(channel, track, make_id)


def _mixer(channel: Element, track: TrackState, make_id: Callable[[], str]) -> None:
    SubElement(channel, "Mute", id=make_id(), name="Mute", value=_bool(track.muted))
    pan, volume = (track.pan + 1) / 2, 10 ** (track.gain_db / 20)
    for name, unit, value, highest in (("Pan", "normalized", pan, 1.0), ("Volume", "linear", volume, 1000.0)):
        SubElement(
            channel,
            name,
            id=make_id(),
            name=name,
            unit=unit,
            value=_number(value),
            min="0",
            max=_number(highest),
        )


def _write_device(
    devices: Element,
    host: SessionHost,
    plugin: PluginState,
    make_id: Callable[[], str],
    files: dict[str, Path],
) -> None:
    common = {"id": make_id(), "name": _text(plugin.name), "deviceName": _text(plugin.name)}
    common |= {"deviceRole": "audioFX", "loaded": "true"}
    if plugin.path is not None:
        if plugin.preset is None:  # the file was written by hand: ask the plugin for its state
            plugin = describe(plugin, presets=host.preset_folder())[1]
        preset = host.folder / PLUGINS / str(plugin.preset)
        common["deviceID"] = _class_id(preset.read_bytes())
        node = SubElement(devices, "Vst3Plugin", common)
        SubElement(node, "Enabled", id=make_id(), name="On/Off", value=_bool(plugin.enabled))
        SubElement(node, "State", path=f"{PLUGINS}/{preset.name}")
        files[f"{PLUGINS}/{preset.name}"] = preset
        return
    common |= {"deviceVendor": "pedalboard"}
    node = SubElement(devices, plugin.name if plugin.name in DYNAMICS else "BuiltinDevice", common)
    described = {parameter for parameter, _, _ in CONTROLS.values()} if plugin.name in DYNAMICS else set()
    _parameters(node, plugin, make_id, described)
    SubElement(node, "Enabled", id=make_id(), name="On/Off", value=_bool(plugin.enabled))
    for name, (parameter, unit, factor) in CONTROLS.items():
        value = plugin.parameters.get(parameter)
        if parameter in described and isinstance(value, int | float):
            SubElement(node, name, id=make_id(), unit=unit, value=_number(value * factor))


def _parameters(node: Element, plugin: PluginState, make_id: Callable[[], str], described: set[str]) -> None:
    values = {name: value for name, value in plugin.parameters.items() if name not in described}
    parent = SubElement(node, "Parameters")
    for name, value in values.items():
        if isinstance(value, bool):
            SubElement(parent, "BoolParameter", id=make_id(), name=name, value=_bool(value))
        elif isinstance(value, str):
            SubElement(parent, "EnumParameter", id=make_id(), name=name, count="1", labels=value, value="0")
        else:
            SubElement(parent, "RealParameter", id=make_id(), name=name, unit="linear", value=_number(value))


def _write_clip(
    clips: Element, host: SessionHost, segment: Segment, make_id: Callable[[], str], files: dict[str, Path]
) -> None:
    rate, take = host.sample_rate, segment.region.take
    source = host.folder / AUDIO / take.file
    files[f"audio/{take.file}"] = source
    clip = SubElement(
        clips,
        "Clip",
        name=_text(take.name),
        time=_number(segment.position / rate),
        duration=_number(segment.length / rate),
        contentTimeUnit="seconds",
        playStart=_number(segment.offset / rate),
        playStop=_number((segment.offset + segment.length) / rate),
        fadeTimeUnit="seconds",
        fadeInTime="0.0",
        fadeOutTime="0.0",
    )
    audio = SubElement(
        clip,
        "Audio",
        id=make_id(),
        algorithm="raw",
        timeUnit="seconds",
        channels=str(_channels(source)),
        sampleRate=str(rate),
        duration=_number(take.length / rate),
    )
    SubElement(audio, "File", path=f"audio/{take.file}")


def _write_tempo_map(
    arrangement: Element,
    points: tuple[TempoPoint, ...],
    rate: int,
    tempo: str,
    metre: str,
    make_id: Callable[[], str],
) -> None:
    """Where it is more than one tempo and metre from the start on."""
    if len(points) == 1 and points[0].position == 0:
        return
    if points[0].position:
        points = (points[0].model_copy(update={"position": 0}), *points)
    automation = SubElement(arrangement, "TempoAutomation", id=make_id(), timeUnit="seconds", unit="bpm")
    SubElement(automation, "Target", parameter=tempo)
    metres = SubElement(arrangement, "TimeSignatureAutomation", id=make_id(), timeUnit="seconds")
    SubElement(metres, "Target", parameter=metre)
    for point in points:
        time = _number(point.position / rate)
        SubElement(automation, "RealPoint", time=time, value=_number(point.bpm), interpolation="hold")
        SubElement(
            metres,
            "TimeSignaturePoint",
            time=time,
            numerator=str(point.numerator),
            denominator=str(point.denominator),
        )


def _read(path: Path, root: Element, held: set[str]) -> ReadProject:
    rates = [int(node.attrib["sampleRate"]) for node in root.iter("Audio")]
    rate = max(set(rates), key=rates.count) if rates else DEFAULT_RATE
    project = ReadProject(rate, _read_tempo(root), [])
    by_id: dict[str, ReadTrack] = {}
    structure = root.find("Structure")
    for node in () if structure is None else structure.iter("Track"):
        channel = node.find("Channel")
        if channel is not None and channel.get("role") == "master":
            continue
        track = _read_track(path, node, channel)
        by_id[node.attrib["id"]] = track
        project.tracks.append(track)
    arrangement = root.find("Arrangement")
    if arrangement is not None:
        project.markers += _read_markers(arrangement, project)
        for lanes in arrangement.findall("Lanes"):
            for track_id, item in _items(lanes, None, "beats", 0.0, project, path, held):
                by_id[track_id].items.append(item)
    return project


def _read_markers(arrangement: Element, project: ReadProject) -> list[tuple[float, str]]:
    """Seconds and names."""
    found = arrangement.find("Markers")
    if found is None:
        return []
    unit = found.get("timeUnit", "beats")
    return [
        (_seconds(float(node.attrib["time"]), unit, project), node.get("name", ""))
        for node in found.findall("Marker")
    ]


def _items(
    node: Element,
    track: str | None,
    unit: str,
    start: float,
    project: ReadProject,
    path: Path,
    held: set[str],
) -> Iterator[tuple[str, ReadItem]]:
    """The audio clips below a timeline, at their place in seconds; start: where the timeline begins."""
    track, unit = node.get("track", track), node.get("timeUnit", unit)
    for child in node:
        if child.tag in ("Lanes", "Clips"):
            yield from _items(child, track, unit, start, project, path, held)
        if child.tag != "Clip" or track is None or child.get("enable") == "false":
            continue
        position = start + _seconds(float(child.attrib["time"]), unit, project)
        inner = child.get("contentTimeUnit", unit)
        if (nested := child.find("Clips")) is not None:
            yield from _items(nested, track, inner, position, project, path, held)
        audio = child.find("Audio")
        audio = child.find("Warps/Audio") if audio is None else audio
        if audio is None:
            continue
        source = audio.find("File")
        if source is None:
            raise KeyError("File")
        offset = _seconds(float(child.get("playStart", 0)), inner, project)
        length = float(audio.attrib["duration"]) - offset
        if "duration" in child.attrib:
            length = min(length, _seconds(float(child.attrib["duration"]), unit, project))
        take = ReadTake(child.get("name") or "take", _loader(path, source, held))
        yield track, ReadItem(position, offset, length, [take])


def _loader(path: Path, source: Element, held: set[str]) -> Callable[[], Audio]:
    name = source.attrib["path"]
    outside = source.get("external") == "true"
    if not outside and name not in held:
        raise BacklineError(f"{path} does not hold {name}, which it names.")

    def load() -> Audio:
        try:
            if outside:
                samples, rate = soundfile.read(path.parent / name, dtype="float32", always_2d=True)
            else:
                with zipfile.ZipFile(path) as archive:
                    data = io.BytesIO(archive.read(name))
                samples, rate = soundfile.read(data, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise BacklineError(f"{name}, which {path} names, cannot be read as audio.") from error
        return Audio(np.ascontiguousarray(samples.T), int(rate))

    return load


def _read_track(path: Path, node: Element, channel: Element | None) -> ReadTrack:
    comment = node.get("comment", "")
    role = comment.removeprefix("role: ") if comment.startswith("role: ") else None
    track = ReadTrack(node.get("name") or "track", role)
    if channel is None:
        return track
    track.soloed = channel.get("solo") == "true"
    if (mute := channel.find("Mute")) is not None:
        track.muted = mute.get("value") == "true"
    if (pan := channel.find("Pan")) is not None:
        track.pan = max(-1.0, min(1.0, 2 * float(pan.get("value", 0.5)) - 1))
    if (volume := channel.find("Volume")) is not None:
        track.gain_db = 20 * math.log10(max(1e-10, float(volume.get("value", 1))))
    devices = channel.find("Devices")
    track.plugins = [found for device in devices or () if (found := _read_device(path, device)) is not None]
    return track


def _read_device(path: Path, device: Element) -> tuple[PluginState, bytes | None] | None:
    name = device.attrib["deviceName"]
    enabled = device.find("Enabled")
    values: dict[str, bool | float | str] = {}
    for node in device.findall("Parameters/*"):
        key, value = node.get("name", ""), node.get("value", "")
        if node.tag == "RealParameter":
            values[key] = float(value)
        elif node.tag == "BoolParameter":
            values[key] = value == "true"
        elif node.tag == "EnumParameter":
            values[key] = node.get("labels", "").split()[int(value)]
    for element, (parameter, _, factor) in CONTROLS.items():
        if (control := device.find(element)) is not None:
            values[parameter] = float(control.attrib["value"]) / factor
    try:
        plugin = find_plugin(name)
    except BacklineError:
        plugin = PluginState(name=name, path=f"{name}.vst3")  # not on this machine: named when it is to run
    if (device.tag == "Vst3Plugin") != (plugin.path is not None):
        return None
    plugin = plugin.model_copy(
        update={"parameters": values, "enabled": enabled is None or enabled.get("value") != "false"}
    )
    state = device.find("State")
    if state is None:
        return plugin, None
    with zipfile.ZipFile(path) as archive:
        return plugin, archive.read(state.attrib["path"])


def _read_tempo(root: Element) -> list[tuple[float, float, int, int]]:
    """Tempo and metre by the second they begin at, piecewise constant."""
    tempo, metre = root.find("Transport/Tempo"), root.find("Transport/TimeSignature")
    bpm = 120.0 if tempo is None else float(tempo.get("value", 120))
    beats = 4 if metre is None else int(metre.attrib["numerator"])
    unit = 4 if metre is None else int(metre.attrib["denominator"])
    changes: dict[float, tuple[float | None, tuple[int, int] | None]] = {0.0: (bpm, (beats, unit))}
    automation = root.find("Arrangement/TempoAutomation")
    in_beats = automation is not None and automation.get("timeUnit") == "beats"
    seconds, last = 0.0, (0.0, bpm)
    for point in () if automation is None else automation.findall("RealPoint"):
        time, value = float(point.attrib["time"]), float(point.attrib["value"])
        seconds = seconds + (time - last[0]) * 60 / last[1] if in_beats else time
        last = (time, value)
        changes[seconds] = (value, changes.get(seconds, (None, None))[1])
    metres = root.find("Arrangement/TimeSignatureAutomation")
    if metres is not None and metres.get("timeUnit") == "seconds":
        for point in metres.findall("TimeSignaturePoint"):
            time = float(point.attrib["time"])
            said = (int(point.attrib["numerator"]), int(point.attrib["denominator"]))
            changes[time] = (changes.get(time, (None, None))[0], said)
    result = []
    for time in sorted(changes):
        bpm = changes[time][0] or bpm
        beats, unit = changes[time][1] or (beats, unit)
        result.append((time, bpm, beats, unit))
    return result


def _seconds(time: float, unit: str, project: ReadProject) -> float:
    """A time on the arrangement in seconds."""
    if unit == "seconds":
        return time
    seconds = 0.0
    for number, (start, bpm, _, _) in enumerate(project.tempo):
        end = project.tempo[number + 1][0] if number + 1 < len(project.tempo) else math.inf
        beats = (end - start) * bpm / 60
        if time <= beats:
            return start + time * 60 / bpm
        time -= beats
        seconds = end
    return seconds


def _class_id(preset: bytes) -> str:
    """The plugin's class as a .vstpreset begins with it, written as a UUID."""
    text = preset[8:40].decode("ascii", "replace")
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:32]))


def _channels(path: Path) -> int:
    return int(soundfile.info(path).channels)


def _number(value: float) -> str:
    return repr(float(value))


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _text(value: str) -> str:
    """Without what XML cannot hold."""
    return "".join(letter if letter >= " " else " " for letter in value if letter not in "\ufffe\uffff")


def _xml(root: Element) -> bytes:
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "utf-8") + b"\n"
