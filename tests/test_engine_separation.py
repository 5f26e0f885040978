"""Masks: stems that sum to the mix whatever its rate, channels and length, and that separate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_bundle import STEMS, VOCODER_RATE

from engine import tasks, windows
from engine.audio import Audio, resample
from engine.errors import BacklineError, UsageError
from engine.features import log_mel
from engine.manifest import Mel
from engine.model import Model
from engine.samplers import linear_steps
from engine.separation import RESIDUAL, mask_mix, masks_from_mels, stft_size
from engine.take import Settings, Take

FEW = Settings(steps=40, sampler="euler")
MEL = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0, f_max=22050, floor=1e-4
)


def noise(channels: int, length: int, rate: int, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).normal(0, 0.1, (channels, length)).astype(np.float32), rate)


def null_db(take: Take, mix: Audio) -> float:
    """Peak of what is left when the stems are taken from the mix, in dB under the mix's peak."""
    rest = mix.samples - take.mix().samples
    return 20 * np.log10(np.abs(rest).max() / np.abs(mix.samples).max() + 1e-12)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
@pytest.mark.parametrize("channels", [1, 2])
def test_stems_sum_to_the_mix(tiny_model: Model, rate: int, channels: int) -> None:
    mix = noise(channels, rate + 1, rate)
    take = tasks.split(tiny_model, mix)
    assert tuple(take.stems) == STEMS
    for audio in take.stems.values():
        assert audio.sample_rate == rate
        assert audio.samples.shape == mix.samples.shape
        assert audio.samples.dtype == np.float32
    assert null_db(take, mix) < -120


@pytest.mark.parametrize("length", [16000, 16001, 30720, 44444, 100003])
@pytest.mark.parametrize("residual", [False, True])
def test_any_length_sums_to_the_mix(tiny_model: Model, length: int, residual: bool) -> None:
    mix = noise(1, length, 16000)
    take = tasks.split(tiny_model, mix, residual=residual)
    assert tuple(take.stems) == (*STEMS, RESIDUAL) if residual else STEMS
    assert null_db(take, mix) < -120


