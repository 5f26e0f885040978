"""The built-in track host: a folder with session.json and wavs, for work without a DAW.

Every change is one step: saved before the call returns, taken back by `undo`. Changes are made to what is on
the disk at that moment, under a lock, so two processes may work on one session. The schema and how a step
is saved are in plugin_host.session_file.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import soundfile
from numpy.typing import NDArray
from pydantic import ValidationError

from engine.audio import Audio, empty, read, write
from engine.errors import BacklineError, UsageError
from plugin_host.host import Grid, Marker, Placement, Span, Track
from plugin_host.plugins import Bypassed, run_chain
from plugin_host.roles import guess_role
from plugin_host.session_file import (
    AUDIO,
    PLUGINS,
    SESSION,
    MarkerPoint,
    PluginState,
    Region,
    SessionFile,
    SessionState,
    Take,
    TempoPoint,
    TrackState,
    locked,
    read_session,
    step_back,
    step_forward,
    write_first,
    write_step,
)

FloatArray = NDArray[np.float32]
Warn = Callable[[str], None]
UNITY_DB = 0.0


class SessionHost:
    """plugin_host.host.TrackHost on a session folder. warn: told in sentences what had to be left out."""

    def __init__(self, folder: Path, file: SessionFile, warn: Warn | None = None) -> None:
        self.folder = folder
        self.file = file
        self.warn: Warn = warn or (lambda sentence: None)
        self.plugin_seconds: float | None = None  # None: plugin_host.plugins decides how long one may take
        self._exports: Path | None = None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        sample_rate: int,
        tempo: float,
        numerator: int = 4,
        denominator: int = 4,
        first_bar: int = 0,
    ) -> Self:
        """A new, empty session; a bar begins at sample `first_bar`.

        Raises BacklineError where `folder` holds one or cannot be written.
        """
        folder = Path(folder)
        if (folder / SESSION).exists():
            raise BacklineError(f"{folder} holds a session already.")
        point = TempoPoint(position=first_bar, bpm=tempo, numerator=numerator, denominator=denominator)
        try:
            (folder / AUDIO).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BacklineError(f"{folder} cannot be written: {error.strerror}.") from error
        state = SessionState(sample_rate=sample_rate, tempo_map=(point,))
        return cls(folder, write_first(folder, state))

    @classmethod
    def open(cls, folder: str | Path, warn: Warn | None = None) -> Self:
        """The session in `folder`. Raises BacklineError where there is none, or one that cannot be read."""
        return cls(Path(folder), read_session(Path(folder)), warn)

    @property
    def state(self) -> SessionState:
        return self.file.session

    @property
    def sample_rate(self) -> int:
        return self.state.sample_rate

    @property
    def tempo(self) -> float:
        return self.state.tempo_map[0].bpm

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def selection(self) -> Span | None:
        return None

    def grid(self, span: Span) -> Grid | None:
        points = self.state.tempo_map
        if any(span.start < point.position < span.end for point in points[1:]):
            return None
        before = [point for point in points if point.position <= span.start]
        point = before[-1] if before else points[0]
        bpm = point.bpm * point.denominator / 4  # of the metre's own beats
        bar = point.numerator * 60 / bpm
        return Grid(bpm, point.numerator, (point.position - span.start) / self.sample_rate % bar)

    def markers(self) -> list[Marker]:
        return [Marker(point.position, point.name) for point in self.state.markers]

    def tracks(self) -> list[Track]:
        return [
            Track(track.id, track.name, track.role, track.armed, track.muted, track.soloed)
            for track in self.state.tracks
        ]

    def create_track(self, name: str, role: str | None = None) -> Track:
        def change(state: SessionState) -> SessionState:
            return _with_new_track(state, name, role)

        self._step(f"add {name}", change)
        return self.tracks()[-1]

    def arm(self, track_id: str, armed: bool = True) -> None:
        self.set_track(track_id, armed=armed)

    def set_track(self, track_id: str, **values: Any) -> None:
        """Change fields of session_file.TrackState: name, role, muted, soloed, gain_db, pan, plugins, ..."""
        name = self._track(track_id).name
        words = ", ".join(_worded(key, value) for key, value in values.items())
        self._step(f"{name}: {words}", lambda state: _changed(state, track_id, **values))

    def remove_track(self, track_id: str) -> None:
        """Take a track out of the session; its wavs stay, and undo brings it back."""

        def change(state: SessionState) -> SessionState:
            _find(state, track_id)
            return _updated(state, tracks=tuple(track for track in state.tracks if track.id != track_id))

        self._step(f"remove {self._track(track_id).name}", change)

    def set_tempo(self, points: Sequence[TempoPoint]) -> None:
        """Replace the tempo map. Raises UsageError where it is empty or two points lie at one sample."""
        ordered = tuple(sorted(points, key=lambda point: point.position))
        if not ordered or len({point.position for point in ordered}) < len(ordered):
            raise UsageError("A tempo map needs at least one point, and each at its own position.")
        self._step("tempo", lambda state: _updated(state, tempo_map=ordered))

    def set_markers(self, points: Sequence[MarkerPoint]) -> None:
        """Replace the markers; of two at one sample the later one stays."""
        latest = {point.position: point for point in points}
        ordered = tuple(latest[position] for position in sorted(latest))
        self._step("markers", lambda state: _updated(state, markers=ordered))

    def choose_take(self, track_id: str, region: int, take: int) -> None:
        """Make another take of a region (both counted from 0) sound."""

        def change(state: SessionState) -> SessionState:
            regions = list(_find(state, track_id).regions)
            if not 0 <= region < len(regions) or not 0 <= take < len(regions[region].takes):
                raise UsageError(f"The track has no region {region + 1} with a take {take + 1}.")
            regions[region] = regions[region].model_copy(update={"chosen": take})
            return _changed(state, track_id, regions=tuple(regions))

        self._step(f"{self._track(track_id).name}: take {take + 1}", change)

    def move_region(self, track_id: str, region: int, position: int) -> None:
        """Move a region (counted from 0) to another sample."""

        def change(state: SessionState) -> SessionState:
            regions = list(_find(state, track_id).regions)
            if not 0 <= region < len(regions):
                raise UsageError(f"The track has no region {region + 1}.")
            _check_position(position)
            regions[region] = regions[region].model_copy(update={"position": position})
            return _changed(state, track_id, regions=tuple(regions))

        self._step(f"{self._track(track_id).name}: move", change)

    def remove_region(self, track_id: str, region: int) -> None:
        """Take a region (counted from 0) off its track; its wavs stay, and undo brings it back."""

        def change(state: SessionState) -> SessionState:
            regions = list(_find(state, track_id).regions)
            if not 0 <= region < len(regions):
                raise UsageError(f"The track has no region {region + 1}.")
            del regions[region]
            return _changed(state, track_id, regions=tuple(regions))

        self._step(f"{self._track(track_id).name}: remove region", change)

    def forget_steps(self, label: str) -> None:
        """Make what the session holds now its beginning, called `label`."""
        with locked(self.folder):
            self.file = write_first(self.folder, read_session(self.folder).session, label)

    def undo(self) -> str:
        """Take the last step back; returns what it was called. Raises BacklineError without one."""
        with locked(self.folder):
            now = read_session(self.folder)
            self.file = step_back(self.folder, now)
        return now.label

    def redo(self) -> str:
        """Do the step again that was taken back last; returns what it is called."""
        with locked(self.folder):
            self.file = step_forward(self.folder, read_session(self.folder))
        return self.file.label

    def export(
        self, track_ids: Iterable[str], span: Span | None = None, *, sounding: bool = True
    ) -> dict[str, Path]:
        span = span or Span(0, max(1, self.length))
        folder = self._export_folder()
        paths = {}
        for track_id in track_ids:
            track = self._track(track_id)
            samples = self._sound(track, span) if sounding else self._render(track, span)
            paths[track_id] = folder / f"track-{track_id}.wav"
            write(paths[track_id], Audio(samples, self.sample_rate))
        return paths

    def place(self, track_id: str, wav: Path, position: int) -> None:
        name = self._track(track_id).name
        self.place_all(f"{name}: place {wav.name}", [Placement(wav, position, wav.stem, track_id)])

    def place_all(
        self,
        label: str,
        placements: Sequence[Placement],
        *,
        disarm: Iterable[str] = (),
        mute: Iterable[str] = (),
    ) -> list[str]:
        """A placement over exactly the range of a region there is becomes a take of it, and is chosen."""
        sounds = [self._readable(placement) for placement in placements]
        ids: list[str] = []

        def change(state: SessionState) -> SessionState:
            for placement, sound in zip(placements, sounds, strict=True):
                track_id = placement.track_id
                if track_id is None:
                    state = _with_new_track(state, placement.name, placement.role)
                    track_id = state.tracks[-1].id
                track = _find(state, track_id)
                take = self._write_take(track, placement, sound)
                state = _changed(state, track_id, regions=_with_take(track, take, placement.position))
                ids.append(track_id)
            for track_id in disarm:
                state = _changed(state, track_id, armed=False)
            for track_id in mute:
                state = _changed(state, track_id, muted=True)
            return state

        self._step(label, change)
        return ids

    def preset_folder(self) -> Path:
        """Where presets of plugins are kept."""
        folder = self.folder / PLUGINS
        folder.mkdir(exist_ok=True)
        return folder

    def set_plugins(self, track_id: str, plugins: Sequence[PluginState], label: str) -> None:
        """Replace a track's chain."""
        self._step(label, lambda state: _changed(state, track_id, plugins=tuple(plugins)))

    def _readable(self, placement: Placement) -> Audio:
        _check_position(placement.position)
        sound = read(placement.wav, shortest=0)
        if sound.sample_rate != self.sample_rate:
            raise BacklineError(
                f"{placement.wav} has {sound.sample_rate} Hz, the session {self.sample_rate} Hz."
            )
        return sound

    def _write_take(self, track: TrackState, placement: Placement, sound: Audio) -> Take:
        """Under a name that no wav of the session ever had."""
        folder = self.folder / AUDIO
        numbers = [
            int(found[1]) for path in folder.iterdir() if (found := re.search(r"-(\d+)\.wav$", path.name))
        ]
        file = f"{_slug(track.name) or 'track'}-{max(numbers, default=0) + 1:05d}.wav"
        write(folder / file, sound)
        return Take(file=file, name=placement.name, length=sound.length)

    def _export_folder(self) -> Path:
        """A temporary folder that goes when this object does."""
        if self._exports is None:
            self._exports = Path(tempfile.mkdtemp(prefix="backline-session-"))
            weakref.finalize(self, shutil.rmtree, self._exports, ignore_errors=True)
        return self._exports

    def _track(self, track_id: str) -> TrackState:
        return _find(self.state, track_id)

    def _sound(self, track: TrackState, span: Span) -> FloatArray:
        """(channels, span.length): as it is heard. Plugins hear the track from its first sample on."""
        plugins = [plugin for plugin in track.plugins if plugin.enabled]
        if not plugins:
            return balanced(self._render(track, span), track.gain_db, track.pan)
        samples = self._render(track, Span(0, span.end))

        def bypassed(what: Bypassed) -> None:
            self.warn(f"{what.sentence} It was left out on the track {track.name!r}.")

        samples = run_chain(
            plugins,
            Audio(samples, self.sample_rate),
            presets=self.folder / PLUGINS,
            seconds=self.plugin_seconds,
            bypassed=bypassed,
        ).samples
        return balanced(samples[:, span.start :], track.gain_db, track.pan)

    def _render(self, track: TrackState, span: Span) -> FloatArray:
        """(channels, span.length): a track's regions, later over earlier; one silent channel without any."""
        folder = self.folder / AUDIO
        channels = max((_channels(folder / region.take.file) for region in track.regions), default=1)
        result = empty(channels, span.length)
        for region in track.regions:
            start, end = max(span.start, region.position), min(span.end, region.end)
            if start < end:
                part = _read_part(folder / region.take.file, start - region.position, end - start)
                heard = result[:, start - span.start : end - span.start]
                heard[:] = 0  # of a stereo region under a mono one, nothing is to be left
                heard[: channels if len(part) == 1 else len(part)] = part
        return result

    def _step(self, label: str, change: Callable[[SessionState], SessionState]) -> None:
        """Apply a change to the session as it is on the disk, and save it, unless nothing changed."""
        with locked(self.folder):
            now = read_session(self.folder)
            state = change(now.session)
            self.file = now if state == now.session else write_step(self.folder, now, state, label)


