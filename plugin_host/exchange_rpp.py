"""REAPER's project file (.rpp): text, nested in < and >; the wavs lie in a folder beside it."""

from __future__ import annotations

import math
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from engine.audio import Audio
from engine.errors import BacklineError
from plugin_host.exchange import ReadItem, ReadProject, ReadTake, ReadTrack, Segment, Warn, segments
from plugin_host.session import SessionHost
from plugin_host.session_file import AUDIO, TempoPoint, TrackState, write_bytes

DEFAULT_RATE = 44100
SQUARE = 1  # shape of a tempo point: the tempo stays until the next
# Flags of a tempo point that sets a metre and begins a bar; the bar before it may be cut short by it; it sets
# no tempo.
METRE, CUTS, NO_TEMPO = 1, 4, 2


@dataclass
class Chunk:
    """`<NAME ARGUMENTS`, its lines, and `>`."""

    name: str
    arguments: list[str]
    parts: list[list[str] | Chunk] = field(default_factory=list)

    def value(self, name: str, index: int, default: str) -> str:
        """A value of the first line that begins with `name`."""
        for part in self.parts:
            if isinstance(part, list) and part and part[0] == name and len(part) > index + 1:
                return part[index + 1]
        return default

    def chunks(self, name: str) -> list[Chunk]:
        return [part for part in self.parts if isinstance(part, Chunk) and part.name == name]


