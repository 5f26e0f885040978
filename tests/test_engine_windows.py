"""Long takes: what one window hands to the next, and joins that cannot be heard."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tiny_bundle import BANDS, CHANNELS, FRAMES, HOP, RATE, STEMS, WINDOW

from engine.features import log_mel
from engine.listening import gain_to, signal_level, window_mel
from engine.model import Model
from engine.take import Settings, resolve
from engine.windows import (
    blend,
    decode_timeline,
    nothing_known,
    sample_timeline,
    timeline_frames,
    vocode_timeline,
    window_starts,
)


def quiet(_: float) -> None:
    """No progress."""


@pytest.mark.parametrize("total", [1, 12, 48, 49, 84, 85, 100, 1000])
@pytest.mark.parametrize(("window", "overlap"), [(48, 12), (48, 6), (7, 3)])
def test_windows_cover_everything(total: int, window: int, overlap: int) -> None:
    window = min(window, total)
    overlap = min(overlap, window - 1)
    starts = window_starts(total, window, overlap)
    assert starts[0] == 0
    assert starts[-1] + window == total
    assert all(0 < b - a <= window - overlap for a, b in pairwise(starts))


def test_timeline_lengths(tiny_model: Model, plain_model: Model) -> None:
    frame = FRAMES * HOP / RATE
    assert timeline_frames(tiny_model.manifest, WINDOW * frame) == WINDOW
    assert timeline_frames(tiny_model.manifest, WINDOW * frame + 1e-4) == WINDOW + 1
    assert timeline_frames(tiny_model.manifest, 1.0) == 32  # 25 frames, rounded up to a multiple of 8
    assert timeline_frames(tiny_model.manifest, 0.1) == 16  # a quarter of a window, rounded up
    assert timeline_frames(plain_model.manifest, 1.0) == WINDOW


def test_decoding_and_vocoding_in_blocks_changes_nothing(tiny_model: Model) -> None:
    latents = np.random.default_rng(0).normal(1, 0.5, (3, CHANNELS, 3 * WINDOW + 5, 1)).astype(np.float32)
    mels = decode_timeline(tiny_model, latents, quiet)
    assert mels.shape == (3, latents.shape[2] * FRAMES, BANDS)
    assert np.abs(mels - tiny_model.decode(latents)).max() < 1e-5
    audio = vocode_timeline(tiny_model, mels, quiet)
    whole = tiny_model.vocode(mels)
    assert audio.shape == whole.shape
    assert np.abs(audio - whole).max() < 1e-5 * np.abs(whole).max()


def test_blend_of_the_same_signal_is_the_signal() -> None:
    signal = np.random.default_rng(0).normal(0, 1, (2, 100)).astype(np.float32)
    target = np.zeros((2, 100), np.float32)
    blend(target, signal[:, :60], 0, 0)
    blend(target, signal[:, 40:], 40, 20)
    assert np.abs(target - signal).max() < 1e-6


def test_blend_moves_steadily_from_one_to_the_other() -> None:
    target = np.zeros((1, 100), np.float32)
    blend(target, np.zeros((1, 60), np.float32), 0, 0)
    blend(target, np.ones((1, 60), np.float32), 40, 20)
    assert (np.diff(target[0, 40:60]) > 0).all()
    assert np.diff(target[0]).max() < 0.06


@pytest.mark.parametrize("which", ["tiny_model", "plain_model"])
def test_a_window_knows_the_end_of_the_one_before(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Model = request.getfixturevalue(which)
    real = model.denoiser
    heard: list[dict[str, np.ndarray]] = []
    inputs: list[list[tuple[np.ndarray, int]]] = []

    def denoiser(conditions: Any, **kwargs: Any) -> Any:
        heard.append(dict(conditions))
        inputs.append([])
        denoise, seen = real(conditions, **kwargs), inputs[-1]

        def watched(x: np.ndarray, t: int) -> np.ndarray:
            seen.append((x.copy(), t))
            return denoise(x, t)

        return watched

    monkeypatch.setattr(model, "denoiser", denoiser)
    total = 2 * WINDOW
    settings = resolve(Settings(steps=3), model.manifest)
    timeline = sample_timeline(
        model,
        total,
        settings,
        known=nothing_known(model),
        conditions=lambda start, n: {},
        wrap=lambda denoise, start, window: denoise,  # in numpy, where it can be watched
        report=quiet,
    )
    starts = window_starts(total, WINDOW, WINDOW // 4)
    assert len(heard) == len(starts) == 3
    done = WINDOW
    for number, start in enumerate(starts[1:], 1):
        shared = done - start
        past = timeline[:, :, start:done]
        if model.supports("context"):
            assert np.allclose(heard[number]["context"][0, :, :, :shared], past, atol=1e-6)
            assert heard[number]["context_mask"][0, :, :shared].all()
            assert not heard[number]["context_mask"][0, :, shared:].any()
        # Inpainting: the model is shown the past at the level of the step, with one noise.
        noises = [
            (x[0, :, :, :shared] - model.schedule.alpha(t) * past) / model.schedule.noise(t)
            for x, t in inputs[number]
            if t > 0
        ]
        assert all(np.abs(noise - noises[0]).max() < 1e-3 for noise in noises)
        done = start + WINDOW


def test_sampling_reports_each_step(tiny_model: Model) -> None:
    seen: list[float] = []
    settings = resolve(Settings(steps=4), tiny_model.manifest)
    sample_timeline(
        tiny_model,
        2 * WINDOW,
        settings,
        known=nothing_known(tiny_model),
        conditions=lambda start, n: {},
        report=seen.append,
    )
    assert len(seen) == 3 * (4 + 1)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_window_mels_are_the_whole_files(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    signal = np.random.default_rng(0).normal(0, 0.1, 100 * FRAMES * HOP).astype(np.float32)
    whole = log_mel(signal[None], manifest.mel)[0]
    for start, frames in ((0, 100), (0, 48), (30, 48), (52, 48)):
        expected = whole[start * FRAMES : (start + frames) * FRAMES]
        assert np.abs(window_mel(signal, manifest, start, frames) - expected).max() < 1e-4
    past = window_mel(signal, manifest, 80, 48)
    assert past.shape == (48 * FRAMES, BANDS)
    assert np.allclose(past[24 * FRAMES :], np.log(manifest.mel.floor))


def test_level_ignores_what_is_far_under_the_loudest(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    size = manifest.window_samples
    loud = np.random.default_rng(0).normal(0, 0.1, 3 * size).astype(np.float32)
    level = signal_level(loud, manifest)
    half = loud.copy()
    half[size:] = 0
    assert signal_level(half, manifest) == pytest.approx(level, abs=0.3)
    assert signal_level(loud * 0.1, manifest) == pytest.approx(level - 20, abs=1e-2)
    assert signal_level(0 * loud, manifest) == -np.inf
    assert gain_to(-20, -40) == pytest.approx(10)
    assert gain_to(-20, -np.inf) == 1


def test_noise_depends_on_seed_and_window(tiny_model: Model) -> None:
    def sampled(seed: int) -> np.ndarray:
        settings = resolve(Settings(seed=seed, steps=1), tiny_model.manifest)
        return sample_timeline(
            tiny_model,
            2 * WINDOW,
            settings,
            known=nothing_known(tiny_model),
            conditions=lambda start, n: {},
            report=quiet,
        )

    first = sampled(1)
    assert first.shape == (len(STEMS), CHANNELS, 2 * WINDOW, 1)
    assert np.array_equal(first, sampled(1))
    assert not np.array_equal(first, sampled(2))
    assert not np.allclose(first[:, :, :WINDOW], first[:, :, WINDOW:])