def balanced(samples: FloatArray, gain_db: float, pan: float) -> FloatArray:
    """Gain and pan: a balance that leaves the centre as it is, and turns one channel into two off it."""
    gain = np.float32(10 ** (gain_db / 20))
    if pan == 0 or samples.shape[0] > 2:
        return samples if gain_db == UNITY_DB else samples * gain
    sides = np.array([[min(1, 1 - pan)], [min(1, 1 + pan)]], np.float32)
    return np.broadcast_to(samples, (2, samples.shape[1])) * sides * gain


def find_track(host: SessionHost, word: str) -> TrackState:
    """The track with this id or name (capitals do not matter). Raises UsageError with the names there are."""
    tracks = host.state.tracks
    named = [track for track in tracks if track.name.casefold() == word.casefold()]
    found = named or [track for track in tracks if track.id == word]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(track.id for track in found)
        raise UsageError(f"{len(found)} tracks are called {word!r}: give the number ({numbers}) instead.")
    names = ", ".join(track.name for track in tracks) or "none yet"
    raise UsageError(f"The session has no track {word!r}; there are: {names}.")


def _worded(key: str, value: Any) -> str:
    """A change of a field, as a step is called."""
    if isinstance(value, bool):
        return key if value else f"not {key}"
    return key if isinstance(value, tuple) else f"{key.removesuffix('_db')} {value}"