def write_rpp(host: SessionHost, path: Path, warn: Warn) -> None:
    """The session as an .rpp and the folder NAME-audio: tempo map, tracks, mixer, regions with all takes.

    Plugins are not written: their state in an .rpp is REAPER's own; `warn` is told.
    """
    folder = audio_folder(path)
    project = Chunk("REAPER_PROJECT", ["0.1", "7.0/backline", "0"])
    first = host.state.tempo_map[0]
    project.parts += [
        ["SAMPLERATE", str(host.sample_rate), "1", "0"],
        ["PANLAW", "1"],
        ["TEMPO", _number(first.bpm), str(first.numerator), str(first.denominator)],
        _tempo_map(host.state.tempo_map, host.sample_rate),
    ]
    for number, point in enumerate(host.state.markers, 1):
        project.parts.append(
            ["MARKER", str(number), _number(point.position / host.sample_rate), point.name, "0"]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for track in host.state.tracks:
            if track.plugins:
                warn(f"The plugins of {track.name!r} are not in the .rpp: a .dawproject takes them along.")
            project.parts.append(_track(host, track, folder.name))
            for file in {take.file for region in track.regions for take in region.takes}:
                temporary = folder / f".{file}.part"
                shutil.copyfile(host.folder / AUDIO / file, temporary)
                temporary.replace(folder / file)
    except OSError as error:
        raise BacklineError(f"{folder} could not be written: {error.strerror or error}.") from error
    write_bytes(path, ("\n".join(_lines(project)) + "\n").encode())


def audio_folder(path: Path) -> Path:
    """Where the wavs of an .rpp are written."""
    return path.with_name(f"{path.stem}-audio")


def read_rpp(path: Path) -> ReadProject:
    """Its tempo map, and audio items with their tracks, mixer and takes; plugins and fades are passed over.

    Raises BacklineError for what is no RPP.
    """
    try:
        root = parse_rpp(path.read_text("utf-8", errors="replace"))
    except OSError as error:
        raise BacklineError(f"{path} cannot be read.") from error
    if root is None or root.name != "REAPER_PROJECT":
        raise BacklineError(f"{path} is not a REAPER project.")
    try:
        return _read(path, root)
    except (ValueError, IndexError) as error:
        raise BacklineError(f"{path} is a REAPER project that is not understood: {error}.") from error


def parse_rpp(text: str) -> Chunk | None:
    """The outermost chunk of an RPP, None where there is none or it does not end."""
    open_: list[Chunk] = []
    for line in text.splitlines():
        words = _words(line)
        if not words:
            continue
        if words[0].startswith("<") and len(words[0]) > 1:
            chunk = Chunk(words[0][1:], words[1:])
            if open_:
                open_[-1].parts.append(chunk)
            open_.append(chunk)
        elif words == [">"]:
            if len(open_) == 1:
                return open_[0]
            if open_:
                open_.pop()
        elif open_:
            open_[-1].parts.append(words)
    return None


def _tempo_map(points: tuple[TempoPoint, ...], rate: int) -> Chunk:
    if points[0].position:
        points = (points[0].model_copy(update={"position": 0}), *points)
    chunk = Chunk("TEMPOENVEX", [], [["ACT", "1", "-1"], ["VIS", "1", "0", "1"], ["ARM", "0"]])
    chunk.parts.append(["DEFSHAPE", str(SQUARE), "-1", "-1"])
    for point in points:
        metre = point.denominator * 65536 + point.numerator
        seconds = _number(point.position / rate)
        flags = METRE | CUTS if point.position else METRE
        chunk.parts.append(["PT", seconds, _number(point.bpm), str(SQUARE), str(metre), "0", str(flags)])
    return chunk


def _track(host: SessionHost, track: TrackState, folder: str) -> Chunk:
    volume = 10 ** (track.gain_db / 20)
    chunk = Chunk("TRACK", [_guid()])
    chunk.parts += [
        ["NAME", track.name],
        ["VOLPAN", _number(volume), _number(track.pan), "-1", "-1", "1"],
        ["MUTESOLO", _flag(track.muted), _flag(track.soloed), "0"],
        ["REC", _flag(track.armed), "0", "1", "0", "0", "0", "0", "0"],
        ["NCHAN", "2"],
        ["PANMODE", "3"],
    ]
    for segment in segments(track):
        chunk.parts.append(_item(host, segment, folder))
    return chunk


def _item(host: SessionHost, segment: Segment, folder: str) -> Chunk:
    """One item with all takes of the region; REAPER's own fades at its ends are turned off."""
    rate, region = host.sample_rate, segment.region
    chunk = Chunk("ITEM", [])
    chunk.parts += [
        ["POSITION", _number(segment.position / rate)],
        ["LENGTH", _number(segment.length / rate)],
        ["LOOP", "0"],
        ["ALLTAKES", "0"],
        ["FADEIN", "0", "0", "0", "0", "0", "0", "0"],
        ["FADEOUT", "0", "0", "0", "0", "0", "0", "0"],
        ["MUTE", "0", "0"],
        ["IGUID", _guid()],
    ]
    for number, take in enumerate(region.takes):
        if number:
            chunk.parts.append(["TAKE", "SEL"] if number == region.chosen else ["TAKE"])
        chunk.parts += [
            ["NAME", take.name],
            ["TAKEVOLPAN", "0", "1", "-1"] if number else ["VOLPAN", "1", "0", "1", "-1"],
            ["SOFFS", _number(segment.offset / rate)],
            ["PLAYRATE", "1", "1", "0", "-1", "0", "0.0025"],
            ["CHANMODE", "0"],
            ["GUID", _guid()],
            Chunk("SOURCE", ["WAVE"], [["FILE", f"{folder}/{take.file}"]]),
        ]
    return chunk


def _read(path: Path, root: Chunk) -> ReadProject:
    bpm, beats, unit = (
        root.value("TEMPO", index, default) for index, default in enumerate(("120", "4", "4"))
    )
    tempo = [(0.0, float(bpm), int(beats), int(unit))]
    for envelope in root.chunks("TEMPOENVEX"):
        for part in envelope.parts:
            if isinstance(part, list) and part[0] == "PT":
                metre = int(part[4]) if len(part) > 4 else 0
                said = divmod(metre, 65536)[::-1] if metre else tempo[-1][2:]
                flags = int(part[6]) if len(part) > 6 else 0
                speed = tempo[-1][1] if flags & NO_TEMPO else float(part[2])
                tempo.append((float(part[1]), speed, said[0], said[1]))
    rate = int(float(root.value("SAMPLERATE", 0, str(DEFAULT_RATE))))
    project = ReadProject(rate, tempo, [], _read_markers(root))
    for chunk in root.chunks("TRACK"):
        track = ReadTrack(chunk.value("NAME", 0, "track") or "track")
        track.gain_db = 20 * math.log10(max(1e-10, float(chunk.value("VOLPAN", 0, "1"))))
        track.pan = float(chunk.value("VOLPAN", 1, "0"))
        track.muted = chunk.value("MUTESOLO", 0, "0") != "0"
        track.soloed = chunk.value("MUTESOLO", 1, "0") != "0"
        track.armed = chunk.value("REC", 0, "0") == "1"
        track.items = [item for part in chunk.chunks("ITEM") if (item := _read_item(path, part)) is not None]
        project.tracks.append(track)
    return project


def _read_markers(root: Chunk) -> list[tuple[float, str]]:
    """Seconds and names; a region's two lines, which have a flag of 1, are no markers."""
    lines = [part for part in root.parts if isinstance(part, list) and part[0] == "MARKER" and len(part) > 3]
    return [(float(line[2]), line[3]) for line in lines if not int((line[4:5] or ["0"])[0]) & 1]


def _read_item(path: Path, chunk: Chunk) -> ReadItem | None:
    """None for an item without audio."""
    takes: list[Chunk] = [Chunk("TAKE", [])]
    chosen = 0
    for part in chunk.parts:
        if isinstance(part, list) and part[0] == "TAKE":
            chosen = len(takes) if "SEL" in part[1:] else chosen
            takes.append(Chunk("TAKE", []))
        else:
            takes[-1].parts.append(part)
    found = []
    for take in takes:
        file = next((source.value("FILE", 0, "") for source in take.chunks("SOURCE")), "")
        if not file:
            return None
        found.append(ReadTake(take.value("NAME", 0, "take"), lambda file=file: _load(path, file)))  # type: ignore[misc]
    position, length = float(chunk.value("POSITION", 0, "0")), float(chunk.value("LENGTH", 0, "0"))
    return ReadItem(position, float(chunk.value("SOFFS", 0, "0")), length, found, chosen)


def _load(path: Path, file: str) -> Audio:
    source = path.parent / file.replace("\\", "/")
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise BacklineError(f"{source}, which {path} names, is missing or no audio.") from error
    return Audio(np.ascontiguousarray(samples.T), int(rate))


def _lines(chunk: Chunk, depth: int = 0) -> list[str]:
    indent = "  " * depth
    lines = [indent + " ".join(["<" + chunk.name, *map(_quoted, chunk.arguments)])]
    for part in chunk.parts:
        if isinstance(part, Chunk):
            lines += _lines(part, depth + 1)
        else:
            lines.append(f"{indent}  " + " ".join([part[0], *map(_quoted, part[1:])]))
    return [*lines, indent + ">"]


def _quoted(word: str) -> str:
    """As REAPER does it: plain, or in whichever of three quotes the word does not hold."""
    word = " ".join(word.split())
    if word and not re.search(r"[\s\"'`]", word) and word[0] not in "<>|#;":
        return word
    for quote in "\"'`":
        if quote not in word:
            return f"{quote}{word}{quote}"
    return "`" + word.replace("`", "'") + "`"


def _words(line: str) -> list[str]:
    found = re.findall(r'"([^"]*)"|\'([^\']*)\'|`([^`]*)`|(\S+)', line)
    return ["".join(groups) for groups in found]


def _guid() -> str:
    return "{" + str(uuid.uuid4()).upper() + "}"


def _number(value: float) -> str:
    return repr(float(value))


def _flag(value: bool) -> str:
    return "1" if value else "0"