@pytest.mark.parametrize("method", ["mask", "dirac", "gaussian"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("which", ["tiny_model", "plain_model"])
def test_every_method_on_every_model(
    which: str, method: tasks.Method, residual: bool, request: pytest.FixtureRequest
) -> None:
    mix = noise(2, 50000, 16000)
    take = tasks.split(request.getfixturevalue(which), mix, method=method, residual=residual, settings=FEW)
    assert null_db(take, mix) < -120
    assert take.record["request"]["method"] == method


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_many_channels_at_any_level(tiny_model: Model, channels: int, scale: float) -> None:
    quiet = noise(channels, 24000, 24000)
    mix = Audio(quiet.samples * np.float32(scale), quiet.sample_rate)
    take = tasks.split(tiny_model, mix)
    assert null_db(take, mix) < -120
    assert all(np.isfinite(audio.samples).all() for audio in take.stems.values())


def test_blocks_leave_no_seam(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = noise(2, 60000, 16000)
    whole = tasks.split(tiny_model, mix)
    monkeypatch.setattr("engine.separation.BLOCK", 8 * 513 * 9)
    blocks = tasks.split(tiny_model, mix)
    for name in STEMS:
        assert np.abs(whole.stems[name].samples - blocks.stems[name].samples).max() < 1e-6


@pytest.mark.parametrize("method", ["mask", "dirac"])
@pytest.mark.parametrize("residual", [False, True])
def test_silence_stays_silent(tiny_model: Model, method: tasks.Method, residual: bool) -> None:
    mix = Audio(np.zeros((2, 20000), np.float32), 16000)
    take = tasks.split(tiny_model, mix, method=method, residual=residual, settings=FEW)
    assert not any(audio.samples.any() for audio in take.stems.values())


def test_channels_in_opposite_phase(tiny_model: Model) -> None:
    """Their mean is silence, but they are not."""
    row = noise(1, 40000, 16000).samples[0]
    mix = Audio(np.stack([row, -row]), 16000)
    take = tasks.split(tiny_model, mix)
    single = tasks.split(tiny_model, Audio(row[None], 16000))
    for name in STEMS:
        assert np.abs(take.stems[name].samples[0] - single.stems[name].samples[0]).max() < 1e-4
    assert null_db(take, mix) < -120


def test_raw_is_the_vocoders_audio(tiny_model: Model) -> None:
    mix = noise(2, 30001, 22050)
    take = tasks.split(tiny_model, mix, method="dirac", raw=True, settings=FEW)
    for audio in take.stems.values():
        assert audio.samples.shape == mix.samples.shape
        assert np.array_equal(audio.samples[0], audio.samples[1])
    assert null_db(take, mix) > -60
    assert VOCODER_RATE != 22050


def test_one_evaluation_at_the_highest_step(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real, real_loop = tiny_model.denoiser, windows.sample_on_device

    def check(conditions: dict[str, np.ndarray]) -> None:
        assert (conditions["mixture_mask"] == 1).all()
        assert (conditions["mixture_stems"] == 1).all()

    def denoiser(conditions: dict[str, np.ndarray], **kwargs: bool) -> object:
        check(conditions)
        denoise = real(conditions, **kwargs)

        def watched(x: np.ndarray, t: int) -> np.ndarray:
            steps.append(t)
            return denoise(x, t)

        return watched

    def sample(model: Model, x: np.ndarray, passes: list[dict[str, np.ndarray]], **kwargs: Any) -> np.ndarray:
        check(*passes)
        steps.extend(linear_steps(kwargs["sampler"], model.schedule, kwargs["steps"])[0])
        return real_loop(model, x, passes, **kwargs)

    monkeypatch.setattr(tiny_model, "denoiser", denoiser)
    monkeypatch.setattr(windows, "sample_on_device", sample)
    take = tasks.split(tiny_model, noise(1, 30000, 16000))
    assert steps == [999]
    assert take.record["settings"]["steps"] == 1
    steps.clear()
    tasks.split(tiny_model, noise(1, 30000, 16000), settings=Settings(steps=4))
    assert len(steps) == 4


def test_same_seed_same_bytes(tiny_model: Model) -> None:
    mix = noise(1, 40000, 16000)
    for method in ("mask", "dirac"):
        first, again, other = (
            tasks.split(tiny_model, mix, method=method, settings=Settings(seed=seed, steps=3))
            for seed in (1, 1, 2)
        )
        assert all(np.array_equal(first.stems[n].samples, again.stems[n].samples) for n in STEMS)
        assert not all(np.array_equal(first.stems[n].samples, other.stems[n].samples) for n in STEMS)


def test_masks_are_shares() -> None:
    mels = np.random.default_rng(0).normal(-3, 2, (4, 20, 30)).astype(np.float32)
    masks = masks_from_mels(mels)
    powers = np.exp(2 * mels)
    assert np.allclose(masks, powers / powers.sum(axis=0), atol=1e-6)
    assert np.allclose(masks_from_mels(mels + 200), masks, atol=1e-4)  # no overflow


def test_residual_takes_what_is_not_explained() -> None:
    mels = np.random.default_rng(0).normal(-3, 1, (4, 20, 30)).astype(np.float32)
    mix = 0.5 * np.log(np.exp(2 * mels).sum(axis=0))
    explained = masks_from_mels(mels, mix)
    assert explained.shape == (5, 20, 30)
    assert not explained[4].any()
    louder = masks_from_mels(mels, mix + np.log(10))  # a hundred times the power
    assert np.allclose(louder[4], 0.98, atol=1e-5)
    assert np.allclose(louder.sum(axis=0), 1, atol=1e-6)


def test_true_mels_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceiling of the method: two tones and noise bursts come apart, in stereo and at another rate."""
    rate, length = 48000, 96000
    time = np.arange(length) / rate
    rng = np.random.default_rng(0)
    bursts = rng.normal(0, 0.2, length) * (np.sin(2 * np.pi * 3 * time) > 0.9)
    stems = [0.3 * np.sin(2 * np.pi * 110 * time), 0.3 * np.sin(2 * np.pi * 1760 * time), bursts]
    sources = np.stack([np.stack([stem, 0.5 * stem]) for stem in stems]).astype(np.float32)
    mix = Audio(sources.sum(axis=0), rate)
    mels = [log_mel(resample(Audio(s[:1], rate), MEL.sample_rate).samples, MEL)[0] for s in sources]
    estimates = mask_mix(mix, np.stack(mels), MEL)
    for source, estimate in zip(sources, estimates, strict=True):
        error = ((estimate - source) ** 2).sum()
        assert 10 * np.log10((source**2).sum() / error) > 12


def test_a_rate_beyond_the_mels_range() -> None:
    """A mel that ends at 4 kHz: above it the last band's mask holds."""
    low = Mel(
        sample_rate=8000, n_fft=512, win_length=512, hop=128, n_mels=32, f_min=50, f_max=3900, floor=1e-4
    )
    mels = np.zeros((2, 100, 32), np.float32)
    mels[0, :, -1] = 3  # the last band belongs to the first stem
    mix = noise(1, 48000, 48000)
    first, second = mask_mix(mix, mels, low)
    spectrum = [np.abs(np.fft.rfft(part[0])) for part in (first, second)]
    above = np.fft.rfftfreq(48000, 1 / 48000) > 4500
    assert spectrum[0][above].sum() > 50 * spectrum[1][above].sum()
    assert np.abs(first + second - mix.samples).max() < 1e-6


def test_stft_sizes() -> None:
    assert stft_size(44100) == stft_size(48000) == 2048
    for rate in (8000, 11025, 16000, 22050, 32000, 96000, 192000):
        assert 0.04 <= stft_size(rate) / rate <= 0.066


def test_refusals(tiny_model: Model) -> None:
    mix = noise(1, 20000, 16000)
    with pytest.raises(UsageError, match="no method 'magic'"):
        tasks.split(tiny_model, mix, method="magic")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave out raw or residual"):
        tasks.split(tiny_model, mix, raw=True, residual=True)
    with pytest.raises(BacklineError, match="The mix holds NaN"):
        tasks.split(tiny_model, Audio(mix.samples * np.nan, 16000))
    with pytest.raises(BacklineError, match=r"The mix is only 0\.50 s"):
        tasks.split(tiny_model, Audio(mix.samples[:, :8000], 16000))
    with pytest.raises(BacklineError, match="The mix is empty"):
        tasks.split(tiny_model, Audio(mix.samples[:, :0], 16000))
    with pytest.raises(BacklineError, match="9 channels"):
        tasks.split(tiny_model, Audio(np.zeros((9, 20000), np.float32), 16000))
    with pytest.raises(BacklineError, match="4000 Hz"):
        tasks.split(tiny_model, Audio(mix.samples, 4000))
