"""Windows of bands: stored mels, mixing without audio, levels, and the conditions of a window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_songs import FRAMES, RENDERS, save, song

from engine.conditions import chords_condition, grid_condition, parse_chords
from engine.features import log_mel as engine_log_mel
from engine.features import mel_level
from engine.manifest import Chords, Grid, Latent, Manifest, NoiseSchedule, Sampling, Vocoder
from training import conditions, dataset
from training.dataset import MIXTURE_DB, Windows, draw, load_songs, mix, mix_power
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES, QUANTUM, WINDOW, log_mel, to_bytes
from training.stems import STEMS


@pytest.mark.parametrize("samples", [4096, 44100, 30001])
def test_torchs_log_mel_is_the_engines(samples: int) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, (2, samples)).astype(np.float32)
    audio[1, samples // 2 :] = 0
    ours, engines = log_mel(torch.from_numpy(audio)).numpy(), engine_log_mel(audio, GEOMETRY)
    assert ours.shape == engines.shape == (2, samples // GEOMETRY.hop, GEOMETRY.n_mels)
    assert np.abs(ours - engines).max() < 1e-4


def test_bytes_keep_log_mels_to_half_a_step() -> None:
    mel = torch.linspace(FLOOR, FLOOR + 255 * QUANTUM, 10_001)
    stored = to_bytes(mel)
    assert stored.dtype == torch.uint8 and int(stored[0]) == 0 and int(stored[-1]) == 255
    assert (stored * QUANTUM + FLOOR - mel).abs().max() <= QUANTUM / 2 + 1e-5
    assert to_bytes(torch.tensor([FLOOR - 3, 50.0])).tolist() == [0, 255]


def test_drawn_stems_are_the_stored_ones_at_one_gain() -> None:
    songs = [song(1), song(2)]
    windows = draw(songs, 5, np.random.default_rng(0), augment=False, frames=64)
    assert windows.mels.shape == (5, len(STEMS), 64, GEOMETRY.n_mels)
    assert windows.mixture.shape == (5, 64, GEOMETRY.n_mels)
    for b, (source, start) in enumerate(zip(windows.songs, windows.starts, strict=True)):
        parts = [source.mels[i, r, start : start + 64] for i, r in enumerate(windows.renders[b])]
        stored = torch.from_numpy(np.stack(parts))
        difference = (windows.mels[b] - (stored * QUANTUM + FLOOR))[stored > 60]
        assert difference.std() < 1e-4, "one gain for all stems and bands"
        assert (windows.mels[b][stored == 0] == FLOOR).all()


def test_mixtures_are_at_the_training_level() -> None:
    plain = draw([song(1)], 6, np.random.default_rng(0), augment=False)
    level = 10 * torch.log10((2 * plain.mixture).exp().mean((1, 2)))
    assert torch.allclose(level, torch.tensor(MIXTURE_DB), atol=0.01)
    augmented = draw([song(1)], 48, np.random.default_rng(0), frames=64)
    level = 10 * torch.log10((2 * augmented.mixture).exp().mean((1, 2)))
    assert abs(float(level.mean()) - MIXTURE_DB) < 2 and 1.5 < float(level.std()) < 5


def test_the_training_level_is_the_engines() -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, (1, 44100)).astype(np.float32)
    level = 10 * torch.log10((2 * log_mel(torch.from_numpy(audio))).exp().mean())
    assert float(level) == pytest.approx(mel_level(audio, GEOMETRY), abs=0.01)


def test_augmentation_silences_stems_but_never_all_and_gains_are_smooth() -> None:
    rng = np.random.default_rng(0)
    gains = torch.cat([dataset._random_gains(64, rng) for _ in range(8)])
    silent = (gains == 0).all(-1)[..., 0]
    assert 0.05 < float(silent.float().mean()) < 0.11 and not silent.all(1).any()
    heard = 20 * gains[~silent].log10()
    assert heard.diff(dim=-1).abs().max() < 8  # dB from one mel band to the next
    assert 3 < heard.mean(-1).std() < 8


def test_draws_repeat_with_the_seed() -> None:
    songs = [song(1), song(2)]
    first, second = (draw(songs, 3, np.random.default_rng(5), frames=64) for _ in range(2))
    assert torch.equal(first.mels, second.mels) and torch.equal(first.mixture, second.mixture)
    other = draw(songs, 3, np.random.default_rng(6), frames=64)
    assert not torch.equal(first.mels, other.mels)


def test_powers_add_up_on_average() -> None:
    magnitude = torch.tensor([1.0, 2.0, 0.5, 3.0])[None, :, None, None].expand(4, 4, 200, GEOMETRY.n_mels)
    power = mix_power(magnitude, np.random.default_rng(0))
    assert power.shape == (4, 200, GEOMETRY.n_mels)
    assert float(power.mean()) == pytest.approx(1 + 4 + 0.25 + 9, rel=0.01)
    per_band = power.mean((0, 1))
    assert per_band.min() > 12.5 and per_band.max() < 16
    # narrow bands see the whole interference, wide ones average it out
    assert power[..., 0].std() > 3 * power[..., -1].std()


def test_equal_stems_interfere_within_what_their_phases_allow() -> None:
    magnitude = torch.ones(8, 2, 400, GEOMETRY.n_mels)
    power = mix_power(magnitude, np.random.default_rng(0))
    lowest = 2 / np.sqrt(2 / 1.5)  # the lowest band has two bins
    assert float(power[..., 0].min()) == pytest.approx(2 - lowest, abs=0.01)
    assert float(power[..., 0].max()) == pytest.approx(2 + lowest, abs=0.01)
    assert power.min() > 0 and power.max() < 4


def test_silent_stems_add_nothing() -> None:
    rng = np.random.default_rng(0)
    magnitude = torch.zeros(2, 4, 50, GEOMETRY.n_mels)
    magnitude[:, 2] = torch.rand(2, 50, GEOMETRY.n_mels) + 0.1
    assert torch.allclose(mix_power(magnitude, rng), magnitude[:, 2] ** 2, rtol=1e-4)
    mels = torch.where(magnitude > 0, magnitude.clamp_min(1e-9).log(), FLOOR)
    assert torch.allclose(mix(mels, rng), mels[:, 2], atol=1e-4)
    assert (mix(torch.full((1, 4, 50, GEOMETRY.n_mels), FLOOR), rng) == FLOOR).all()


def test_songs_are_loaded_in_order_when_they_are_finished_and_long_enough(tmp_path: Path) -> None:
    for number in (7, 3):
        save(tmp_path, number, song(number, bpm=60.0 + number))
    save(tmp_path, 5, song(5, frames=dataset.FRAMES - 1))
    np.save(tmp_path / "000009.tmp.npy", np.zeros(3))
    np.save(tmp_path / "000003.audio.npy", np.zeros(3))
    songs = load_songs(tmp_path)
    assert [s.labels["bpm"] for s in songs] == [63.0, 67.0]
    assert songs[0].mels.shape == (len(STEMS), RENDERS, FRAMES, GEOMETRY.n_mels)
    played = np.concatenate([songs[0].labels["onsets"][stem] for stem in STEMS])
    assert np.isin((played * 20).astype(int), np.round(songs[0].onsets * 20).astype(int)).all()
    with pytest.raises(FileNotFoundError, match=r"training\.render"):
        load_songs(tmp_path / "nowhere")


def manifest() -> Manifest:
    return Manifest(
        name="layout",
        licence="CC0-1.0",
        stems=STEMS,
        mel=GEOMETRY,
        latent=Latent(channels=64, frames=LATENT_FRAMES, freq=1, scale_factor=1.0),
        vocoder=Vocoder(sample_rate=GEOMETRY.sample_rate, hop=GEOMETRY.hop, trim=0),
        schedule=NoiseSchedule(start=0.0015, end=0.0195, steps=1000),
        prediction="v",
        sampling=Sampling(steps=20),
        window_frames=WINDOW,
        capabilities=("grid", "chords"),
        grid=Grid(),
        chords=Chords(),
    )


@pytest.mark.parametrize("seed", range(6))
def test_conditions_are_laid_out_as_the_engine_lays_them_out(seed: int) -> None:
    made = song(seed)
    start = int(np.random.default_rng(seed).integers(FRAMES - dataset.FRAMES))
    mels = torch.zeros(1, len(STEMS), dataset.FRAMES, GEOMETRY.n_mels)
    windows = Windows(mels, mels[:, 0], [made], [start], np.zeros((1, len(STEMS)), int))
    bpm, per_bar = made.labels["bpm"], int(made.labels["beats_per_bar"])
    first_beat = -start * GEOMETRY.hop / GEOMETRY.sample_rate  # the song began before the window
    grid = grid_condition(manifest(), 0, WINDOW, bpm, per_bar, first_beat)
    assert np.abs(conditions.grid(windows, WINDOW).numpy() - grid).max() < 1e-4
    chart = parse_chords(" | ".join(" ".join(bar) for bar in made.labels["chart"]))
    chords = chords_condition(manifest(), 0, WINDOW, chart, bpm, per_bar, first_beat)
    assert np.array_equal(conditions.chords(windows, WINDOW).numpy(), chords)


def test_a_window_from_the_songs_start_needs_no_offset() -> None:
    made = song(0, beats_per_bar=4.0, bpm=100.0)
    windows = Windows(torch.zeros(0), torch.zeros(0), [made], [0], np.zeros((1, 4), int))
    assert (
        np.abs(conditions.grid(windows, 50).numpy() - grid_condition(manifest(), 0, 50, 100.0)).max() < 1e-4
    )


def test_tones_are_the_pitch_classes_of_the_notes_that_sound() -> None:
    frame = LATENT_FRAMES * GEOMETRY.hop / GEOMETRY.sample_rate
    notes = {"bass": [[0.0, 10 * frame, 40]], "guitar": [[4 * frame, 2 * frame, 52], [0, 1, 57]], "piano": []}
    start = 2 * LATENT_FRAMES
    mels = torch.zeros(1, len(STEMS), 12 * LATENT_FRAMES, GEOMETRY.n_mels)
    windows = Windows(mels, mels[:, 0], [song(0, notes=notes)], [start], np.zeros((1, len(STEMS)), int))
    found = conditions.tones(windows, 12)
    assert found.shape == (1, len(STEMS), 12, 12)
    e, a = 4, 9
    assert found[0, 0, :, e].tolist() == [1] * 8 + [0] * 4, "the bass began before the window"
    assert found[0, 2, :, e].nonzero().flatten().tolist() == [2, 3], "the first of two guitar notes"
    assert found[0, 2, :, a].all() and found.sum() == 8 + 2 + 12
    mels[:, 2] = FLOOR  # a guitar that was made silent
    assert conditions.tones(windows, 12).sum() == 8
