"""Reading, writing and resampling: every format that is promised, every refusal in one sentence."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine import audio
from engine.audio import BLOCK, Audio, add_into, empty, release
from engine.errors import BacklineError


def noise(channels: int = 2, length: int = 16000, rate: int = 16000) -> Audio:
    rng = np.random.default_rng(0)
    return Audio(rng.uniform(-0.5, 0.5, (channels, length)).astype(np.float32), rate)


def listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def refused(path: Path) -> str:
    with pytest.raises(BacklineError) as caught:
        audio.read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("aiff", "PCM_S8", 1e-2),
        ("flac", "PCM_16", 1e-4),
    ],
)
def test_read_every_depth(tmp_path: Path, suffix: str, subtype: str, tolerance: float) -> None:
    original = noise()
    path = tmp_path / f"in.{suffix}"
    soundfile.write(path, original.samples.T, 16000, subtype)
    result = audio.read(path)
    assert result.samples.dtype == np.float32
    assert result.samples.shape == original.samples.shape
    assert np.abs(result.samples - original.samples).max() <= tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_write_then_read_is_exact(tmp_path: Path, rate: int, channels: int) -> None:
    original = noise(channels, rate + 7, rate)
    audio.write(tmp_path / "out.wav", original)
    result = audio.read(tmp_path / "out.wav")
    assert result.sample_rate == rate
    assert np.array_equal(result.samples, original.samples)
    assert listing(tmp_path) == ["out.wav"]


def test_written_bytes_depend_on_the_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio.write(tmp_path / "a.wav", noise())
    monkeypatch.setattr("time.time", lambda: 0.0)
    audio.write(tmp_path / "b.wav", noise())
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    with soundfile.SoundFile(tmp_path / "a.wav") as file:
        assert (file.format, file.subtype) == ("WAV", "FLOAT")


def test_past_the_limit_it_is_rf64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "RIFF_LIMIT", 1000)
    original = noise(3)
    audio.write(tmp_path / "out.wav", original)
    with soundfile.SoundFile(tmp_path / "out.wav") as file:
        assert (file.format, file.subtype, file.frames) == ("RF64", "FLOAT", original.length)
    assert np.array_equal(audio.read(tmp_path / "out.wav").samples, original.samples)


def test_write_takes_broadcast_samples(tmp_path: Path) -> None:
    row = noise(1).samples[0]
    audio.write(tmp_path / "out.wav", Audio(np.broadcast_to(row, (2, len(row))), 16000))
    assert np.array_equal(audio.read(tmp_path / "out.wav").samples, np.stack([row, row]))


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "no.wav")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert "not a file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["x.wav", "x.raw", "x.txt"])
def test_no_audio(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no audio file at all " * 99)
    assert "not an audio file" in refused(tmp_path / name)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.wav").touch()
    assert "no bytes" in refused(tmp_path / "x.wav")


def test_header_without_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros((0, 2)), 16000)
    assert "no samples" in refused(tmp_path / "x.wav")


def test_cut_off_header(tmp_path: Path) -> None:
    audio.write(tmp_path / "x.wav", noise())
    (tmp_path / "x.wav").write_bytes((tmp_path / "x.wav").read_bytes()[:30])
    assert "not an audio file" in refused(tmp_path / "x.wav")


def test_a_cut_off_file_gives_what_is_there(tmp_path: Path) -> None:
    original = noise(2, 40000)
    audio.write(tmp_path / "x.wav", original)
    whole = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.wav").write_bytes(whole[: len(whole) // 2])
    result = audio.read(tmp_path / "x.wav")
    assert 16000 < result.length < 40000
    assert np.array_equal(result.samples, original.samples[:, : result.length])


def test_shorter_than_a_second(tmp_path: Path) -> None:
    audio.write(tmp_path / "x.wav", noise(1, 15999))
    assert "at least 1 s" in refused(tmp_path / "x.wav")
    audio.write(tmp_path / "y.wav", noise(1, 16000))
    assert audio.read(tmp_path / "y.wav").length == 16000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_samples(tmp_path: Path, value: float) -> None:
    samples = noise().samples.copy()
    samples[1, -1] = value
    soundfile.write(tmp_path / "x.wav", samples.T, 16000, "FLOAT")
    assert "NaN or infinite" in refused(tmp_path / "x.wav")


def test_doubles_beyond_float32(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.full(16000, 1e300), 16000, "DOUBLE")
    assert "NaN or infinite" in refused(tmp_path / "x.wav")


@pytest.mark.parametrize("rate", [4000, 7999, 192001, 384000])
def test_sample_rate_out_of_range(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(rate), rate)
    assert f"{rate} Hz" in refused(tmp_path / "x.wav")


def test_too_many_channels(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros((16000, 9)), 16000)
    assert "9 channels" in refused(tmp_path / "x.wav")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / f".x.wav.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(BacklineError, match="The disk is full"):
        audio.write(tmp_path / "x.wav", noise())
    assert listing(tmp_path) == []


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BacklineError, match="could not be written"):
        audio.write(tmp_path / "no" / "x.wav", noise())


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio.write(tmp_path / "x.wav", noise(1))
    before = (tmp_path / "x.wav").read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audio.write(tmp_path / "x.wav", noise(2))
    assert listing(tmp_path) == ["x.wav"]
    assert (tmp_path / "x.wav").read_bytes() == before


@pytest.mark.parametrize("old", [8000, 22050, 44100, 96000])
@pytest.mark.parametrize("new", [16000, 44100, 48000])
def test_resample_keeps_a_tone_and_rounds_the_length(old: int, new: int) -> None:
    length = old + 123
    hz = 1000.0
    source = Audio(np.sin(2 * np.pi * hz * np.arange(length) / old, dtype=np.float32)[None], old)
    result = audio.resample(source, new)
    assert result.length == round(length * new / old)
    expected = np.sin(2 * np.pi * hz * np.arange(result.length) / new)
    assert np.abs(result.samples[0] - expected)[500:-500].max() < 1e-3


def test_resample_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source = noise(2, 50000, 44100)
    whole = audio.resample(source, 16000).samples
    monkeypatch.setattr(audio, "BLOCK", 7001)
    assert np.abs(audio.resample(source, 16000).samples - whole).max() < 1e-6


def test_a_long_signal_lives_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(audio, "SPILL", 1000)
    spilled = audio.empty(2, 500)
    assert isinstance(spilled, np.memmap)
    assert not spilled.any()
    spilled += 1
    audio.write(tmp_path / "x.wav", Audio(np.repeat(spilled, 32, axis=1), 16000))
    assert audio.read(tmp_path / "x.wav").samples.sum() == 32000


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="only where space can be reserved")
def test_no_room_for_a_long_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(audio, "SPILL", 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BacklineError, match="The disk is full"):
        audio.empty(2, 500)


def test_mono_is_the_mean_unless_it_cancels() -> None:
    row = noise(1).samples[0]
    assert np.allclose(audio.mono(Audio(np.stack([row, 0 * row]), 16000)), row / 2)
    assert np.array_equal(audio.mono(Audio(np.stack([row, -row]), 16000)), row)


def test_silence_is_known() -> None:
    assert audio.is_silent(Audio(np.zeros((2, 10), np.float32), 16000))
    assert not audio.is_silent(noise())


def test_released_pages_leave_memory_and_keep_their_samples() -> None:
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))

    samples = empty(2, 8 << 20)  # 64 MiB
    before = mapped()
    samples[:] = 0.5
    held = mapped()
    release(samples[1, 100:])  # any view of it
    assert held - before > 60_000 and held - mapped() > 60_000  # kB
    assert samples.min() == samples.max() == 0.5
    inside = np.ones(8, np.float32)
    release(inside, inside[2:])
    assert inside.sum() == 8


def test_sums_of_long_signals_are_those_of_short_ones() -> None:
    total, part = empty(2, 3 * BLOCK), np.ones((2, 2 * BLOCK + 7), np.float32)
    add_into(total, part)
    assert total[:, : part.shape[1]].min() == 1 and not total[:, part.shape[1] :].any()
