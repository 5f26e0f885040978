"""`backline bench quality`: what it hears in signals made to order, its table, going on, and its pages."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from bench.quality import articulation, band, examples, pitch, report, rhythm, run, windows
from bench.quality.figures import Figure, missing, of_means
from bridge.bench_commands import app
from engine.conditions import parse_chords
from engine.errors import BacklineError, UsageError
from training.bands import Song
from training.charts import timeline

RATE = 44100
PAGES = Path(__file__).resolve().parents[1] / "docs" / "listen"


def clicks(bpm: float, seconds: float, first: float = 0.3) -> np.ndarray:
    """Noise bursts on every beat from `first` on, with softer ones between."""
    rng = np.random.default_rng(0)
    audio = np.zeros(round(seconds * RATE))
    beat = 60 / bpm
    for number, time in enumerate(np.arange(first, seconds - 0.1, beat / 2)):
        start = round(time * RATE)
        burst = rng.normal(0, 1, 4000) * np.exp(-np.arange(4000) / 600)
        audio[start : start + 4000] += burst[: len(audio) - start] * (0.5 if number % 2 == 0 else 0.1)
    return audio


@pytest.mark.parametrize("bpm", [71.3, 97.0, 141.7])
def test_tempo_and_beats_of_clicks_are_found(bpm: float) -> None:
    audio = clicks(bpm, 20)
    found = rhythm.fitted_tempo(audio)
    assert rhythm.folded_error(found, bpm) < 0.005
    beats = rhythm.tracked_beats(audio, rhythm.nearest_octave(found, bpm))
    grid = np.arange(0.3, 20, 60 / bpm)
    assert rhythm.beat_f1(beats, grid, 20) > 0.95
    assert rhythm.beat_f1(beats, grid + 30 / bpm, 20) < 0.1


def test_octaves_are_folded_and_other_tempi_are_not() -> None:
    assert rhythm.folded_error(240, 120) == rhythm.folded_error(30, 120) == 0
    assert rhythm.folded_error(180, 120) == pytest.approx(0.25)
    assert rhythm.nearest_octave(61, 120) == 122


@pytest.mark.parametrize("midi", [28, 33, 40, 47, 55])
def test_a_bass_note_is_heard_even_without_its_fundamental(midi: int) -> None:
    t = np.arange(RATE) / RATE
    hz = 440 * 2 ** ((midi - 69) / 12)
    whole = sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 6))
    assert pitch.pitch_class(0.1 * whole, 0.2, 0.35) == midi % 12
    assert pitch.pitch_class(0.1 * (whole - np.sin(2 * np.pi * hz * t)), 0.2, 0.35) == midi % 12


def held_tone(hz: float, seconds: float = 1.8) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return sum((np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 6)), np.zeros(len(t)))


def test_what_lies_between_the_partials_of_a_note_is_found() -> None:
    true = held_tone(220)
    assert articulation.between_partials(true, true) < -60
    hum = 0.1 * np.sin(2 * np.pi * 273 * np.arange(len(true)) / RATE)
    share = 10 * np.log10(np.mean(hum**2) / np.mean((true + hum) ** 2))
    assert articulation.between_partials(true + hum, true) == pytest.approx(share, abs=0.3)
    assert articulation.between_partials(held_tone(220 * 2 ** (1 / 12)), true) > -8
    assert articulation.between_partials(held_tone(221), true) < -40, "some cents are no hum"


def test_a_hum_is_the_sidebands_of_what_is_modulated() -> None:
    true = held_tone(220)
    moved = true * (1 + 0.1 * np.sin(2 * np.pi * 21.5 * np.arange(len(true)) / RATE))
    assert articulation.hum(moved, true, 21.5) == pytest.approx(20 * np.log10(0.1) - 3, abs=0.3)
    assert articulation.hum(moved, true, 30.0) < -60, "another rate's"
    assert articulation.hum(true, true, 21.5) < -60


def test_blurred_attacks_rise_less() -> None:
    true = clicks(120, 6)
    places = articulation.struck(true)
    onsets = (0.3 + np.arange(11) * 0.5) * RATE / articulation.GRAIN
    assert all(np.abs(places - onset).min() <= 1 for onset in onsets), "the loud ones, on the beats"
    slow = np.convolve(true, np.ones(500) / 500, "same")
    steep = [articulation.rise(x, places) for x in (true, slow)]
    assert steep[0] > 1.5 * steep[1] > 0
    figure = articulation.attacks({"both": [true, slow], "vocoder": [true, true]}, [true, true])
    assert figure.value == pytest.approx((1 + steep[1] / steep[0]) / 2)
    assert figure.ceiling == {"vocoder alone": pytest.approx(1.0)}
    assert figure.floor["blurred over 50 ms"] < 0.4
    assert np.isnan(articulation.rise(true, np.array([], int)))


def test_silence_has_no_pitch() -> None:
    assert pitch.pitch_class(np.zeros(RATE), 0.2, 0.35) is None


def test_a_songs_chords_are_a_chart_that_the_engine_reads() -> None:
    chart = [["C"], ["Am7", "F"], ["Dm7b5"], ["GM7"]]
    written = Song({}, 120.0, 4.0, 8.0, timeline(chart, 4.0), "C major", "rock", {}, False)
    text = written.chart
    assert text == "C | Am7 F | Dm7b5 | GM7"
    assert [len(bar) for bar in parse_chords(text)] == [1, 2, 1, 1]
    assert pitch.chord_at(written, 2 * 1.0 + 1.01).symbol == "F"
    assert pitch.downbeats(written, 1.0, 6.0) == [2.0, 4.0, 6.0]


def test_frechet_distance_is_nothing_for_the_same_and_grows() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(0, 1, (400, 8))
    assert band.frechet(cloud, cloud) == pytest.approx(0, abs=1e-6)
    assert band.frechet(cloud, cloud + 1) == pytest.approx(8, rel=1e-6)
    assert band.frechet(cloud, 2 * cloud) > 5


def test_figures_meet_bars_from_their_side_and_leave_out_what_was_not_scored() -> None:
    assert of_means("split", "x", np.array([1.0, np.nan, 3.0]), bar=2.0).met is True
    assert of_means("split", "x", np.array([1.0, np.nan, 3.0])).n == 2
    assert Figure("cost", "x", 0.4, bar=0.5, lower=True).met is True
    assert Figure("cost", "x", 0.6, bar=0.5, lower=True).met is False
    assert missing("fill", "x", "no judge", bar=0.9).met is None
    low, high = of_means("split", "x", np.arange(20.0)).interval or (0, 0)
    assert 5 < low < 9.5 < high < 14


def result() -> dict:
    figures = [
        Figure(
            "split", "SI-SDRi, mean", 5.2, (4.0, 6.1), 4, "dB", {"ideal mask": 12.4}, {"other": -1.5}, 10.0
        ),
        Figure("split", "HTDemucs, bass", 9.0, (8.0, 10.0), 4, "dB", peer=True),
        missing("fill", "classifier agrees, bass", "no --classifier DIR was given", bar=0.9),
        Figure("cost", "bundle size", 34.9, None, 1, "MB", bar=60.0, lower=True),
    ]
    machine = {"cpu": "a CPU", "cores": 2, "load_average": [0.1, 0.2, 0.3]}
    about = {"model": "m 1", "windows": 4, "machine": machine, "seconds": {"split": 3.0}}
    return about | {"figures": [figure.plain() for figure in figures]}


def test_the_table_says_bars_references_and_what_is_absent(tmp_path: Path) -> None:
    text = report.markdown(result())
    assert "| 5.20 dB | 4.00 to 6.10 | ideal mask 12.40 | other -1.50 | at least 10 | not met | 4 |" in text
    assert "not measured" in text and "no --classifier DIR was given" in text
    assert "at most 60 | met" in text
    written = report.write(result(), tmp_path)
    assert [path.name for path in written] == ["quality.json", "quality.md", "quality.png"]
    assert json.loads(written[0].read_text())["figures"][0]["met"] is False
    assert written[2].stat().st_size > 5000


def test_a_stopped_measurement_goes_on_with_the_parts_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def part(name: str, *_: object) -> list[Figure]:
        if name == "cost" and "cost" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return [Figure(name, "x", 1.0)]

    monkeypatch.setattr(run, "_measured", part)
    monkeypatch.setattr(run, "check_programs", lambda: None)
    monkeypatch.setattr(run, "render", lambda *_: [])
    options = run.Options(windows=2, only=("sound", "cost"))
    with pytest.raises(KeyboardInterrupt):
        run.measure(None, options, tmp_path, lambda what, fraction: None)
    done = run.measure(None, options, tmp_path, lambda what, fraction: None)
    assert measured == ["sound", "cost", "cost"]
    assert [figure["part"] for figure in done["figures"]] == ["sound", "cost"]
    assert not list(tmp_path.iterdir())


def test_novelty_stands_beside_the_same_songs_in_the_sounds_of_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(band, "load_songs", lambda folder: [])
    monkeypatch.setattr(band, "training_bank", lambda songs, count: None)
    monkeypatch.setattr(band, "nearest", lambda known, signals: [float(signal[0]) for signal in signals])
    held = SimpleNamespace(window=SimpleNamespace(mixture=np.array([2.0])))
    bands: Any = [SimpleNamespace(held=held, mix=np.array([1.9]))] * 3
    familiar: Any = [SimpleNamespace(mixture=np.array([1.8]))]
    alone = band._novelty(bands, tmp_path, [])
    assert (alone.value, alone.met, alone.ceiling) == (pytest.approx(0.95), False, {})
    beside = band._novelty(bands, tmp_path, familiar)
    assert beside.ceiling == {"the same songs in the sounds of training": pytest.approx(0.9)}
    assert (beside.value, beside.met) == (alone.value, False)
    assert band._novelty(bands, None, []).value is None


def test_what_is_rendered_side_by_side_says_how_far_it_is() -> None:
    seen: list[float] = []
    assert list(windows._in_parallel(abs, [-1, 2, -3, 4], seen.append)) == [1, 2, 3, 4]
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_missing_programs_are_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows.shutil, "which", lambda name: None)
    with pytest.raises(BacklineError, match="MMA is missing: install Debian's mma"):
        windows.check_programs()


@pytest.mark.parametrize(
    "options", [["--only", "drums"], ["--windows", "1"], ["--data", "/nowhere"], ["--samples", "/nowhere"]]
)
def test_requests_that_make_no_sense_are_refused(options: list[str], tmp_path: Path) -> None:
    asked = CliRunner().invoke(app, ["quality", "--out", str(tmp_path), *options])
    assert isinstance(asked.exception, UsageError)


def referenced(page: str) -> set[str]:
    return set(re.findall(r'src="(files/[^"]+)"', (PAGES / page).read_text("utf-8")))


def test_the_pages_name_files_that_are_there_and_small() -> None:
    named = referenced("index.html") | referenced("blind.html")
    there = {f"files/{path.name}" for path in (PAGES / "files").iterdir()}
    assert named == there
    assert len([name for name in referenced("index.html") if name.endswith(".jpg")]) == 12
    sizes = {name: (PAGES / name).stat().st_size for name in named}
    assert all(size > 2000 for size in sizes.values()) and sum(sizes.values()) <= 1_500_000
    for name in named:
        if name.endswith(".mp3"):
            assert soundfile.info(PAGES / name).duration <= 6


def test_the_pages_need_no_network_and_hide_the_key() -> None:
    for page in ("index.html", "blind.html"):
        assert not re.search(r"https?://", (PAGES / page).read_text("utf-8"))
    text = (PAGES / "blind.html").read_text("utf-8")
    asked = re.findall(r'<div class="item" id="(\w+)"', text)
    code = re.search(r'atob\("([^"]+)"\)', text)
    assert code and len(asked) == 14
    mixed = b64decode(code[1])
    secret = examples.SECRET
    key = json.loads(bytes(byte ^ secret[i % len(secret)] for i, byte in enumerate(mixed)))
    assert sorted(key) == sorted(asked) and set(key.values()) == {0, 1}
    for name in referenced("blind.html"):
        assert re.fullmatch(r"files/[0-9a-f]{12}\.mp3", name)
    assert "-made" not in text and "-given" not in text
