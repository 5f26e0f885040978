"""The demo on a tiny model: the steps and what they leave. How it sounds is for training/evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import RATE, STEMS, backline, refused, samples, write_song

from plugin_host.session import SessionHost

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    folder = write_song(tmp_path / "song", ("bass", "drums", "guitar", "piano"), channels=2)
    (folder / "song.json").write_text(json.dumps({"bpm": 100, "beats_per_bar": 4, "title": "Test"}))
    return folder


def test_the_demo_leaves_wavs_and_pictures(
    tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    ran = backline(capsys, "demo", "--song", song, "--out", out, "--model", tiny_bundle, "--seconds", 2)
    assert ran.status == 0, ran
    for part, names in (("fill", ["piano"]), ("band", [*STEMS, "mix"]), ("split", STEMS)):
        assert {path.stem for path in (out / part).glob("*.wav")} == set(names)
        assert (out / part / "picture.png").stat().st_size > 10_000
        assert json.loads((out / part / "take.json").read_text())["seed"] == 7
        assert str(out / part) in ran.out.replace("\n", "") or part == "split"
    assert json.loads((out / "fill" / "take.json").read_text())["request"]["bpm"] == 100

    # the session holds the given tracks and the new piano, disarmed again
    session = SessionHost.open(out / "session")
    assert session.tempo == 100 and session.sample_rate == RATE
    tracks = {track.role: track for track in session.tracks()}
    assert set(tracks) == set(STEMS) and not any(track.armed for track in tracks.values())
    piano = samples(session.export([tracks["piano"].id])[tracks["piano"].id])
    assert np.array_equal(piano[: 2 * RATE], samples(out / "fill" / "piano.wav"))
    assert not np.array_equal(piano[: 2 * RATE], samples(song / "piano.wav")[: 2 * RATE])

    # the bounce is the song with that piano, and the split of it sums to it
    given = sum(samples(song / f"{name}.wav")[: 2 * RATE] for name in STEMS if name != "piano")
    mix = samples(out / "mix.wav")
    np.testing.assert_allclose(mix, given + samples(out / "fill" / "piano.wav"), atol=1e-6)
    total = sum(samples(out / "split" / f"{name}.wav") for name in STEMS)
    np.testing.assert_allclose(total, mix, atol=1e-6 * float(np.abs(mix).max() + 1))


def test_a_second_demo_gets_a_folder_of_its_own(
    tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("demo", "--song", song, "--model", tiny_bundle, "--seconds", 1)
    assert backline(capsys, *arguments).status == 0
    told = backline(capsys, *arguments, "--json").json
    assert told["folder"] == "backline-demo-2" and told["jobs"]["fill"]["real_time_factor"] > 0
    for job in told["jobs"].values():
        assert all(Path(path).is_file() for path in job["files"].values())
    refused(backline(capsys, *arguments, "--out", "backline-demo"), 1, "not empty", "--force")
    assert backline(capsys, *arguments, "--out", "backline-demo", "--force").status == 0


def test_songs_that_cannot_be_used(tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ("--out", tmp_path / "out", "--model", tiny_bundle)
    refused(backline(capsys, "demo", "--song", tmp_path / "none", *common), 1, "does not exist")
    refused(backline(capsys, "demo", "--song", song, "--seconds", 0.2, *common), 2, "at least 1 s")
    only_piano = write_song(tmp_path / "solo", ("piano",))
    refused(backline(capsys, "demo", "--song", only_piano, *common), 1, "other stems")
    (song / "song.json").write_text("{")
    refused(backline(capsys, "demo", "--song", song, *common), 1, "song.json")
    assert not (tmp_path / "out").exists()


def test_the_picture_shows_given_and_made(tmp_path: Path) -> None:
    from bridge.pictures import Row, draw
    from engine.audio import Audio

    quiet = np.zeros((1, RATE), np.float32)
    tone = np.sin(2 * np.pi * 1000 * np.arange(3 * RATE) / RATE).astype(np.float32)[None]
    rows = [Row("bass", Audio(tone, RATE), given=True), Row("piano", Audio(quiet, RATE), given=False)]
    draw(tmp_path / "a.png", "two rows", rows)
    draw(tmp_path / "b.png", "two rows", rows)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw(tmp_path / "silent.png", "one silent row", [rows[1]])
    from matplotlib.image import imread

    pixels = imread(tmp_path / "a.png")[..., :3]
    height = pixels.shape[0]
    bright = (pixels.min(axis=2) > 0.8) & (
        pixels.max(axis=2) < 0.999
    )  # the tone's line, less the white paper
    assert bright[: height // 2].sum() > 100


def test_long_and_short_audio_share_one_time_axis() -> None:
    from bridge.pictures import COLUMNS, _power
    from engine.audio import Audio

    long = Audio(np.zeros((2, 600 * 8000), np.float32), 8000)
    half = Audio(np.zeros((1, 300 * 8000), np.float32), 8000)
    assert _power(long, 600)[0].shape[0] == pytest.approx(COLUMNS, abs=2)
    assert _power(half, 600)[0].shape[0] == pytest.approx(COLUMNS / 2, abs=2)


def test_the_shipped_model_plays_the_shipped_song(tmp_path: Path, capsys: Capture) -> None:
    ran = backline(capsys, "demo", "--out", tmp_path / "out", "--seconds", 3, "--json")
    assert ran.status == 0, ran
    for job in ran.json["jobs"].values():
        for name in STEMS:
            if name in job["files"]:
                sound = samples(Path(job["files"][name]))
                assert np.isfinite(sound).all() and np.sqrt(np.mean(sound**2)) > 1e-5
    take = json.loads((tmp_path / "out" / "band" / "take.json").read_text())
    assert take["request"]["text"] and take["model"]["name"] == "backline-default"
