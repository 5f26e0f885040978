"""The built-in track host: a folder with session.json and wavs, for work without a DAW.

    my-song/
        session.json        the tracks and what lies on them (schema below)
        audio/              one wav per placed region, never changed once written
        exports/            the latest export of each track

Every change is saved before the call returns; session.json is replaced in one step, so a crash leaves the
state before or after the change and never something between.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.audio import Audio, read, write
from engine.errors import BacklineError, UsageError
from plugin_host.host import Grid, Placement, Span, Track

VERSION = 1
SESSION = "session.json"
AUDIO = "audio"
EXPORTS = "exports"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Region(_Part):
    """A whole wav of `audio/` from sample `position` on. Of two that overlap, the later placed one sounds."""

    file: str
    position: int = Field(ge=0)
    length: int = Field(gt=0, description="samples")


class TrackState(_Part):
    """One track of session.json."""

    id: str
    name: str
    role: str | None = None
    armed: bool = False
    muted: bool = False
    soloed: bool = False
    regions: tuple[Region, ...] = ()


class SessionState(_Part):
    """session.json."""

    version: int = VERSION
    sample_rate: int = Field(ge=8000, le=192000, description="Hz")
    tempo: float = Field(gt=0, description="beats per minute")
    tracks: tuple[TrackState, ...] = ()


class SessionHost:
    """plugin_host.host.TrackHost on a session folder."""

    def __init__(self, folder: Path, state: SessionState) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def create(cls, folder: str | Path, *, sample_rate: int, tempo: float) -> Self:
        """A new, empty session. Raises BacklineError where `folder` holds one or cannot be written."""
        folder = Path(folder)
        if (folder / SESSION).exists():
            raise BacklineError(f"{folder} holds a session already.")
        try:
            for part in (AUDIO, EXPORTS):
                (folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BacklineError(f"{folder} cannot be written: {error.strerror}.") from error
        session = cls(folder, SessionState(sample_rate=sample_rate, tempo=tempo))
        session._save(session.state)
        return session

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The session in `folder`. Raises BacklineError where there is none, or one that cannot be read."""
        path = Path(folder) / SESSION
        try:
            values = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise BacklineError(f"{folder} holds no session: it has no {SESSION}.") from None
        except (OSError, ValueError) as error:
            raise BacklineError(f"{path} cannot be read as JSON.") from error
        version = values.get("version", VERSION) if isinstance(values, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise BacklineError(f"{path} has version {version}, newer than this Backline reads ({VERSION}).")
        try:
            return cls(Path(folder), SessionState.model_validate(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BacklineError(f"{path} is not a valid session: {where}: {first['msg']}.") from error

    @property
    def sample_rate(self) -> int:
        return self.state.sample_rate

    @property
    def tempo(self) -> float:
        return self.state.tempo

    @property
    def length(self) -> int:
        regions = [region for track in self.state.tracks for region in track.regions]
        return max((region.position + region.length for region in regions), default=0)

    @property
    def selection(self) -> Span | None:
        return None

    def grid(self, span: Span) -> Grid | None:
        beat = 60 / self.tempo
        bar = 4 * beat
        return Grid(self.tempo, 4, -(span.start / self.sample_rate) % bar)

    def tracks(self) -> list[Track]:
        return [Track(**track.model_dump(exclude={"regions"})) for track in self.state.tracks]

    def create_track(self, name: str, role: str | None = None) -> Track:
        used = {int(track.id) for track in self.state.tracks}
        track = TrackState(id=str(max(used, default=0) + 1), name=name, role=role)
        self._save(self.state.model_copy(update={"tracks": (*self.state.tracks, track)}))
        return Track(id=track.id, name=name, role=role)

    def arm(self, track_id: str, armed: bool = True) -> None:
        self._replace(self._track(track_id).model_copy(update={"armed": armed}))

    def export(
        self, track_ids: Iterable[str], span: Span | None = None, *, sounding: bool = True
    ) -> dict[str, Path]:
        span = span or Span(0, max(1, self.length))
        paths = {}
        for track_id in track_ids:
            paths[track_id] = self.folder / EXPORTS / f"track-{track_id}.wav"
            write(paths[track_id], Audio(self._render(self._track(track_id), span), self.sample_rate))
        return paths

    def place(self, track_id: str, wav: Path, position: int) -> None:
        track = self._track(track_id)
        audio = read(wav)
        if audio.sample_rate != self.sample_rate:
            raise BacklineError(f"{wav} has {audio.sample_rate} Hz, the session {self.sample_rate} Hz.")
        if position < 0:
            raise UsageError(f"A region cannot start at sample {position}, before the session does.")
        name = f"track-{track_id}-take-{len(track.regions) + 1}.wav"
        write(self.folder / AUDIO / name, audio)
        region = Region(file=name, position=position, length=audio.length)
        self._replace(track.model_copy(update={"regions": (*track.regions, region)}))

    def place_all(
        self,
        label: str,
        placements: Sequence[Placement],
        *,
        disarm: Iterable[str] = (),
        mute: Iterable[str] = (),
    ) -> list[str]:
        ids = []
        for placement in placements:
            track_id = placement.track_id or self.create_track(placement.name, placement.role).id
            self.place(track_id, placement.wav, placement.position)
            ids.append(track_id)
        for track_id in disarm:
            self.arm(track_id, False)
        for track_id in mute:
            self._replace(self._track(track_id).model_copy(update={"muted": True}))
        return ids

    def _track(self, track_id: str) -> TrackState:
        for track in self.state.tracks:
            if track.id == track_id:
                return track
        raise UsageError(f"The session has no track {track_id}.")

    def _render(self, track: TrackState, span: Span) -> NDArray[np.float32]:
        """(channels, span.length): a track's regions, later over earlier; one silent channel without any."""
        parts = [(region, read(self.folder / AUDIO / region.file).samples) for region in track.regions]
        channels = max((len(samples) for _, samples in parts), default=1)
        result = np.zeros((channels, span.length), np.float32)
        for region, samples in parts:
            start, end = max(span.start, region.position), min(span.end, region.position + region.length)
            if start < end:
                source = samples[:, start - region.position : end - region.position]
                result[:, start - span.start : end - span.start] = source
        return result

    def _replace(self, changed: TrackState) -> None:
        tracks = tuple(changed if track.id == changed.id else track for track in self.state.tracks)
        self._save(self.state.model_copy(update={"tracks": tracks}))

    def _save(self, state: SessionState) -> None:
        path = self.folder / SESSION
        temporary = path.with_name(f".{SESSION}.{os.getpid()}.part")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(state.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise BacklineError(f"{path} could not be written: {error.strerror or error}.") from error
        self.state = state