def _find(state: SessionState, track_id: str) -> TrackState:
    for track in state.tracks:
        if track.id == track_id:
            return track
    raise UsageError(f"The session has no track {track_id}.")


def _updated(state: SessionState, **values: Any) -> SessionState:
    return state.model_copy(update=values)


def _changed(state: SessionState, track_id: str, **values: Any) -> SessionState:
    old = _find(state, track_id)
    try:
        new = TrackState.model_validate(old.model_copy(update=values).model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{first['loc'][0]} {first['input']} is out of range: {first['msg']}.") from error
    return _updated(state, tracks=tuple(new if track.id == track_id else track for track in state.tracks))


def _with_new_track(state: SessionState, name: str, role: str | None) -> SessionState:
    number = max((int(track.id) for track in state.tracks), default=0) + 1
    track = TrackState(id=str(number), name=name, role=role or guess_role(name))
    return _updated(state, tracks=(*state.tracks, track))


def _with_take(track: TrackState, take: Take, position: int) -> tuple[Region, ...]:
    """As a new take where the topmost region there has just this range, else as a new region on top."""
    regions = list(track.regions)
    for number in reversed(range(len(regions))):
        region = regions[number]
        if (region.position, region.length) == (position, take.length):
            takes = (*region.takes, take)
            chosen = Region(position=position, takes=takes, chosen=len(takes) - 1)
            return (*regions[:number], *regions[number + 1 :], chosen)
    return (*regions, Region(position=position, takes=(take,)))


def _check_position(position: int) -> None:
    if position < 0:
        raise UsageError(f"A region cannot start at sample {position}, before the session does.")


def _slug(name: str) -> str:
    """A file name of a track's name: letters of any script, digits, - and no others."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:40]


def _channels(path: Path) -> int:
    with _opened(path) as file:
        return int(file.channels)


def _read_part(path: Path, start: int, length: int) -> FloatArray:
    """(channels, length) of a wav from sample `start` on."""
    with _opened(path) as file:
        file.seek(start)
        samples = file.read(length, dtype="float32", always_2d=True).T
    if samples.shape[1] < length:
        raise BacklineError(f"{path} is shorter than the session says: it was changed or cut off.")
    return samples


def _opened(path: Path) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        raise BacklineError(f"{path}, a take of this session, is missing or cannot be read.") from error
