"""What the commands write."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import RATE, STEMS, backline, noise, refused, samples, write_song

Capture = pytest.CaptureFixture[str]
SUBSETS = [armed for size in (1, 2, 3) for armed in itertools.combinations(STEMS, size)]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return write_song(tmp_path / "song", channels=2)


def test_generate_writes_every_stem_and_their_sum(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "deep" / "out"
    ran = backline(
        capsys,
        "generate",
        "--out",
        out,
        "--seconds",
        2.5,
        "--text",
        "warm",
        "--model",
        tiny_bundle,
        "--seed",
        5,
    )
    assert ran.status == 0, ran
    wavs = sorted(path.name for path in out.glob("*.wav"))
    assert wavs == ["bass.wav", "drums.wav", "guitar.wav", "mix.wav", "piano.wav"]
    total = sum(samples(out / f"{name}.wav") for name in STEMS)
    assert np.array_equal(total, samples(out / "mix.wav"))
    info = soundfile.info(out / "mix.wav")
    assert (info.samplerate, info.frames, info.subtype) == (32000, 80000, "FLOAT")
    take = json.loads((out / "take.json").read_text())
    assert take["seed"] == 5 and take["request"]["text"] == "warm"
    assert take["provider"] == "CPUExecutionProvider" and take["model"]["name"] == "tiny"
    assert (out / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(out.glob(".*"))
    assert "real-time factor" in ran.out and ran.err == ""


def test_the_seed_decides_the_bytes(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    def made(name: str, *seed: object) -> bytes:
        arguments = ["--seconds", 1, "--model", tiny_bundle, "--no-picture"]
        assert backline(capsys, "generate", "--out", tmp_path / name, *arguments, *seed).status == 0
        return (tmp_path / name / "mix.wav").read_bytes()

    first = made("a", "--seed", 1)
    assert made("b", "--seed", 1) == first
    assert made("c", "--seed", 2) != first
    assert made("d") != made("e")  # without a seed it is a new one each time, and take.json knows it
    seed = json.loads((tmp_path / "e" / "take.json").read_text())["seed"]
    assert made("f", "--seed", seed) == made("e2", "--seed", seed)


@pytest.mark.parametrize("armed", SUBSETS, ids="+".join)
def test_fill_takes_all_subsets(
    armed: tuple[str, ...], tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    ran = backline(
        capsys,
        "fill",
        song,
        "--arm",
        ",".join(armed),
        "--out",
        out,
        "--model",
        tiny_bundle,
        "--json",
        "--no-picture",
    )
    assert ran.status == 0, ran
    assert {path.stem for path in out.glob("*.wav")} == set(armed)
    for name in armed:
        info = soundfile.info(out / f"{name}.wav")
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (RATE, 3 * RATE, 2, "FLOAT")
        assert np.abs(samples(out / f"{name}.wav")).max() > 0
    assert set(ran.json["files"]) == {*armed, "take"}
    inputs = ran.json["take"]["inputs"]
    assert set(inputs) == set(STEMS) - set(armed) and all(
        len(entry["sha256"]) == 64 for entry in inputs.values()
    )


def test_fill_next_to_its_context(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    song = write_song(tmp_path / "song", ("bass", "drums"))
    ran = backline(
        capsys,
        *("fill", song, "--arm", "piano", "--arm", "guitar", "--out", song, "--model", tiny_bundle),
        *(
            "--bpm",
            100,
            "--chords",
            "C | Am",
            "--steps",
            2,
            "--sampler",
            "ddim",
            "--guidance",
            2,
            "--text",
            "warm",
        ),
    )
    assert ran.status == 0, ran
    wavs = sorted(path.name for path in song.glob("*.wav"))
    assert wavs == ["bass.wav", "drums.wav", "guitar.wav", "piano.wav"]
    settings = json.loads((song / "take.json").read_text())["settings"]
    assert (settings["steps"], settings["sampler"], settings["guidance"]) == (2, "ddim", 2.0)


def test_fill_pads_to_the_longest(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    song = write_song(tmp_path / "song", ("bass",), seconds=2.0)
    soundfile.write(song / "DRUMS.FLAC", noise(3.0), RATE)
    out = tmp_path / "out"
    arguments = ("fill", song, "--arm", "piano", "--silent", "guitar", "--out", out, "--model", tiny_bundle)
    ran = backline(capsys, *arguments, "--no-picture")
    assert ran.status == 0, ran
    assert soundfile.info(out / "piano.wav").frames == 3 * RATE


def test_other_material_is_heard(tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture) -> None:
    voice = tmp_path / "voice.wav"
    soundfile.write(voice, noise(3.0, seed=9), RATE)
    made = []
    for extra in ((), ("--other", voice)):
        out = tmp_path / f"out{len(extra)}"
        arguments = ("fill", song, "--arm", "piano", "--out", out, "--model", tiny_bundle, "--seed", 1)
        assert backline(capsys, *arguments, "--no-picture", *extra).status == 0
        made.append((out / "piano.wav").read_bytes())
    assert made[0] != made[1]


@pytest.mark.parametrize("options", [(), ("--residual",), ("--method", "dirac"), ("--method", "gaussian")])
def test_split_nulls(options: tuple[str, ...], tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    mix, out = tmp_path / "mix.wav", tmp_path / "out"
    soundfile.write(mix, noise(2.3, rate=48000, channels=2), 48000, "FLOAT")
    ran = backline(capsys, "split", mix, "--out", out, "--model", tiny_bundle, "--no-picture", *options)
    assert ran.status == 0, ran
    wavs = sorted(out.glob("*.wav"))
    assert len(wavs) == (5 if "--residual" in options else 4)
    remainder = samples(mix) - sum(samples(path) for path in wavs)
    assert 20 * np.log10(np.abs(remainder).max() / np.abs(samples(mix)).max()) < -100


def test_split_raw_is_something_else(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    mix = tmp_path / "mix.wav"
    soundfile.write(mix, noise(2.0), RATE, "FLOAT")
    for name, options in (("masks", ()), ("raw", ("--raw",))):
        assert (
            backline(capsys, "split", mix, "--out", tmp_path / name, "--model", tiny_bundle, *options).status
            == 0
        )
    assert not np.allclose(samples(tmp_path / "raw" / "bass.wav"), samples(tmp_path / "masks" / "bass.wav"))


def test_json_is_one_object_also_for_a_failure(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    ran = backline(
        capsys, "split", tmp_path / "none.wav", "--out", tmp_path / "o", "--model", tiny_bundle, "--json"
    )
    refused(ran, 1, "does not exist")
    assert ran.json == {"status": "error", "error": ran.err.strip()}


def test_models_and_doctor(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKLINE_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_bundle, target_is_directory=True)
    listed = backline(capsys, "models", "--json").json["models"]
    assert listed[0]["path"].startswith("the default") and listed[1]["name"] == "tiny"
    assert "tiny" in backline(capsys, "models").out
    ran = backline(capsys, "doctor", "--model", "mine", "--json", "--device", "cpu")
    assert ran.status == 0, ran
    found = {finding["subject"]: finding for finding in ran.json["findings"]}
    assert (
        "real-time factor" in found["speed"]["text"] and found["provider"]["text"] == "CPUExecutionProvider"
    )
    ran = backline(capsys, "doctor", "--model", tmp_path / "none", "--json")
    assert ran.status == 1 and not ran.json["ok"]


def test_help_and_version(capsys: Capture) -> None:
    assert "split" in backline(capsys).out
    assert backline(capsys, "--help").status == 0
    assert backline(capsys, "fill", "--help").status == 0
    assert backline(capsys, "--version").out.startswith("backline ")
