"""The vocoder without weights: its transform, its first phases, what it sounds like, and its graph."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from engine import features
from engine.bundle import load_bundle
from engine.features import mel_filterbank
from engine.model import Model
from export.bundle_writer import mel_of_noise
from export.first_phases import first_phases, strokes, sudden, sustained
from export.griffin_lim import REACH, GriffinLim, GriffinLimConfig, Search
from export.onnx_writer import Input, relative_error, write_graph
from export.real_fft import RealFFT
from training.add_vocoder import add_vocoder
from training.mel import GEOMETRY, log_mel

DEFAULT = GriffinLimConfig.of(GEOMETRY)
SMALL = GriffinLimConfig(sample_rate=16000, n_fft=512, hop=128, mels=40, f_max=8000.0)


@pytest.mark.parametrize("n_fft", [4, 8, 64, 512, 2048])
def test_the_transform_is_torchs(n_fft: int) -> None:
    torch.manual_seed(0)
    fft, frames = RealFFT(n_fft), torch.randn(2, 3, n_fft)
    real, imaginary = fft(frames)
    bins, mirrored = fft.places()
    expected = torch.fft.rfft(frames)[..., bins]
    assert torch.allclose(real, expected.real, atol=1e-3)
    assert torch.allclose(imaginary, torch.where(mirrored, -expected.imag, expected.imag), atol=1e-3)
    assert torch.allclose(fft.inverse(real, imaginary), frames, atol=1e-5)


def test_the_transform_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        RealFFT(1000)


def random_spectrum(search: Search, frames: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return search._spectrum(torch.randn(2, (frames + 3) * search.hop))


def test_bands_of_a_spectrum_are_the_filterbanks() -> None:
    """Whose rows of the transform hold some bins twice."""
    torch.manual_seed(0)
    table = mel_filterbank(SMALL.geometry)
    search = Search(SMALL, table)
    re, im = random_spectrum(search)
    magnitude = (re * re + im * im).sqrt()
    bins = magnitude[..., search.natural]
    assert bins.shape[-1] == SMALL.n_fft // 2 + 1
    assert torch.allclose(bins[..., search.order], magnitude, atol=1e-4)
    assert torch.allclose(magnitude @ search.table, bins @ torch.tensor(table), atol=1e-4)


def test_magnitudes_that_fit_the_mel_stay_and_others_come_nearer() -> None:
    torch.manual_seed(0)
    search = Search(SMALL, mel_filterbank(SMALL.geometry))
    re, im = random_spectrum(search)
    magnitude = (re * re + im * im).sqrt()
    heard = magnitude @ search.table
    inside = search.share > 0
    assert torch.allclose(search._fitted((re, im), heard)[..., inside], magnitude[..., inside], rtol=1e-4)
    wanted = heard * (0.5 * torch.randn(heard.shape)).exp()
    fitted = search._fitted((re, im), wanted)
    far, near = ((m @ search.table / wanted).log().abs().mean() for m in (magnitude, fitted))
    assert near < 0.6 * far


def test_slow_samples_become_the_tone_they_are_of() -> None:
    vocoder = GriffinLim(DEFAULT)
    rate, hz = vocoder.rate, 470.0
    time = torch.arange(200 * rate) / 44100
    tone = torch.sin(2 * math.pi * hz * time)
    slow = tone[::rate]
    around = slow.unfold(0, 2 * REACH, 1) @ vocoder.kernel
    start = (REACH - 1) * rate
    expected = tone[start : start + around.numel()]
    assert (around.flatten() - expected).abs().max() < 2e-3


def test_windows_must_overlap_by_three_quarters() -> None:
    with pytest.raises(ValueError, match="4 hops"):
        GriffinLim(GriffinLimConfig(hop=1024))


@pytest.mark.parametrize("hz", [110.0, 443.0, 1000.0, 5000.0])
def test_a_steady_tone_turns_at_its_own_frequency(hz: float) -> None:
    rate, n_fft, hop = 44100, 2048, 512
    time = torch.arange(rate) / rate
    spectrum = torch.stft(
        torch.sin(2 * math.pi * hz * time), n_fft, hop, window=torch.hann_window(n_fft), return_complex=True
    )[:, 8:-8]
    nearest = round(hz * n_fft / rate)
    magnitude = spectrum.abs().T[None]
    assert sudden(magnitude)[..., nearest].max() < 0.01
    phases = sustained(magnitude)[0]
    for k in (nearest - 1, nearest, nearest + 1):
        turns = torch.diff(phases[:, k])
        error = (turns - hz * hop / rate + 0.5) % 1 - 0.5
        assert error.abs().max() * rate / hop < 2.0, "Hz"
    lock = (phases[:, nearest + 1] - phases[:, nearest]) % 1
    assert torch.allclose(lock, torch.full_like(lock, 0.5), atol=0.05), "neighbours alternate in sign"


@pytest.mark.parametrize("late", [-100, 0, 250, 400])
def test_a_click_begins_where_it_is(late: int) -> None:
    """`late` samples after the middle of a frame."""
    n_fft, hop, frame = 2048, 512, 10
    signal = torch.zeros(12000)
    signal[frame * hop + late] = 1.0
    spectrum = torch.stft(signal, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)
    magnitude = spectrum.abs().T[None]
    phases = strokes(magnitude)[0, frame]
    error = (torch.diff(phases) - (0.5 - late / n_fft) + 0.5) % 1 - 0.5
    assert error[20:-20].abs().max() * n_fft < 12, "samples"
    assert sudden(magnitude)[0, frame].min() > 0.8
    cos, sin = first_phases(magnitude)
    assert (cos.square() + sin.square())[0, frame].min() > 0.6


def test_drums_are_struck_as_steeply_as_phases_alone_allow() -> None:
    """Bursts of noise: what their first two milliseconds have more than the ten before."""
    torch.manual_seed(0)
    signal = torch.zeros(60000)
    onsets = torch.arange(9000, 56000, 9000)
    for onset in onsets:
        signal[onset : onset + 4000] = 0.1 * torch.randn(4000) * torch.exp(-torch.arange(4000) / 800)
    with torch.no_grad():
        audio = GriffinLim(DEFAULT)(log_mel(signal[None]).transpose(1, 2))[0, 0]
    rise = [
        float((audio[at : at + 400].square().mean() / audio[at - 500 : at - 60].square().mean()).log10() * 10)
        for at in onsets
    ]
    assert np.mean(rise) > 14


def notes(pitches: list[int], seconds: float = 2.0, rate: int = 44100) -> torch.Tensor:
    time = torch.arange(round(seconds * rate)) / rate
    wave = torch.zeros_like(time)
    for pitch in pitches:
        for k in range(1, 8):
            wave += torch.sin(2 * math.pi * k * 440 * 2 ** ((pitch - 69) / 12) * time + k * k) / k
    return 0.05 * wave * torch.exp(-time)


def test_a_configuration_names_its_geometry() -> None:
    assert DEFAULT.geometry == GEOMETRY
    assert SMALL.geometry.low is None
    assert GriffinLimConfig.of(SMALL.geometry) == SMALL


def test_low_bands_need_a_longer_window() -> None:
    with pytest.raises(ValueError, match="larger multiple"):
        GriffinLim(replace(DEFAULT, low_n_fft=2048))


@pytest.mark.parametrize("frames", [1, 7, 8])
def test_any_number_of_frames_becomes_as_many_hops(frames: int) -> None:
    with torch.no_grad():
        assert GriffinLim(DEFAULT)(torch.zeros(2, 152, frames)).shape == (2, 1, frames * 512)


def fundamental(audio: torch.Tensor) -> float:
    """Hz of the strongest line under 300 Hz."""
    spectrum = torch.fft.rfft(audio[:65536] * torch.hann_window(65536)).abs()
    return int(spectrum[: round(300 * 65536 / 44100)].argmax()) * 44100 / 65536


@pytest.mark.parametrize("pitch", [28, 31, 33, 38])
def test_the_lowest_notes_of_a_bass_keep_their_pitch(pitch: int) -> None:
    signal = notes([pitch])
    with torch.no_grad():
        audio = GriffinLim(DEFAULT)(log_mel(signal[None]).transpose(1, 2))[0, 0]
    octaves = np.log2(fundamental(audio) / (440 * 2 ** ((pitch - 69) / 12)))
    assert abs(12 * octaves) < 0.5


@pytest.mark.parametrize("hz", [455.0, 468.0, 481.0, 488.0, 494.0, 501.0, 507.0, 520.0])
def test_a_partial_at_the_end_of_the_low_bands_is_written_once_where_it_is(hz: float) -> None:
    time = torch.arange(2 * 44100) / 44100
    signal = 0.05 * (torch.sin(2 * math.pi * hz * time) + 0.5 * torch.sin(math.pi * hz * time))
    with torch.no_grad():
        audio = GriffinLim(DEFAULT)(log_mel(signal[None]).transpose(1, 2))[0, 0]
    window = torch.blackman_window(65536)
    found, true = (torch.fft.rfft(x[8192 : 8192 + 65536] * window).abs() for x in (audio, signal))
    lines = torch.arange(len(found)) * 44100 / 65536
    zone = (lines > hz - 70) & (lines < hz + 70)
    peak = lines[torch.where(zone, found, 0).argmax()]
    assert abs(1200 * math.log2(peak / hz)) < 25, "cents"
    beside = torch.where(zone & ((lines - hz).abs() > 15), found, 0).max() / true[zone].max()
    assert 20 * math.log10(beside) < -20
    written = (found[zone].square().sum() / true[zone].square().sum()).log10() * 10
    assert abs(written) < 3.5, "dB"


@pytest.mark.parametrize("hz", [785.6, 1571.1, 2100.0, 2356.7, 2700.0, 3100.0])
def test_a_partial_between_two_bands_is_one_line(hz: float) -> None:
    time = torch.arange(2 * 44100) / 44100
    signal = 0.05 * torch.sin(2 * math.pi * hz * time)
    with torch.no_grad():
        audio = GriffinLim(DEFAULT)(log_mel(signal[None]).transpose(1, 2))[0, 0]
    power = torch.fft.rfft(audio[8192 : 8192 + 65536] * torch.hann_window(65536)).abs().square()
    lines = torch.arange(len(power)) * 44100 / 65536
    elsewhere = power[(lines - hz).abs() > 15].sum() / power.sum()
    assert 10 * math.log10(elsewhere) < -25


@pytest.mark.parametrize("chord", [[52, 59, 64, 68], [28, 40]])
def test_notes_keep_their_pitch_and_their_mel(chord: list[int]) -> None:
    """Each note of a chord comes back nearest to its own semitone, the mel within a quarter of a neper."""
    signal = notes(chord)
    mel = log_mel(signal[None])
    with torch.no_grad():
        audio = GriffinLim(DEFAULT)(mel.transpose(1, 2))
    assert audio.shape == (1, 1, mel.shape[1] * 512)
    spectrum = torch.fft.rfft(audio[0, 0, :65536] * torch.hann_window(65536)).abs()
    for pitch in chord:
        hz = 440 * 2 ** ((pitch - 69) / 12)
        near = spectrum[int((hz - 12) * 65536 / 44100) : int((hz + 12) * 65536 / 44100)]
        found = (int(near.argmax()) + int((hz - 12) * 65536 / 44100)) * 44100 / 65536
        assert abs(12 * np.log2(found / hz)) < 0.5, (pitch, found, hz)
    again = log_mel(audio[0])
    loud = mel > mel.max() - 6
    assert float((again - mel)[loud].abs().mean()) < 0.25


def test_silence_stays_silent_and_loud_mels_stay_finite() -> None:
    vocoder = GriffinLim(SMALL)
    with torch.no_grad():
        quiet = vocoder(torch.full((1, 40, 12), math.log(SMALL.floor)))
        loud = vocoder(torch.full((1, 40, 12), 200.0))
    assert quiet.abs().max() < 1e-2
    assert torch.isfinite(loud).all()


def test_what_was_clamped_at_the_floor_is_written_below_it() -> None:
    level, frames = math.log(SMALL.floor), 60
    with torch.no_grad():
        floor, above = (
            GriffinLim(SMALL)(torch.full((1, 40, frames), level + math.log(times)))[0].square().mean().sqrt()
            for times in (1.0, 4.0)
        )
    assert float(above / floor) == pytest.approx(4 * 0.976 / 0.493, rel=0.1)


def test_more_steps_come_nearer_to_the_mel() -> None:
    signal = notes([45, 57, 61]) + 0.01 * torch.randn(88200, generator=torch.Generator().manual_seed(0))
    mel = log_mel(signal[None])
    errors = []
    for steps in (0, 2, 8):
        with torch.no_grad():
            audio = GriffinLim(replace(DEFAULT, phase_steps=steps))(mel.transpose(1, 2))[0]
        errors.append(float((log_mel(audio) - mel).abs().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("low", [{}, {"low_n_fft": 1024, "low_bands": 12, "low_f_max": 480.0}])
def test_the_graph_computes_what_torch_does(low: dict[str, Any], tmp_path: Path) -> None:
    """The search magnifies rounding errors in bins where frames cancel; without it the graph is exact."""
    sizes = [{"batch": 1, "frames": 16, "samples": 2048}, {"batch": 2, "frames": 24, "samples": 3072}]
    for steps, limit in ((0, 1e-3), (SMALL.phase_steps, 2e-2)):
        config = replace(SMALL, phase_steps=steps, **low)
        inputs = [Input("mel", ("batch", 40, "frames"), feed=partial(mel_of_noise, config.geometry))]
        outputs = {"audio": ("batch", 1, "samples")}
        path, vocoder = tmp_path / f"{steps}.onnx", GriffinLim(config)
        error = write_graph(vocoder, inputs, outputs, path, sizes=sizes, precision="fp16", tolerance=limit)
        assert error <= limit
    assert path.stat().st_size < 1_000_000, "each table is stored once"
    session = ort.InferenceSession(str(path))
    mel = mel_of_noise(config.geometry, (1, 40, 33), np.random.default_rng(1))
    with torch.no_grad():
        expected = vocoder(torch.from_numpy(mel)).numpy()
    assert relative_error(session.run(None, {"mel": mel})[0], expected) < 2e-2


def test_it_is_written_into_a_bundle_that_keeps_all_else(tiny_default_bundle: Path, tmp_path: Path) -> None:
    """With a longer search than the bundle had; what it sounds like is the search's in torch."""
    before = load_bundle(tiny_default_bundle).manifest
    made = add_vocoder(tiny_default_bundle, tmp_path / "made", "9")
    changed = {name for name in made.files if made.files[name] != before.files[name]}
    assert changed <= {"vocoder.onnx"} and made.files.keys() == before.files.keys()
    config = GriffinLimConfig.of(before.mel)
    assert made.version == "9" and made.networks["vocoder"] == asdict(config)
    assert made.provenance["export"]["relative_error"].keys() >= {"vocoder", "unet"}
    tone = np.sin(2 * np.pi * 440 / before.mel.sample_rate * np.arange(16 * before.mel.hop), dtype=np.float32)
    mels = features.log_mel(tone[None], before.mel)[:, :16]
    with torch.no_grad():
        expected = GriffinLim(config)(torch.from_numpy(mels).transpose(1, 2))[0, 0].numpy()
    found = Model.open(tmp_path / "made", "cpu", 1).vocode(mels)[0]
    assert relative_error(found, expected) < 2e-2
