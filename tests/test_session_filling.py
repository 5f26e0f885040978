"""Filling and splitting on the session host: what the engine is given, and where its answer goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import noise, samples

from bridge.filling import (
    SPREAD,
    Heard,
    RoleUnknown,
    fill_armed,
    listen,
    local_engine,
    matched,
    place_fill,
    split_to_tracks,
)
from bridge.loudness import loudness
from engine.audio import Audio, write
from engine.errors import BacklineError, Cancelled, UsageError
from engine.model import Model
from plugin_host.host import Span, bounce
from plugin_host.session import SessionHost

STEMS = ("bass", "drums", "guitar", "piano")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(STEMS, size)]
RATE = 44100
SECONDS = 2.0


class Listener:
    """An engine that remembers what it was asked and plays a constant."""

    stems = STEMS

    def __init__(self) -> None:
        self.context: dict[str, Audio] = {}
        self.told: dict[str, Any] = {}

    def fill(self, context: Mapping[str, Audio], armed: Sequence[str], **told: Any) -> dict[str, Audio]:
        self.context, self.told = dict(context), told
        shape = next(iter(context.values())) if context else told["other"]
        rng = np.random.default_rng(len(armed))
        return {
            name: Audio(0.1 * rng.standard_normal(shape.samples.shape).astype(np.float32), shape.sample_rate)
            for name in armed
        }

    def split(self, mix: Audio, **told: Any) -> dict[str, Audio]:
        raise AssertionError("nothing is split here")


def song(
    folder: Path, names: Sequence[str], *, rate: int = RATE, channels: int = 1, gain: float = 1.0
) -> SessionHost:
    """A session with a track for each stem; those of `names` sound."""
    host = SessionHost.create(folder / "song", sample_rate=rate, tempo=120)
    for seed, name in enumerate(STEMS):
        track = host.create_track(name, role=name)
        if name in names:
            part = gain * noise(SECONDS, rate=rate, channels=channels, seed=seed)
            write(folder / f"{name}.wav", Audio(part.T.astype(np.float32), rate))
            host.place(track.id, folder / f"{name}.wav", 0)
    return host


def arm(host: SessionHost, *names: str) -> None:
    for track in host.tracks():
        if track.name in names:
            host.arm(track.id)


def ids(host: SessionHost) -> dict[str, str]:
    return {track.name: track.id for track in host.tracks()}


@pytest.mark.parametrize("armed", SUBSETS, ids="+".join)
def test_every_subset_of_armed_tracks_is_filled(tiny_model: Model, tmp_path: Path, armed: tuple[str]) -> None:
    host = song(tmp_path, STEMS)
    arm(host, *armed)
    before = {name: samples(host.export([track])[track]) for name, track in ids(host).items()}
    placed = fill_armed(host, local_engine(tiny_model), seed=5)
    assert [part.role for part in placed] == [name for name in STEMS if name in armed]
    for name, track in ids(host).items():
        after = samples(host.export([track])[track])
        assert after.shape == before[name].shape
        assert np.array_equal(after, before[name]) == (name not in armed)
        assert after.any()
    assert not any(track.armed for track in host.tracks())


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_fill_has_the_sessions_rate_and_channels_and_starts_at_the_sample(
    tiny_model: Model, tmp_path: Path, rate: int, channels: int
) -> None:
    host = song(tmp_path, ("bass", "drums", "guitar"), rate=rate, channels=channels)
    arm(host, "piano")
    span = Span(12345, 12345 + rate)
    (placed,) = fill_armed(host, local_engine(tiny_model), span=span)
    assert (placed.name, placed.position, placed.length) == ("piano", 12345, rate)
    sound = samples(host.export([placed.track_id])[placed.track_id])
    assert sound.shape[1] == channels
    assert sound[12345 : 12345 + rate].any()
    assert not sound[:12345].any() and not sound[12345 + rate :].any()


def test_the_engine_hears_the_unarmed_unmuted_tracks_by_role(tmp_path: Path) -> None:
    host = song(tmp_path, STEMS)
    second = host.create_track("bass DI", role="bass")
    vocals, strings = host.create_track("vocals", role="other"), host.create_track("strings")
    muted = host.create_track("old drums", role="drums")
    for track in (second, vocals, strings, muted):
        host.place(track.id, tmp_path / "guitar.wav", 0)
    host.place_all("mute", [], mute=[muted.id])
    arm(host, "piano")
    engine = Listener()
    fill_armed(host, engine, text="soft", seed=9)
    guitar, bass = samples(tmp_path / "guitar.wav").T, samples(tmp_path / "bass.wav").T
    assert set(engine.context) == {"bass", "drums", "guitar"}
    np.testing.assert_allclose(engine.context["bass"].samples, bass + guitar, atol=1e-6)
    assert np.array_equal(engine.context["drums"].samples, samples(tmp_path / "drums.wav").T)
    np.testing.assert_allclose(engine.told["other"].samples, 2 * guitar, atol=1e-6)
    assert (engine.told["text"], engine.told["seed"]) == ("soft", 9)


def test_a_second_track_of_the_armed_role_is_other_material(tmp_path: Path) -> None:
    host = song(tmp_path, STEMS)
    first = host.create_track("grand", role="piano")
    host.place(first.id, tmp_path / "piano.wav", 0)
    arm(host, "piano")
    heard = listen(host, STEMS)
    assert "piano" not in heard.context and heard.other is not None
    assert np.array_equal(heard.other.samples, samples(tmp_path / "piano.wav").T)


def test_the_tempo_grid_counts_from_the_start_of_the_span(tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    arm(host, "piano")
    engine = Listener()
    fill_armed(host, engine, span=Span(RATE // 2, RATE // 2 + RATE))
    assert (engine.told["bpm"], engine.told["beats_per_bar"]) == (120, 4)
    assert engine.told["first_beat"] == pytest.approx(1.5)  # bars of 2 s; the span begins at 0.5 s


def test_a_role_that_is_unknown_is_asked_for(tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    host.arm(host.create_track("Audio 7").id)
    with pytest.raises(RoleUnknown, match=r"'Audio 7' is armed, but nobody.*bass, drums, guitar or piano"):
        fill_armed(host, Listener())
    other = song(tmp_path / "two", ("bass",)) if (tmp_path / "two").mkdir() is None else host
    other.arm(other.create_track("choir", role="other").id)
    with pytest.raises(RoleUnknown, match="'choir' is armed, but its role is other"):
        fill_armed(other, Listener())


def test_requests_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    engine = Listener()
    with pytest.raises(UsageError, match="No track is armed"):
        fill_armed(host, engine)
    host.arm(host.create_track("upright", role="piano").id)
    arm(host, "piano")
    before = host.state
    with pytest.raises(UsageError, match="'piano' and 'upright' are both armed for piano"):
        fill_armed(host, engine)
    host.arm(ids(host)["upright"], False)
    host.place_all("mute", [], mute=[ids(host)["bass"]])
    with pytest.raises(BacklineError, match="nothing to play along with"):
        fill_armed(host, engine)
    with pytest.raises(BacklineError, match="is empty"):
        empty = SessionHost.create(tmp_path / "empty", sample_rate=RATE, tempo=120)
        empty.arm(empty.create_track("piano", role="piano").id)
        fill_armed(empty, engine)
    assert [len(track.regions) for track in host.state.tracks] == [
        len(track.regions) for track in before.tracks
    ]


def test_a_cancelled_fill_leaves_the_session_as_it_was(tiny_model: Model, tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    arm(host, "piano")
    before = host.state

    def stop(phase: str, fraction: float) -> None:
        if phase == "sample":
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        fill_armed(host, local_engine(tiny_model), callback=stop)
    assert host.state == before == SessionHost.open(host.folder).state


def test_a_track_that_went_away_meanwhile_costs_only_itself(tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    arm(host, "piano", "guitar")
    heard = listen(host, STEMS)
    played = Listener().fill(heard.context, list(heard.armed))
    host.remove_track(heard.armed["guitar"].id)
    said: list[str] = []
    assert [part.role for part in place_fill(host, heard, played, warn=said.append)] == ["piano"]
    assert len(said) == 1 and "'guitar'" in said[0]
    only = Heard(heard.span, {"guitar": heard.armed["guitar"]}, heard.context, None, None)
    with pytest.raises(BacklineError, match="no longer there"):
        place_fill(host, only, played)


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_the_fill_is_as_loud_as_the_session(tiny_model: Model, tmp_path: Path, gain: float) -> None:
    host = song(tmp_path, ("bass", "drums", "guitar"), gain=gain)
    arm(host, "piano")
    (placed,) = fill_armed(host, local_engine(tiny_model))
    level = loudness(Audio(samples(host.export([placed.track_id])[placed.track_id]).T, RATE))
    around = np.mean(
        [loudness(Audio(samples(tmp_path / f"{name}.wav").T, RATE)) for name in ("bass", "drums", "guitar")]
    )
    assert abs(level - around) < SPREAD + 0.1


def test_a_fill_never_clips(tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",), gain=9.0)
    arm(host, "piano")
    click = np.full((1, RATE), 1e-4, np.float32)
    click[0, 100] = 1.0
    assert np.abs(matched(Audio(click, RATE), listen(host, STEMS)).samples).max() <= 1.0


def test_other_material_that_a_model_cannot_hear_is_said(plain_model: Model, tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    vocals = host.create_track("vocals", role="other")
    host.place(vocals.id, tmp_path / "bass.wav", 0)
    arm(host, "piano")
    said: list[str] = []
    fill_armed(host, local_engine(plain_model, warn=said.append))
    assert any("hears only bass, drums, guitar, piano" in sentence for sentence in said)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_split_track_becomes_five_that_sum_to_it(tiny_model: Model, tmp_path: Path, channels: int) -> None:
    host = song(tmp_path, ("guitar",), channels=channels)
    mix = samples(host.export([ids(host)["guitar"]])[ids(host)["guitar"]])
    placed = split_to_tracks(host, local_engine(tiny_model), ids(host)["guitar"])
    assert [part.role for part in placed] == [*STEMS, "other"]
    assert host.tracks()[2].muted, "the source would sound twice"
    total = bounce(host).samples.T
    assert total.shape == mix.shape
    assert 20 * np.log10(np.abs(total - mix).max() / np.abs(mix).max()) < -120


def test_a_stretch_is_split_in_place_and_a_file_where_it_is_wanted(tiny_model: Model, tmp_path: Path) -> None:
    host = song(tmp_path, ("bass",))
    placed = split_to_tracks(host, local_engine(tiny_model), ids(host)["bass"], span=Span(5000, 5000 + RATE))
    assert {(part.position, part.length) for part in placed} == {(5000, RATE)}
    assert not host.tracks()[0].muted, "the rest of the track must go on sounding"
    write(tmp_path / "mix.wav", Audio(noise(1.5, rate=48000, channels=2).T, 48000))
    placed = split_to_tracks(host, local_engine(tiny_model), tmp_path / "mix.wav", position=777)
    assert {(part.position, part.length) for part in placed} == {(777, round(1.5 * RATE))}
    parts = host.export([part.track_id for part in placed], Span(777, 777 + round(1.5 * RATE)))
    assert samples(parts[placed[0].track_id]).shape == (round(1.5 * RATE), 2)
    host.place_all("silence", [], mute=[])
    with pytest.raises(BacklineError, match="silent there"):
        split_to_tracks(host, local_engine(tiny_model), ids(host)["drums"])


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
def test_loudness_is_that_of_the_standard(rate: int) -> None:
    """EBU Tech 3341: a stereo 1 kHz sine of -23 dBFS has -23 LUFS; quiet stretches are gated away."""
    times = np.arange(10 * rate) / rate
    sine = 10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * times)
    stereo = Audio(np.stack([sine, sine]).astype(np.float32), rate)
    assert loudness(stereo) == pytest.approx(-23.0, abs=0.1)
    quiet = np.concatenate([stereo.samples * 10 ** (-13 / 20), stereo.samples, stereo.samples * 0], axis=1)
    assert loudness(Audio(quiet, rate)) == pytest.approx(-23.0, abs=0.15)
    assert loudness(Audio(np.zeros((1, rate), np.float32), rate)) == -np.inf
