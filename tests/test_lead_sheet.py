"""Bands that are told neither tempo nor chords draw them from their seed, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import backline
from tiny_bundle import VOCODER_RATE

from engine import tasks
from engine.audio import Audio
from engine.conditions import parse_chords
from engine.lead_sheet import FASTEST, KEYS, SLOWEST, draw_bpm, draw_chords
from engine.model import Model
from engine.take import Settings, Take
from engine.windows import Batch

SEEDS = range(300)


def content(take: Take) -> bytes:
    return b"".join(take.stems[name].samples.tobytes() for name in sorted(take.stems))


def band(model: Model, seed: int = 4, **asked: Any) -> Take:
    return tasks.generate(model, seconds=1, settings=Settings(seed=seed, steps=2), **asked)


def test_tempos_are_whole_and_all_over_the_range() -> None:
    drawn = np.array([draw_bpm(seed) for seed in SEEDS])
    assert (drawn == drawn.round()).all() and drawn.min() >= SLOWEST and drawn.max() <= FASTEST
    assert drawn.min() < 80 and drawn.max() > 135
    assert abs((drawn < np.sqrt(SLOWEST * FASTEST)).mean() - 0.5) < 0.1


def test_charts_are_two_loops_in_one_key() -> None:
    charts = [draw_chords(seed) for seed in SEEDS]
    assert len(set(charts)) > 200
    for chart in charts:
        bars = chart.split(" | ")
        assert bars[:4] == bars[4:8] and bars[8:12] == bars[12:] and bars[:4] != bars[8:12]
        roots = np.array([vector[:12] for bar in parse_chords(chart) for vector in bar])
        assert len(bars) == len(roots) == 16 and (roots.sum(1) == 1).all()
    firsts = {chart.split()[0].rstrip("maj7") for chart in charts}
    assert firsts == set(KEYS)


def test_what_was_drawn_is_in_the_record_and_plays_as_if_it_had_been_told(tiny_model: Model) -> None:
    take = band(tiny_model)
    request = take.record["request"]
    assert request["bpm"] == draw_bpm(4) and request["chords"] == draw_chords(4)
    told = band(tiny_model, bpm=request["bpm"], chords=request["chords"])
    assert content(take) == content(told)
    assert content(take) != content(band(tiny_model, free=True))


@pytest.mark.parametrize("asked", [{"audio": True}, {"free": True}, {"text": "slow funk", "free": True}])
def test_nothing_is_drawn_beside_audio_or_for_the_free(tiny_model: Model, asked: dict[str, Any]) -> None:
    if "audio" in asked:
        noise = np.random.default_rng(0).normal(0, 0.1, (1, VOCODER_RATE)).astype(np.float32)
        asked = {"audio": Audio(noise, VOCODER_RATE)}
    request = band(tiny_model, **asked).record["request"]
    assert request["bpm"] is None and request["chords"] is None


def test_what_is_drawn_is_what_the_prompt_says() -> None:
    slow, fast = (np.array([draw_bpm(seed, f"a {pace} band") for seed in SEEDS]) for pace in ("slow", "Fast"))
    assert slow.min() >= 70 and slow.max() <= 92 and fast.min() >= 128 and fast.max() <= 152
    assert len(set(slow)) > 10 and len(set(fast)) > 10
    assert {draw_bpm(seed, "fast, at 87.5 BPM") for seed in SEEDS} == {87.5}
    keys = {draw_chords(seed, "in minor").split(" | ")[0][-1] for seed in SEEDS}
    assert keys == {"m", "7"}, "minor, or its seventh"
    assert any("maj7" in draw_chords(seed, "in major") for seed in SEEDS)
    assert not any("maj7" in draw_chords(seed, "in minor") for seed in SEEDS)


@pytest.mark.parametrize("prompt", ["", "rock band", "breakfast slowly", "at 900 bpm", "major or minor"])
def test_what_the_prompt_does_not_say_is_drawn_as_without_one(prompt: str) -> None:
    assert [draw_bpm(seed, prompt) for seed in SEEDS] == [draw_bpm(seed) for seed in SEEDS]
    assert [draw_chords(seed, prompt) for seed in SEEDS] == [draw_chords(seed) for seed in SEEDS]


def test_a_prompt_has_its_tempo_metre_and_chords(tiny_model: Model) -> None:
    request = band(tiny_model, text="slow waltz in minor").record["request"]
    assert request["bpm"] == draw_bpm(4, "slow") and request["chords"] == draw_chords(4, "minor")
    assert request["beats_per_bar"] == 3
    request = band(tiny_model, text="slow waltz", bpm=100).record["request"]
    assert request["bpm"] == 100 and request["beats_per_bar"] == 4, "told a tempo, it is told its metre"


def test_only_what_is_missing_is_drawn(tiny_model: Model, plain_model: Model) -> None:
    request = band(tiny_model, text=" ", bpm=91.5).record["request"]
    assert request["bpm"] == 91.5 and request["chords"] == draw_chords(4)
    assert band(plain_model).record["request"]["bpm"] is None, "a model that takes no tempo is told none"


def test_the_takes_of_a_batch_have_a_tempo_each(tiny_model: Model) -> None:
    batch = Batch([4, 5])
    for seed in batch.seeds:
        take = band(tiny_model, seed, batch=batch)
        assert take.record["request"]["bpm"] == draw_bpm(seed)
        assert content(take) == content(band(tiny_model, seed))


def test_the_command_says_what_it_drew(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_bundle), "--seconds", "1", "--seed", "4", "--no-picture"]
    done = backline(capsys, "generate", "--out", tmp_path / "a", *options)
    assert f"{draw_bpm(4):g} bpm: {draw_chords(4)}" in done.out
    done = backline(capsys, "generate", "--out", tmp_path / "c", "--text", "a slow waltz", *options)
    assert f"{draw_bpm(4, 'slow'):g} bpm, 3 beats a bar: {draw_chords(4)}" in done.out
    done = backline(capsys, "generate", "--out", tmp_path / "b", "--free", "--json", *options)
    assert done.json["take"]["request"]["bpm"] is None
