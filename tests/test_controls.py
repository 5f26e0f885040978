"""Tempo and chords as controls: charts from words and files, in every command, and models without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import backline, noise, refused
from test_session_filling import RATE, Listener, arm, song

from bridge.charts import chart
from bridge.filling import fill_armed, local_engine
from engine.conditions import parse_chords
from engine.errors import UsageError
from engine.model import Model
from engine.take import Settings
from plugin_host.host import Span
from plugin_host.session_file import TempoPoint

CHART = "C | Am | F | G7"


def test_a_chart_in_a_file_is_the_one_in_words(tmp_path: Path) -> None:
    file = tmp_path / "chart.txt"
    file.write_text("# verse\nC | Am # home\n\n| F |\nG7\n", "utf-8")
    assert chart(f"@{file}") == CHART
    assert chart(CHART) == CHART and chart(None) is None
    file.write_text("C# | F#m7 | Bb/D", "utf-8")
    assert chart(f"@{file}") == "C# | F#m7 | Bb/D"


@pytest.mark.parametrize("content", [b"C | H7", b"", b"# nothing\n", b"\xff\xfe\x00", b"C |" * 9000])
def test_what_is_no_chart_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chart.txt").write_bytes(content)
    with pytest.raises(UsageError):
        chart(f"@{tmp_path / 'chart.txt'}")
    with pytest.raises(UsageError, match="cannot be read"):
        chart(f"@{tmp_path / 'absent.txt'}")


def test_generate_follows_the_chart_of_a_file(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chart.txt"
    file.write_text(CHART.replace(" | ", "\n"), "utf-8")
    made = {}
    for name, chords in {"words": CHART, "file": f"@{file}", "other": "Eb | Bb"}.items():
        asked = ["--bpm", 100, "--chords", chords, "--seconds", 3, "--seed", 1, "--steps", 1, "--no-picture"]
        ran = backline(capsys, "generate", "--out", tmp_path / name, "--model", tiny_bundle, *asked)
        assert ran.status == 0, ran
        made[name] = soundfile.read(tmp_path / name / "mix.wav")[0]
    assert np.array_equal(made["words"], made["file"])
    assert not np.array_equal(made["words"], made["other"])


@pytest.mark.parametrize(
    ("asked", "word"), [(["--bpm", 120], "takes no tempo"), (["--bpm", 120, "--chords", "C"], "no chords")]
)
def test_a_model_without_the_control_says_so(
    asked: list[object],
    word: str,
    plain_model: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    soundfile.write(given / "bass.wav", noise(2.0), 22050)
    common = ["--model", plain_model.bundle.folder, "--out", tmp_path / "out", *asked]
    refused(backline(capsys, "generate", *common), 2, word)
    refused(backline(capsys, "fill", given, "--arm", "piano", *common), 2, word)
    assert not (tmp_path / "out").exists()


def test_a_session_tells_chords_with_its_own_tempo_and_bars(tmp_path: Path) -> None:
    host, engine = song(tmp_path, ("bass", "drums")), Listener()
    host.set_tempo([TempoPoint(position=0, bpm=90, numerator=3, denominator=4)])
    arm(host, "piano")
    fill_armed(host, engine, chords=CHART, span=Span(RATE // 2, 2 * RATE))
    assert engine.told["chords"] == CHART
    assert (engine.told["bpm"], engine.told["beats_per_bar"]) == (90, 3)
    assert engine.told["first_beat"] == pytest.approx(1.5)


def test_a_session_refuses_chords_where_the_tempo_changes(tmp_path: Path) -> None:
    host, engine = song(tmp_path, ("bass",)), Listener()
    host.set_tempo([TempoPoint(position=0, bpm=90), TempoPoint(position=RATE, bpm=120)])
    arm(host, "piano")
    with pytest.raises(UsageError, match="Chords need a tempo"):
        fill_armed(host, engine, chords=CHART)
    fill_armed(host, engine)  # without chords it plays, told no tempo
    assert engine.told["bpm"] is None


def test_the_model_in_this_process_plays_other_notes_for_other_chords(
    tiny_model: Model, tmp_path: Path
) -> None:
    host = song(tmp_path, ("bass", "drums"))
    engine = local_engine(tiny_model, Settings(steps=1))
    arm(host, "piano")
    assert len(parse_chords(CHART)) == 4
    regions = []
    for chords in (CHART, "Eb | Bb"):
        fill_armed(host, engine, chords=chords, seed=1)
        arm(host, "piano")
        track = next(track for track in host.state.tracks if track.name == "piano")
        file = track.regions[-1].takes[-1].file
        regions.append(soundfile.read(host.folder / "audio" / file)[0])
    assert not np.array_equal(*regions)
