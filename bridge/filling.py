"""Between a track host and the engine: what the armed tracks hear, and where what they play goes.

A host is any plugin_host.host.TrackHost, an engine whoever plays: the model in this process, or the daemon.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from bridge.charts import MARKERS, chart_of_markers
from bridge.loudness import loudness
from engine.audio import MIN_SECONDS, Audio, is_silent, read, resample, write
from engine.conditions import MAX_BPM, MIN_BPM
from engine.errors import BacklineError, UsageError
from engine.model import Model
from engine.separation import RESIDUAL
from engine.take import Callback, Settings
from engine.tasks import fill, split
from plugin_host.host import Grid, Placement, Span, Track, TrackHost, audible, mix_down

SPREAD = 3.0  # LU that a fill may be louder or quieter than the stems it plays with are on average
MAX_BEATS = 16

Warn = Callable[[str], None]


class RoleUnknown(UsageError):
    """An armed track of which nobody knows what it plays."""

    def __init__(self, track: Track, stems: Sequence[str]) -> None:
        said = "nobody said what it plays" if track.role is None else f"its role is {track.role}"
        super().__init__(f"The track {track.name!r} is armed, but {said}: make it {_one_of(stems)}.")
        self.track = track


class Engine(Protocol):
    """Who plays. `callback(phase, fraction)` raises to cancel; results have the input's rate and length."""

    @property
    def stems(self) -> tuple[str, ...]:
        """The names of the stems it plays."""

    def fill(
        self,
        context: Mapping[str, Audio],
        armed: Sequence[str],
        *,
        other: Audio | None = None,
        bpm: float | None = None,
        beats_per_bar: int = 4,
        first_beat: float = 0.0,
        chords: str | None = None,
        text: str | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Mapping[str, Audio]:
        """The armed stems, as engine.tasks.fill; a tempo the model does not take is left out."""

    def split(self, mix: Audio, *, seed: int = 0, callback: Callback | None = None) -> Mapping[str, Audio]:
        """Every stem and the residual, as engine.separation.split; they sum to the mix."""


@dataclass(frozen=True)
class LocalEngine:
    """engine.tasks in this process. settings: how to sample, but for the seed. warn: told in sentences."""

    model: Model
    settings: Settings
    warn: Warn

    @property
    def stems(self) -> tuple[str, ...]:
        return self.model.manifest.stems

    def fill(
        self,
        context: Mapping[str, Audio],
        armed: Sequence[str],
        *,
        other: Audio | None = None,
        bpm: float | None = None,
        beats_per_bar: int = 4,
        first_beat: float = 0.0,
        chords: str | None = None,
        text: str | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Mapping[str, Audio]:
        if other is not None and context and "mixture_stems" not in self.model.inputs("unet"):
            name = self.model.manifest.name
            self.warn(f"The model {name} hears only {', '.join(self.stems)}: it was not given the rest.")
            other = None
        take = fill(
            self.model,
            context,
            armed,
            other=other,
            bpm=bpm if self.model.supports("grid") or chords is not None else None,
            beats_per_bar=beats_per_bar,
            first_beat=first_beat,
            chords=chords,
            text=text,
            settings=replace(self.settings, seed=seed),
            callback=callback,
        )
        for warning in take.record["warnings"]:
            self.warn(warning)
        return take.stems

    def split(self, mix: Audio, *, seed: int = 0, callback: Callback | None = None) -> Mapping[str, Audio]:
        settings = replace(self.settings, seed=seed)
        return split(self.model, mix, residual=True, settings=settings, callback=callback).stems


def local_engine(model: Model, settings: Settings | None = None, warn: Warn | None = None) -> Engine:
    """The model in this process as an Engine."""
    return LocalEngine(model, settings or Settings(), warn or (lambda sentence: None))


@dataclass(frozen=True)
class Heard:
    """What the armed tracks play along with over `span`, at the session's rate.

    armed: track by stem. context: the sum of the tracks of each other stem. other: the sum of all that is
    no stem (vocals, synths, what nobody named), None without any. grid: None where there is no one tempo.
    """

    span: Span
    armed: dict[str, Track]
    context: dict[str, Audio]
    other: Audio | None
    grid: Grid | None


@dataclass(frozen=True)
class Placed:
    """A region that was made: on which track, from which sample on, its length in samples, and its role."""

    track_id: str
    name: str
    role: str
    position: int
    length: int


def fill_armed(
    host: TrackHost,
    engine: Engine,
    *,
    span: Span | None = None,
    chords: str | None = None,
    text: str | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    warn: Warn | None = None,
) -> list[Placed]:
    """Play the armed tracks of a host along with the others; every fill is a new region.

    span: None takes the host's time selection, or the whole session. chords: a chart whose first bar is the
    first that begins in the span, or MARKERS for that of the host's markers. Raises UsageError where there is
    no one tempo for them, no track is armed, two are armed for one stem, RoleUnknown for one that plays none
    of the engine's stems, and BacklineError where nothing is to be heard. What lay on the tracks stays in the
    session; they are disarmed. `listen` and `place_fill` are the two halves, for callers that wait between.
    """
    heard = listen(host, engine.stems, span)
    grid = heard.grid
    if chords is not None and grid is None:
        raise UsageError("Chords need a tempo, and it changes within this stretch: choose a shorter one.")
    if chords == MARKERS and grid is not None:
        chords = chart_of_markers(host.markers(), heard.span, grid, host.sample_rate)
    played = engine.fill(
        heard.context,
        list(heard.armed),
        other=heard.other,
        bpm=grid.bpm if grid else None,
        beats_per_bar=grid.beats_per_bar if grid else 4,
        first_beat=grid.first_beat if grid else 0.0,
        chords=chords,
        text=text,
        seed=seed,
        callback=callback,
    )
    return place_fill(host, heard, played, warn=warn)


def split_to_tracks(
    host: TrackHost,
    engine: Engine,
    source: str | Path,
    *,
    span: Span | None = None,
    position: int = 0,
    seed: int = 0,
    callback: Callback | None = None,
) -> list[Placed]:
    """Take a track or a file apart: a new track per stem and one for the residual, that sum to it.

    source: a track's id, of which `span` is split (None: all of it, and then the track is muted), as it
    lies there, without plugins, gain and pan; or a Path to a file that is laid down from sample `position`
    on, at the session's rate. Raises BacklineError where it is silent.
    """
    if isinstance(source, Path):
        title, mix = source.stem, resample(read(source), host.sample_rate)
        mute: list[str] = []
    else:
        track = _track(host, source)
        mute = [] if span else [track.id]
        span = _long_enough(span or _everything(host), host)
        title, position = track.name, span.start
        mix = read(host.export([track.id], span, sounding=False)[track.id])
    if is_silent(mix):
        raise BacklineError(f"{title} is silent there: there is nothing to split.")
    stems = engine.split(mix, seed=seed, callback=callback)
    with tempfile.TemporaryDirectory(prefix="backline-") as folder:
        placements = []
        for name, part in stems.items():
            wav = Path(folder) / f"{name}.wav"
            write(wav, part)
            role = "other" if name == RESIDUAL else name
            placements.append(Placement(wav, position, f"{title} {name}", role=role))
        ids = host.place_all(f"split {title}", placements, mute=mute)
    return [
        Placed(track_id, p.name, str(p.role), position, mix.length)
        for track_id, p in zip(ids, placements, strict=True)
    ]


def listen(host: TrackHost, stems: Sequence[str], span: Span | None = None) -> Heard:
    """The first half of `fill_armed`: who plays, and what there is to be heard."""
    tracks = host.tracks()
    armed = _armed(tracks, stems)
    span = _long_enough(span or host.selection or _everything(host), host)
    playing = [track for track in audible(tracks) if not track.armed]
    exported = host.export([track.id for track in playing], span)
    parts: dict[str, list[Audio]] = {}
    for track in playing:
        # A second piano beside an armed one is no context for the model's piano, but it sounds.
        role = track.role if track.role in stems and track.role not in armed else None
        parts.setdefault(role or "", []).append(read(exported[track.id]))
    sums = {role: mix_down(group) for role, group in parts.items()}
    if all(is_silent(part) for part in sums.values()):
        raise BacklineError(
            "There is nothing to play along with: no track that is neither armed nor muted sounds there."
        )
    other = sums.pop("", None)
    if other is not None and is_silent(other):
        other = None
    return Heard(span, armed, sums, other, _usable(host.grid(span)))


def place_fill(
    host: TrackHost, heard: Heard, played: Mapping[str, Audio], *, warn: Warn | None = None
) -> list[Placed]:
    """The second half: what was played goes, at the session's loudness, onto its tracks as one step.

    A track that is gone by now is left out and named to `warn`. Raises BacklineError where all are gone.
    """
    there = {track.id for track in host.tracks()}
    gone = [track.name for track in heard.armed.values() if track.id not in there]
    if len(gone) == len(heard.armed):
        raise BacklineError(f"The track {gone[0]!r} is no longer there: its fill has no place.")
    for name in gone:
        if warn is not None:
            warn(f"The track {name!r} is no longer there: its fill was left out.")
    with tempfile.TemporaryDirectory(prefix="backline-") as folder:
        placements, roles = [], []
        for stem, track in heard.armed.items():
            if track.id in there:
                wav = Path(folder) / f"{stem}.wav"
                write(wav, matched(played[stem], heard))
                placements.append(Placement(wav, heard.span.start, track.name, track.id))
                roles.append(stem)
        ids = [str(placement.track_id) for placement in placements]
        host.place_all(f"fill {', '.join(roles)}", placements, disarm=ids)
    return [
        Placed(str(p.track_id), p.name, role, p.position, heard.span.length)
        for p, role in zip(placements, roles, strict=True)
    ]


def matched(part: Audio, heard: Heard) -> Audio:
    """A fill at the session's loudness: within SPREAD of the mean of the stems it plays with, never clipping.

    Within that it keeps the level the model gave it, which is part of the arrangement.
    """
    parts = [*heard.context.values(), *([heard.other] if heard.other else [])]
    levels = [level for stem in parts if np.isfinite(level := loudness(stem))]
    own = loudness(part)
    gain = 1.0
    if levels and np.isfinite(own):
        around = float(np.mean(levels))
        gain = 10 ** ((np.clip(own, around - SPREAD, around + SPREAD) - own) / 20)
    peak = float(np.abs(part.samples).max())
    gain = min(gain, 1 / peak) if peak > 0 else gain
    return Audio((part.samples * np.float32(gain)).astype(np.float32), part.sample_rate)


def _armed(tracks: Sequence[Track], stems: Sequence[str]) -> dict[str, Track]:
    """Armed track by stem, in the order of the stems."""
    found: dict[str, Track] = {}
    for track in tracks:
        if not track.armed:
            continue
        if track.role is None or track.role not in stems:
            raise RoleUnknown(track, stems)
        if track.role in found:
            raise UsageError(
                f"The tracks {found[track.role].name!r} and {track.name!r} are both armed for {track.role}: "
                "disarm one."
            )
        found[track.role] = track
    if not found:
        raise UsageError("No track is armed: arm the one that is to be played.")
    return {stem: found[stem] for stem in stems if stem in found}


def _everything(host: TrackHost) -> Span:
    if host.length == 0:
        raise BacklineError("The session is empty: there is nothing to listen to.")
    return Span(0, host.length)


def _long_enough(span: Span, host: TrackHost) -> Span:
    if span.length < MIN_SECONDS * host.sample_rate:
        seconds = f"{span.length / host.sample_rate:.2f}"
        raise BacklineError(f"This stretch is only {seconds} s long; at least {MIN_SECONDS:g} s are needed.")
    return span


def _track(host: TrackHost, track_id: str) -> Track:
    for track in host.tracks():
        if track.id == track_id:
            return track
    raise UsageError(f"The session has no track {track_id}.")


def _usable(grid: Grid | None) -> Grid | None:
    """A grid that the engine takes."""
    if grid is None or not MIN_BPM <= grid.bpm <= MAX_BPM or not 1 <= grid.beats_per_bar <= MAX_BEATS:
        return None
    return grid


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
