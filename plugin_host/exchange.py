"""Sessions as files that other DAWs open: what DAWproject and RPP have in common, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.audio import Audio
from engine.errors import BacklineError
from plugin_host.session_file import LONGEST_NAME, MarkerPoint, PluginState, Region, TempoPoint, TrackState

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Segment:
    """A stretch of a region that is heard: `region` from its sample `offset` on, at `position`, for `length`.

    DAWs mix clips that overlap or do not take them at all, where here the later region covers the earlier.
    """

    region: Region
    position: int
    offset: int
    length: int


@dataclass
class ReadTake:
    """A take as another program's file tells it: its name and where the audio is, as libsndfile opens it."""

    name: str
    load: Callable[[], Audio]


@dataclass
class ReadItem:
    """Takes that lie at `position` and are heard from `offset` on for `length`, all in seconds."""

    position: float
    offset: float
    length: float
    takes: list[ReadTake]
    chosen: int = 0


@dataclass
class ReadTrack:
    """A track as another program's file tells it."""

    name: str
    role: str | None = None
    armed: bool = False
    muted: bool = False
    soloed: bool = False
    gain_db: float = 0.0
    pan: float = 0.0
    plugins: list[tuple[PluginState, bytes | None]] = field(default_factory=list)
    items: list[ReadItem] = field(default_factory=list)


@dataclass
class ReadProject:
    """A project as another program's file tells it.

    tempo: (seconds, bpm, numerator, denominator) in order of time, the first at 0. markers: (seconds, name).
    """

    sample_rate: int
    tempo: list[tuple[float, float, int, int]]
    tracks: list[ReadTrack]
    markers: list[tuple[float, str]] = field(default_factory=list)


def segments(track: TrackState) -> list[Segment]:
    """What is heard of a track's regions, without overlaps, in the order of time."""
    heard: list[Segment] = []
    for number, region in enumerate(track.regions):
        pieces = [(region.position, region.end)]
        for later in track.regions[number + 1 :]:
            pieces = [
                part
                for start, end in pieces
                for part in ((start, min(end, later.position)), (max(start, later.end), end))
                if part[0] < part[1]
            ]
        heard += [Segment(region, start, start - region.position, end - start) for start, end in pieces]
    return sorted(heard, key=lambda segment: segment.position)


def tempo_points(project: ReadProject) -> list[TempoPoint]:
    """Its tempo map in samples. A first point that says what the second does too is left out."""
    points = {
        round(seconds * project.sample_rate): TempoPoint(
            position=round(seconds * project.sample_rate),
            bpm=bpm,
            numerator=numerator,
            denominator=denominator,
        )
        for seconds, bpm, numerator, denominator in project.tempo
    }
    ordered = [points[position] for position in sorted(points)]
    if len(ordered) > 1 and ordered[0].model_copy(update={"position": ordered[1].position}) == ordered[1]:
        del ordered[0]
    return ordered


def marker_points(project: ReadProject) -> list[MarkerPoint]:
    """Its markers that have a name, in samples."""
    return [
        MarkerPoint(position=round(seconds * project.sample_rate), name=name.strip()[:LONGEST_NAME])
        for seconds, name in project.markers
        if seconds >= 0 and name.strip()
    ]


def cut(audio: Audio, offset: float, length: float, rate: int, name: str) -> Audio:
    """The stretch of a source that an item plays, in the project's samples. Raises BacklineError."""
    start, count = round(offset * rate), round(length * rate)
    if start >= audio.length:
        raise BacklineError(f"{name} is shorter than the project says.")
    return Audio(np.ascontiguousarray(audio.samples[:, start : start + count]), audio.sample_rate)
