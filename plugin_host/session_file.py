"""session.json and its history: the schema, reading older versions, saving without ever losing a state.

    my-song/
        session.json        where the session stands (SessionFile, below)
        history/000007.json one file per step, the whole state after it: what undo and redo go back to
        audio/              one wav per take, never changed or removed once written
        plugins/            presets of plugins, named after their contents

A step writes its wavs, then its file in history/, then replaces session.json by a rename. Killed at any
point, what is on the disk is the state before or after the step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import BacklineError

VERSION = 3
SESSION = "session.json"
HISTORY = "history"
AUDIO = "audio"
PLUGINS = "plugins"
LOCK = ".lock"
LONGEST_NAME = 100  # of a marker, characters
STEPS_KEPT = 500  # that undo can go back
LOCK_SECONDS = 60.0

Parameter = bool | float | str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TempoPoint(_Part):
    """From sample `position` on: beats per minute, metre. A bar begins there."""

    position: int = Field(ge=0)
    bpm: float = Field(gt=0, le=1000)
    numerator: int = Field(default=4, ge=1, le=64)
    denominator: int = Field(default=4, ge=1, le=64)


class MarkerPoint(_Part):
    """A name at sample `position`: a chord, a part of the song."""

    position: int = Field(ge=0)
    name: str = Field(min_length=1, max_length=LONGEST_NAME)


class Take(_Part):
    """One whole wav of `audio/`."""

    file: str
    name: str
    length: int = Field(gt=0, description="samples")


class Region(_Part):
    """A take from sample `position` on. Of two regions that overlap, the later one in the list sounds."""

    position: int = Field(ge=0)
    takes: tuple[Take, ...] = Field(min_length=1)
    chosen: int = Field(default=0, ge=0, description="which take sounds")

    @model_validator(mode="after")
    def _has_the_chosen_take(self) -> Region:
        if self.chosen >= len(self.takes):
            raise ValueError(f"take {self.chosen} is chosen of {len(self.takes)}")
        return self

    @property
    def take(self) -> Take:
        return self.takes[self.chosen]

    @property
    def length(self) -> int:
        """Samples."""
        return self.take.length

    @property
    def end(self) -> int:
        return self.position + self.length


class PluginState(_Part):
    """A plugin in a track's chain.

    path: None for one of pedalboard's own effects (`name`), else the VST3, of which `name` is the plugin.
    parameters: by the names and in the units that pedalboard shows. preset: a file of `plugins/` with the
    plugin's whole state, loaded before the parameters are set.
    """

    name: str
    path: str | None = None
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    preset: str | None = None
    enabled: bool = True


class TrackState(_Part):
    """One track of session.json."""

    id: str
    name: str
    role: str | None = None
    armed: bool = False
    muted: bool = False
    soloed: bool = False
    gain_db: float = Field(default=0.0, ge=-200, le=60)
    pan: float = Field(default=0.0, ge=-1, le=1, description="-1 left .. 1 right")
    plugins: tuple[PluginState, ...] = ()
    regions: tuple[Region, ...] = ()


class SessionState(_Part):
    """All there is to a session but its history."""

    sample_rate: int = Field(ge=8000, le=192000, description="Hz")
    tempo_map: tuple[TempoPoint, ...] = Field(min_length=1)
    tracks: tuple[TrackState, ...] = ()
    markers: tuple[MarkerPoint, ...] = Field(default=(), description="in the order of time")

    @property
    def length(self) -> int:
        """Samples from 0 to the end of the last region."""
        return max((region.end for track in self.tracks for region in track.regions), default=0)


class SessionFile(_Part):
    """session.json, and each file of history/ (there without past and future).

    revision: number of the state. label: what made it. past, future: revisions that undo and redo lead to,
    the nearest last.
    """

    version: int = VERSION
    revision: int = 0
    label: str = "new"
    past: tuple[int, ...] = ()
    future: tuple[int, ...] = ()
    session: SessionState


def read_session(folder: Path) -> SessionFile:
    """The session in `folder`. Raises BacklineError where there is none, or one that cannot be read."""
    path = folder / SESSION
    try:
        return _parse(path)
    except FileNotFoundError:
        raise BacklineError(f"{folder} holds no session: it has no {SESSION}.") from None


def write_step(folder: Path, before: SessionFile, state: SessionState, label: str) -> SessionFile:
    """Save a new state as one step that undo takes back. Raises BacklineError where it cannot be written."""
    revision = max(before.revision + 1, _next_revision(folder))
    past = (*before.past, before.revision)[-STEPS_KEPT:]
    after = SessionFile(revision=revision, label=label, past=past, session=state)
    _keep(folder, before)
    _keep(folder, after)
    _write(folder / SESSION, after)
    _forget(folder, {*past, revision})
    return after


def step_back(folder: Path, now: SessionFile) -> SessionFile:
    """Undo: the state before the last step becomes the session's. Raises BacklineError without one."""
    if not now.past:
        raise BacklineError("There is nothing to undo.")
    return _go(folder, now, now.past[-1], past=now.past[:-1], future=(*now.future, now.revision))


