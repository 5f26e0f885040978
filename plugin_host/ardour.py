"""Ardour as a track host: its tracks, its time, bounces out of it and regions into it.

What is recorded is never touched: a fill is a new region, and where something lies already the track gets a
copy of its playlist first. Tracks are known by Ardour's own ids: they may be renamed and moved during a job.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np

from engine.audio import Audio, fit, mono, read, resample, write
from engine.errors import BacklineError, UsageError
from plugin_host.ardour_link import PORT, TALK_SECONDS, WORK_SECONDS, Link, ask, link
from plugin_host.ardour_setup import TRIED
from plugin_host.host import Grid, Marker, Placement, Span, Track
from plugin_host.roles import guess_role

ARM_SECONDS = 5.0


@dataclass(frozen=True)
class ArdourTrack:
    """A track as Ardour shows it. regions: how many lie on it; playlist: the name of the one in use."""

    id: str
    name: str
    audio: bool
    channels: int
    armed: bool
    muted: bool
    soloed: bool
    regions: int
    playlist: str


@dataclass(frozen=True)
class Picked:
    """A region that is selected in the editor, and the track it lies on."""

    region: str
    track: str
    span: Span


@dataclass(frozen=True)
class State:
    """What Ardour shows at one moment; positions in samples at the session's rate.

    session: its path and snapshot. name: what the user calls it. version: "7.3", or "7" where no more
    is known. selection: the selected time. picked: the selected regions. tempo: quarters per minute.
    """

    session: str
    name: str
    version: str
    sample_rate: int
    tempo: float
    length: int
    position: int
    rolling: bool
    recording: bool
    selection: Span | None
    picked: tuple[Picked, ...]
    tracks: tuple[ArdourTrack, ...]


@dataclass(frozen=True)
class ArdourHost:
    """plugin_host.host.TrackHost on the session that was open in Ardour when it was made.

    roles: what tracks play, by name, where the name does not tell. careful: wavs are placed only on tracks
    that are still armed, with the transport stopped. quiet: regions that are muted in the step that places.
    free: the music does not follow the session's tempo, so nobody is told of it.
    """

    way: Link
    session: str
    roles: Mapping[str, str] = field(default_factory=dict)
    careful: bool = False
    quiet: tuple[str, ...] = ()
    free: bool = False
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="backline-ardour-"), repr=False
    )

    @classmethod
    def open(
        cls,
        port: int = PORT,
        *,
        config: Path | None = None,
        roles: Mapping[str, str] | None = None,
        free: bool = False,
    ) -> Self:
        """The session that is open in the Ardour on this OSC port. Raises BacklineError without one."""
        way = link(port, config)
        return cls(way, look(way).session, roles or {}, free=free)

    def look(self) -> State:
        """The state now. Raises SessionChanged where another session is open."""
        return look(self.way, self.session)

    @property
    def sample_rate(self) -> int:
        return self.look().sample_rate

    @property
    def tempo(self) -> float:
        return self.look().tempo

    @property
    def length(self) -> int:
        return self.look().length

    @property
    def selection(self) -> Span | None:
        return self.look().selection

    def grid(self, span: Span) -> Grid | None:
        found = {} if self.free else self._ask("grid", span.start, span.end)
        if not found:
            return None
        beats = found["divisions"] * 4 / found["note"]  # in quarters, which is what bpm counts
        if beats != round(beats):
            return None
        return Grid(found["bpm"], round(beats), (found["bar"] - span.start) / self.sample_rate)

    def markers(self) -> list[Marker]:
        return [Marker(found["position"], found["name"]) for found in self._ask("markers")]

    def tracks(self) -> list[Track]:
        return [
            Track(track.id, track.name, self._role(track.name), track.armed, track.muted, track.soloed)
            for track in self.look().tracks
        ]

    def create_track(self, name: str, role: str | None = None) -> Track:
        made = self._ask("create", name, 2)
        return Track(made["id"], made["name"], role or self._role(made["name"]))

    def arm(self, track_id: str, armed: bool = True) -> None:
        if not self._ask("arm", track_id, armed):
            raise UsageError(f"The session has no track {track_id}.")
        until = time.monotonic() + ARM_SECONDS  # Ardour's audio thread does it, in its own time
        while not any(track.id == track_id and track.armed == armed for track in self.look().tracks):
            if time.monotonic() > until:
                raise BacklineError(f"Ardour did not {'arm' if armed else 'disarm'} the track {track_id}.")
            time.sleep(0.02)

    def export(
        self, track_ids: Iterable[str], span: Span | None = None, *, sounding: bool = True
    ) -> dict[str, Path]:
        """As TrackHost.export, but before the panner, which Ardour leaves out of what it bounces.

        The bounces stay in the session's list of sources until Ardour's own clean-up takes them out.
        """
        state = self.look()
        span = span or Span(0, max(1, state.length))
        known = {track.id: track for track in state.tracks}
        paths = {}
        for track_id in track_ids:
            track = known.get(track_id)
            name = track.name if track else track_id
            found = self._ask("bounce", track_id, span.start, span.end, sounding, f"backline heard {name}")
            if track is None or "gone" in found:
                raise BacklineError(f"The track {name!r} is no longer in the session.")
            parts = [_first(read(path).samples, span.length) for path in found["files"]]
            silence = np.zeros((max(1, track.channels), span.length), np.float32)
            paths[track_id] = self._path(name)
            write(paths[track_id], Audio(np.stack(parts) if parts else silence, state.sample_rate))
        return paths

    def place(self, track_id: str, wav: Path, position: int) -> None:
        name = next((track.name for track in self.look().tracks if track.id == track_id), track_id)
        self.place_all("place a wav", [Placement(wav, position, name, track_id)])

    def place_all(
        self,
        label: str,
        placements: Sequence[Placement],
        *,
        disarm: Iterable[str] = (),
        mute: Iterable[str] = (),
    ) -> list[str]:
        """As TrackHost.place_all. Undo takes the regions back; new tracks stay, empty: Ardour undoes none."""
        state = self.look()
        known = {track.id: track for track in state.tracks}
        items: list[dict[str, Any]] = []
        for placement in placements:
            track = known.get(placement.track_id or "")
            if placement.track_id and track is None:
                raise BacklineError(f"The track {placement.name!r} is no longer in the session.")
            audio = resample(read(placement.wav), state.sample_rate)
            if track is not None and track.channels == 1:
                audio = Audio(mono(audio)[None], audio.sample_rate)
            path = self._path(placement.name)
            write(path, audio)
            item = {"path": str(path), "position": placement.position, "length": audio.length}
            where = {"track": track.id} if track else {"channels": audio.channels}
            items.append(item | where | {"name": placement.name})
        answer = self._ask(
            "place", f"Backline: {label}", items, list(disarm), list(mute), self.quiet, self.careful
        )
        if "placed" not in answer:
            raise _not_placed(answer, placements)
        for item, made in zip(items, answer["placed"], strict=True):
            if (made["position"], made["length"]) != (item["position"], item["length"]):
                raise BacklineError(
                    f"Ardour put {item['name']!r} at sample {made['position']}: undo that step."
                )
        return [made["track"] for made in answer["placed"]]

    def tidy(self) -> None:
        """Remove the wavs of all exports so far."""
        for path in Path(self.folder.name).iterdir():
            path.unlink()

    def _ask(self, call: str, *arguments: Any) -> Any:
        work = WORK_SECONDS if call in ("bounce", "place") else TALK_SECONDS
        return ask(self.way, call, *arguments, session=self.session, work=work)

    def _role(self, name: str) -> str | None:
        return self.roles.get(name) or guess_role(name)

    def _path(self, name: str) -> Path:
        # Ardour names its source after the file, and asks in a dialog where it has one of that name.
        short = re.sub(r"[^ \w-]+", "_", name)[:60]
        short = re.sub(r"[^ \w-]+", "_", name)[:60]
        return Path(self.folder.name) / f"{short} {uuid4().hex[:8]}.wav"


def look(way: Link, session: str | None = None, *, pickup: float | None = None) -> State:
    """What the Ardour at the other end shows now; `session` as in ardour_link.ask."""
    found = ask(way, "look", session=session, **({} if pickup is None else {"pickup": pickup}))
    selected = found.get("from"), found.get("to")
    picked = (
        Picked(region["region"], region["track"], Span(region["first"], region["last"]))
        for region in found["regions"]
    )
    return State(
        session=found["session"],
        name=found["name"],
        version=_version(found["program"], found["config"]),
        sample_rate=round(found["rate"]),
        tempo=found["tempo"],
        length=found["length"],
        position=found["position"],
        rolling=found["rolling"],
        recording=found["recording"],
        selection=Span(*selected) if None not in selected and selected[0] < selected[1] else None,
        picked=tuple(picked),
        tracks=tuple(ArdourTrack(**track) for track in found["tracks"]),
    )


def untried(state: State) -> str | None:
    """A sentence where this version of Ardour is none that Backline was tried with."""
    if state.version == TRIED:
        return None
    version = f"Ardour {state.version}" if state.version else "this one, whose version is not known"
    return f"Backline was tried with Ardour {TRIED}, not with {version}."


def _version(program: str, config: str) -> str:
    """From the program's path ("/usr/lib/ardour7/ardour-7.3.0"), or its configuration's name ("ardour7")."""
    match = re.search(r"ardour-(\d+\.\d+)", program, re.IGNORECASE) or re.search(r"(\d+)$", config)
    return match[1] if match else ""


def _first(samples: np.ndarray, length: int) -> np.ndarray:
    return fit(samples[0], length)


def _not_placed(answer: Mapping[str, Any], placements: Sequence[Placement]) -> BacklineError:
    why = {
        "missing": "Ardour did not take the wav for {name!r}: it says nothing of why.",
        "gone": "The track {name!r} is no longer in the session.",
        "midi": "The track {name!r} is a MIDI track: arm an audio track.",
        "disarmed": "The track {name!r} is no longer armed.",
        "recording": "Ardour is recording: nothing was placed.",
        "rolling": "Ardour's transport rolls: nothing was placed.",
    }
    reason, which = next(iter(answer.items()))
    name = placements[which - 1].name if reason in ("missing", "gone", "midi", "disarmed") else ""
    return BacklineError(why[reason].format(name=name))
