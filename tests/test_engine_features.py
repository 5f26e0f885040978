"""Spectrograms against a direct transform, the published reference and exact reconstruction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import features
from engine.manifest import LowBands, Mel

REFERENCE = Mel(
    sample_rate=16000, n_fft=1024, win_length=1024, hop=160, n_mels=64, f_min=0, f_max=8000, floor=1e-5
)
WIDE = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0, f_max=22050, floor=1e-4
)
LOW = WIDE.model_copy(update={"n_mels": 152, "low": LowBands(n_fft=4096, bands=40, f_max=480.0)})
ROOT = Path(__file__).parents[1]
PARITY = next((p for p in (ROOT / "shared/parity", ROOT.parent / "shared/parity") if p.is_dir()), None)


def noise(rows: int, samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (rows, samples)).astype(np.float32)


@pytest.mark.parametrize(("n_fft", "hop", "win"), [(512, 128, 512), (2048, 512, 2048), (1024, 256, 800)])
def test_istft_is_exact(n_fft: int, hop: int, win: int) -> None:
    audio = noise(2, 10 * n_fft)
    padded = np.pad(audio, ((0, 0), (n_fft, n_fft)))
    back = features.istft(features.stft(padded, n_fft, hop, win_length=win), n_fft, hop, win_length=win)
    assert np.abs(back[:, n_fft : n_fft + audio.shape[1]] - audio).max() < 1e-6


@pytest.mark.parametrize("mel", [REFERENCE, WIDE])
def test_log_mel_is_the_direct_transform(mel: Mel) -> None:
    audio = noise(1, 20 * mel.hop)
    padded = np.pad(audio[0].astype(np.float64), mel.n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(mel.n_fft) / mel.n_fft)
    bins = np.arange(mel.n_fft // 2 + 1)
    basis = np.exp(-2j * np.pi * np.outer(np.arange(mel.n_fft), bins) / mel.n_fft)
    expected = []
    for frame in range(20):
        spectrum = np.abs((padded[frame * mel.hop :][: mel.n_fft] * window) @ basis)
        expected.append(np.log(np.maximum(spectrum @ features.mel_filterbank(mel), mel.floor)))
    assert np.abs(features.log_mel(audio, mel)[0] - np.array(expected)).max() < 1e-4


def test_low_bands_are_the_direct_transform_of_a_longer_window() -> None:
    audio = noise(1, 20 * LOW.hop)
    padded = np.pad(audio[0].astype(np.float64), 2048, mode="reflect")
    window = np.hanning(4097)[:-1]
    frames = np.stack([padded[i * LOW.hop :][:4096] * window for i in range(20)])
    expected = np.abs(np.fft.rfft(frames)) @ features.low_filterbank(LOW)
    found = features.mel_magnitude(audio, LOW)[0]
    assert found.shape == (20, 152)
    assert np.abs(found[:, :40] / expected - 1).max() < 1e-3
    inner = features.mel_magnitude(np.pad(audio, ((0, 0), (2048, 2048)), mode="reflect"), LOW, padded=True)[0]
    assert np.allclose(found, inner), "the margin is that of the longer window"


def test_low_bands_tell_neighbouring_harmonics_apart_and_keep_their_level() -> None:
    time = np.arange(44100) / 44100
    pair = (np.sin(2 * np.pi * 82.4 * time) + np.sin(2 * np.pi * 123.6 * time)).astype(np.float32)[None]
    edges = features.mel_edges(LOW)[1:-1]
    wobble = {
        name: np.ptp(features.log_mel(pair, mel)[0, 10:-10, features.mel_edges(mel)[1:-1].searchsorted(82)])
        for name, mel in (("one window", WIDE), ("low bands", LOW))
    }
    assert 4 * wobble["low bands"] < wobble["one window"]
    for hz in (100.0, 300.0, 470.0, 490.0, 700.0):
        tone = np.sin(2 * np.pi * hz * time).astype(np.float32)[None]
        power = np.square(features.mel_magnitude(tone, LOW)[0, 40]).sum()
        assert 10 * abs(np.log10(power / 440)) < 1.5, "dB, whatever the window"
    assert (np.diff(edges) > 0).all()


def test_a_geometry_without_low_bands_has_no_filters_for_them() -> None:
    with pytest.raises(ValueError, match="no low bands"):
        features.low_filterbank(WIDE)


def test_mel_filters_are_slaney_triangles() -> None:
    filters = features.mel_filterbank(WIDE).astype(np.float64)
    edges = features.mel_edges(WIDE)
    assert filters.shape == (1025, 128)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(22050)
    # Linear up to 1 kHz at 200/3 Hz per mel, then a factor of 6.4 in 27 mels.
    assert features.hz_to_mel(np.array([1000.0, 6400.0])) == pytest.approx([15, 42])
    assert features.mel_to_hz(features.hz_to_mel(np.array([30.0, 5000.0]))) == pytest.approx([30, 5000])
    # Unit area: each triangle's integral over Hz is 1 (wide bands, where the bins sample it well).
    assert filters[:, -20:].sum(axis=0) * 44100 / 2048 == pytest.approx(np.ones(20), rel=1e-2)
    assert (filters.sum(axis=0) > 0).all()


def test_log_mel_frame_count_and_floor() -> None:
    assert features.log_mel(noise(2, 1600), REFERENCE).shape == (2, 10, 64)
    assert features.log_mel(noise(2, 1759), REFERENCE).shape == (2, 10, 64)
    silent = features.log_mel(np.zeros((1, 3200), np.float32), REFERENCE)
    assert np.allclose(silent, np.log(1e-5))


def test_padded_audio_gives_the_same_frames() -> None:
    audio = noise(1, 8000)
    inner = features.log_mel(audio[:, 1600 - 512 : 1600 + 3200 + 512], REFERENCE, padded=True)
    assert np.abs(inner - features.log_mel(audio, REFERENCE)[:, 10:30]).max() < 1e-4


def test_level_follows_the_gain() -> None:
    audio = noise(1, 32000)
    assert features.mel_level(audio * 10, WIDE) - features.mel_level(audio, WIDE) == pytest.approx(
        20, abs=1e-3
    )
    assert features.mel_level(np.zeros((1, 32000), np.float32), WIDE) == -np.inf


@pytest.mark.skipif(PARITY is None, reason="the reference vectors are not in this checkout")
@pytest.mark.parametrize("kind", ["film", "uncond"])
def test_log_mel_matches_the_reference(kind: str) -> None:
    """Below 3e-5 (-90 dB) the reference's own float32 rounding passes 1e-4; magnitudes match everywhere."""
    assert PARITY is not None
    with np.load(PARITY / kind / "reference.npz") as arrays:
        wav, expected = arrays["stems_wav"], arrays["mel"][:, :256]
    result = features.log_mel(wav, REFERENCE)
    heard = expected > np.log(3e-5)
    error = np.abs(result - expected) / np.abs(expected).max()
    assert float(error[heard].max()) < 1e-4
    assert float(error.max()) < 3e-4
    assert float(np.abs(np.exp(result) - np.exp(expected)).max()) < 1e-5 * float(np.exp(expected).max())