def step_forward(folder: Path, now: SessionFile) -> SessionFile:
    """Redo. Raises BacklineError where nothing was undone."""
    if not now.future:
        raise BacklineError("There is nothing to redo.")
    return _go(folder, now, now.future[-1], past=(*now.past, now.revision), future=now.future[:-1])


def write_first(folder: Path, state: SessionState, label: str = "new") -> SessionFile:
    """The file of a session without a past: a new one, or one whose steps so far are nobody's to undo."""
    first = SessionFile(revision=_next_revision(folder), session=state, label=label)
    _write(folder / SESSION, first)
    _forget(folder, set())
    return first


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the session against other processes that change it. Raises BacklineError after a minute."""
    try:
        with filelock.FileLock(folder / LOCK, timeout=LOCK_SECONDS):
            _sweep(folder)
            yield
    except filelock.Timeout:
        raise BacklineError(f"{folder} is being changed by another process.") from None
    except OSError as error:
        raise BacklineError(f"{folder} cannot be written: {error.strerror or error}.") from error


def write_bytes(path: Path, data: bytes) -> None:
    """A file that is complete or not there at all. Raises BacklineError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BacklineError(f"{path} could not be written: {error.strerror or error}.") from error


def _go(
    folder: Path, now: SessionFile, revision: int, *, past: tuple[int, ...], future: tuple[int, ...]
) -> SessionFile:
    try:
        kept = _parse(_history(folder, revision))
    except FileNotFoundError:
        raise BacklineError(f"{_history(folder, revision)} is gone: this step cannot be gone to.") from None
    _keep(folder, now)
    file = kept.model_copy(update={"past": past, "future": future})
    _write(folder / SESSION, file)
    return file


def _history(folder: Path, revision: int) -> Path:
    return folder / HISTORY / f"{revision:06d}.json"


def _next_revision(folder: Path) -> int:
    """A number that no kept state has: one of a step that was cut short must not be taken for another."""
    taken = [int(path.stem) for path in (folder / HISTORY).glob("*.json") if path.stem.isdigit()]
    return max(taken, default=-1) + 1


def _keep(folder: Path, file: SessionFile) -> None:
    path = _history(folder, file.revision)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        _write(path, file.model_copy(update={"past": (), "future": ()}))


def _forget(folder: Path, kept: set[int]) -> None:
    """Steps that neither undo nor redo can reach any more; the wavs they used stay."""
    for path in (folder / HISTORY).glob("*.json"):
        if path.stem.isdigit() and int(path.stem) not in kept:
            path.unlink(missing_ok=True)


def _write(path: Path, file: SessionFile) -> None:
    write_bytes(path, (file.model_dump_json(indent=1) + "\n").encode())


def _parse(path: Path) -> SessionFile:
    """Any version. Raises FileNotFoundError, or BacklineError for what is no session."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        kept = sorted((path.parent / HISTORY).glob("*.json"))
        help_ = f"; put {kept[-1]}, the state after its last step, in its place" if kept else ""
        raise BacklineError(f"{path} cannot be read as JSON{help_}.") from error
    version = values.get("version", 1) if isinstance(values, dict) else 1
    if isinstance(version, int) and version > VERSION:
        raise BacklineError(f"{path} has version {version}, newer than this Backline reads ({VERSION}).")
    try:
        return SessionFile.model_validate(_from_version_1(values) if version == 1 else values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BacklineError(f"{path} is not a valid session: {where}: {first['msg']}.") from error


def _from_version_1(values: Any) -> Any:
    """Version 1 had one tempo, no takes and no history; what does not look like it is returned as it is."""
    if not isinstance(values, dict):
        return values
    session = {key: value for key, value in values.items() if key not in ("version", "tempo")}
    session["tempo_map"] = [{"position": 0, "bpm": values.get("tempo")}]
    if isinstance(session.get("tracks"), list):
        session["tracks"] = [_track_from_version_1(track) for track in session["tracks"]]
    return {"session": session}


def _track_from_version_1(track: Any) -> Any:
    if not isinstance(track, dict) or not isinstance(track.get("regions", []), list):
        return track
    regions = [
        {
            "position": region.get("position"),
            "takes": [{"file": region.get("file"), "name": "take 1", "length": region.get("length")}],
        }
        if isinstance(region, dict)
        else region
        for region in track.get("regions", [])
    ]
    return track | {"regions": regions}


def _sweep(folder: Path) -> None:
    """Remove half-written files that a killed process left; nobody else writes these while it is locked."""
    for path in (*folder.glob(f".{SESSION}.*.part"), *(folder / AUDIO).glob(".*.part")):
        path.unlink(missing_ok=True)
    for path in (folder / HISTORY).glob(".*.part"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be flushed."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
