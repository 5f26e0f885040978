"""The chords heard in a recording, and that `fill` plays by them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from test_engine_tasks import tone, without

from engine import tasks
from engine.audio import Audio
from engine.conditions import parse_chords
from engine.harmony import heard_chords
from engine.manifest import Latent, Manifest, Mel, NoiseSchedule, Sampling, Vocoder
from engine.model import Model
from engine.take import Settings

RATE = 44100
MANIFEST = Manifest(
    name="m",
    licence="CC0-1.0",
    stems=("bass", "drums", "guitar", "piano"),
    mel=Mel(
        sample_rate=RATE, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0, f_max=22050, floor=1e-4
    ),
    latent=Latent(channels=2, frames=4, freq=1, scale_factor=1),
    vocoder=Vocoder(sample_rate=RATE, hop=512, trim=0),
    schedule=NoiseSchedule(start=0.0015, end=0.0195, steps=1000),
    prediction="v",
    sampling=Sampling(steps=2),
    window_frames=48,
)
SECONDS = 2.0
FRAMES = round(SECONDS * RATE / 2048)  # a chord


def chart(names: str, overtones: int = 4) -> np.ndarray:
    """Two seconds of each chord: its tones around middle C and its root two octaves below."""
    time = np.arange(round(SECONDS * RATE)) / RATE
    parts = []
    for bar in parse_chords(names):
        root, tones = int(bar[0][:12].argmax()), np.flatnonzero(bar[0][12:24])
        pitches = [36 + root, *(60 + tones)]
        wave = np.zeros(len(time))
        for pitch in pitches:
            for k in range(1, overtones + 1):
                wave += np.sin(2 * np.pi * k * 440 * 2 ** ((pitch - 69) / 12) * time) / k
        parts.append(wave * np.exp(-time))
    return (0.05 * np.concatenate(parts)).astype(np.float32)


@pytest.mark.parametrize("names", ["C | Am | F | G", "Ebm7 | Ab7 | Dbmaj7 | Gb", "Fm | Bbm | C7 | Fm"])
def test_hears_roots_and_tones(names: str) -> None:
    signal = chart(names)
    heard = heard_chords(signal, MANIFEST, 4 * FRAMES)
    for i, bar in enumerate(parse_chords(names)):
        row = heard[i * FRAMES + FRAMES // 2]
        assert row[:12].argmax() == bar[0][:12].argmax(), names
        tones = bar[0][12:24] > 0
        assert row[12:24][tones].min() > row[12:24][~tones].max()
        assert row[24] == 1
    assert np.allclose(heard[:, :12].sum(1), 1, atol=1e-5), "a probability for every root"


def test_the_gain_does_not_matter() -> None:
    signal = chart("C | Am")
    assert np.allclose(
        heard_chords(signal, MANIFEST, 80), heard_chords(signal * np.float32(1e-3), MANIFEST, 80), atol=1e-3
    )


def test_silence_is_no_chord() -> None:
    signal = np.concatenate([chart("C"), np.zeros(4 * RATE, np.float32)])
    heard = heard_chords(signal, MANIFEST, 120)
    assert heard[: FRAMES - 6, 24].all()
    assert not heard[FRAMES + 6 :].any()
    assert not heard_chords(np.zeros(RATE, np.float32), MANIFEST, 60).any()


def test_a_long_recording_is_heard_like_its_parts() -> None:
    names = " | ".join(["C", "Am", "F", "G"] * 8)
    heard = heard_chords(chart(names), MANIFEST, 32 * FRAMES)  # more than one block of frames
    roots = [heard[i * FRAMES + FRAMES // 2, :12].argmax() for i in range(32)]
    assert roots == [0, 9, 5, 7] * 8


def chords_given(model: Model, monkeypatch: pytest.MonkeyPatch, **job: Any) -> list[np.ndarray | None]:
    """The chords that the UNet is told in each window of a fill."""
    seen: list[np.ndarray | None] = []
    real = model.condition_inputs

    def watched(told: Any, shape: tuple[int, ...]) -> Any:
        seen.append(told.get("chords"))
        return real(told, shape)

    monkeypatch.setattr(model, "condition_inputs", watched)
    tasks.fill(model, job.pop("context", without("piano")), ["piano"], settings=Settings(steps=1), **job)
    return seen


def test_fill_is_told_what_it_hears(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (heard,) = chords_given(tiny_model, monkeypatch)
    assert heard is not None and heard.shape[2] == 25 and heard.any()


def test_given_chords_come_first(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = chords_given(tiny_model, monkeypatch, chords="F#", bpm=120.0)
    assert told is not None and (told[0, :, 6] == 1).all()


def test_drums_have_no_chords(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chords_given(tiny_model, monkeypatch, context={"drums": tone()}) == [None]
    (heard,) = chords_given(tiny_model, monkeypatch, context={"drums": tone()}, other=tone(hz=330))
    assert heard is not None and heard.any()


def test_listening_weighs_what_is_heard(tiny_model: Model) -> None:
    def piano(listening: float | None) -> Audio:
        settings = Settings(steps=2, listening=listening)
        return tasks.fill(tiny_model, without("piano"), ["piano"], settings=settings).stems["piano"]

    plain = piano(None).samples
    assert np.array_equal(piano(1.0).samples, plain), "the bundle's own is 1"
    more, most = piano(2.0).samples, piano(3.0).samples
    assert not np.allclose(more, plain) and not np.allclose(most, more)


def test_a_bundles_listening_is_that_of_fill(tiny_model: Model) -> None:
    """What `generate` is told has no more weight than a user gives it."""
    sampling = tiny_model.manifest.sampling.model_copy(update={"listening": 2.0})
    model = copy.copy(tiny_model)
    model.manifest = tiny_model.manifest.model_copy(update={"sampling": sampling})

    def bass(listening: float | None) -> Audio:
        settings = Settings(steps=2, listening=listening)
        take = tasks.generate(model, seconds=1.0, bpm=120.0, chords="C", settings=settings)
        assert take.record["settings"]["listening"] == (listening or 1.0)
        return take.stems["bass"]

    plain = bass(None).samples
    assert np.array_equal(bass(1.0).samples, plain) and not np.allclose(bass(2.0).samples, plain)
    settings = Settings(steps=2)
    filled = tasks.fill(model, without("piano"), ["piano"], settings=settings)
    assert filled.record["settings"]["listening"] == 2.0
