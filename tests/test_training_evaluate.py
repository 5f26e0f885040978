"""The evaluation: scores, prompts, novelty and the tables, on models and windows made to order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from training_songs import song

from engine.audio import Audio
from engine.take import Take
from training import evaluate, metrics
from training.bands import Song
from training.charts import timeline
from training.evaluate import PARTS, PROMPTS, markdown, score_split
from training.held_out import SECONDS, Window
from training.mel import GEOMETRY, log_mel, to_bytes
from training.stems import STEMS

RATE = GEOMETRY.sample_rate


def windows(count: int = 2, seconds: float = 6.0) -> list[Window]:
    """Stems that play one chord in bursts of one rhythm, each with noise of its own."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        bursts = np.repeat(rng.random(round(seconds * 8) + 1) < 0.4, RATE // 8)[: round(seconds * RATE)]
        chord = metrics.drone(tuple(rng.choice(12, 3, replace=False).tolist()), len(bursts))
        noise = rng.normal(0, 0.05, (4, len(bursts)))
        stems = ((noise + rng.uniform(0.2, 1, (4, 1)) * chord) * (0.05 + bursts)).astype(np.float32)
        notes = {stem: np.zeros((1, 4)) for stem in STEMS}
        chords = timeline([["C"]] * 8, 4.0)
        about = Song(notes, 120.0, 4.0, 12.0, chords, "C major", "rock", dict.fromkeys(STEMS, "Rock"), False)
        made.append(Window(stems, about, 0.0, 100 + seed))
    return made


def test_split_scores_truth_high_and_the_mix_as_nothing() -> None:
    held_out = windows(seconds=SECONDS)
    truth = score_split(lambda window, mix: window.stems, held_out, "truth")
    mixed = score_split(lambda window, mix: np.repeat(mix.samples, 4, 0), held_out, "mix")
    assert truth["mean"] > 40 and mixed["mean"] == pytest.approx(0, abs=1e-3)
    assert list(truth["stems"]) == list(truth["interval"]) == list(STEMS)
    # 11.9 s are four whole windows of 4 s every 2 s
    assert truth["scored"] == mixed["scored"] == 2 * 4 * 4
    low, high = truth["interval"]["bass"]
    assert low <= truth["stems"]["bass"] <= high


def test_split_compares_methods_and_reports_the_worst_null(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = windows()

    def split(model: object, mix: Audio, *, method: str, raw: bool = False, settings: object) -> Take:
        (window,) = [w for w in held_out if np.array_equal(w.mixture, mix.samples[0])]
        share = {"mask": 1.0, "dirac": 0.5, "gaussian": 0.0}[method]
        parts = share * window.stems + (1 - share) * mix.samples / 4
        return Take({s: Audio(parts[i][None], RATE) for i, s in enumerate(STEMS)})

    monkeypatch.setattr(evaluate, "split", split)
    report = evaluate.evaluate_split(SimpleNamespace(), held_out, slow=1)
    methods = report["methods"]
    assert methods["mask"]["mean"] > methods["dirac"]["mean"] > methods["gaussian"]["mean"] + 1
    assert methods["gaussian"]["mean"] == pytest.approx(0, abs=1e-3)
    assert methods["ideal mask"]["mean"] > methods["shuffled mixture"]["mean"]
    assert methods["dirac"]["scored"] == methods["mask"]["scored"] / 2
    assert report["worst_null_db"] < -100


class Roles(nn.Module):
    """Calls everything the stem of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.tensor([self.number] * len(mel)), 4).float()


def test_fill_hears_a_model_that_copies_and_one_that_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = windows()
    monkeypatch.setattr(evaluate, "FILL_SECONDS", 2.0)

    def fill_with(choose: object) -> dict[str, dict]:
        def fill(model: object, given: dict[str, Audio], armed: list[str], *, settings: object) -> Take:
            assert len(given) == 3 and armed[0] not in given
            return Take({armed[0]: choose(given, armed[0])})

        monkeypatch.setattr(evaluate, "fill", fill)
        return evaluate.evaluate_fill(SimpleNamespace(), held_out, Roles(1))

    def copied(given: dict[str, Audio], armed: str) -> Audio:
        return next(iter(given.values()))

    def truth(given: dict[str, Audio], armed: str) -> Audio:
        (window,) = [
            w for w in held_out if all(np.isin(a.samples[0, :50], w.stems).all() for a in given.values())
        ]
        return Audio(window.stems[STEMS.index(armed)][None, : 2 * RATE] * np.float32(0.1), RATE)

    copying, playing = fill_with(copied), fill_with(truth)
    for stem in STEMS:
        assert copying[stem]["worst_si_sdr_to_context"] > 60
        assert playing[stem]["worst_si_sdr_to_context"] < 0
        assert playing[stem]["own_of_true"] == pytest.approx(1)
        assert playing[stem]["level_difference_db"]["median"] == pytest.approx(-20, abs=1e-3)
        assert playing[stem]["level_within_12_db"] == 0 and copying[stem]["level_within_12_db"] == 1
        assert playing[stem]["copy"]["own"] == 1
        assert playing[stem]["generated"]["sounds_like_role"] == (stem == "drums")


def test_prompts_move_the_right_way_for_a_model_that_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    def tone(frequency: float) -> Audio:
        return Audio(
            0.1 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)[None].astype(np.float32), RATE
        )

    def generate(model: object, *, seconds: float, text: str, settings: object) -> Take:
        high = text in {pair[1] for pair in PROMPTS}
        return Take({stem: tone(2000 if high else 300) for stem in STEMS})

    monkeypatch.setattr(evaluate, "generate", generate)
    rows = evaluate.evaluate_prompts(SimpleNamespace(), seeds=2)
    assert [r["low"] for r in rows] == [p[0] for p in PROMPTS] and len(rows) == 8
    for row in rows:
        if row["figure"] == "brightness":
            assert row["right_way"] and row["share_of_seeds"] == 1 and row["means"][1] > 3 * row["means"][0]
    assert len({p[3] for p in PROMPTS if p[2] == "brightness"}) >= 3


def test_novelty_finds_a_training_window_that_is_played_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "FILL_SECONDS", 2.0)
    learnt = metrics.drone((0, 4, 7), 2 * RATE + GEOMETRY.hop)
    mels = np.zeros((4, 1, 173, GEOMETRY.n_mels), np.uint8)  # a frame more than a window
    mels[0, 0] = to_bytes(log_mel(torch.from_numpy(learnt)[None]))[0]

    def generate(model: object, *, seconds: float, settings: object) -> Take:
        return Take({"bass": Audio(learnt[None], RATE)})

    monkeypatch.setattr(evaluate, "generate", generate)
    songs = [replace(song(0), mels=mels)]
    copied = replace(windows()[0], stems=np.stack([learnt] * 4) / 4)
    report = evaluate.evaluate_novelty(
        SimpleNamespace(), windows(), songs, count=3, seeds=2, familiar=[copied]
    )
    assert report["training_windows"] == 3
    assert report["held_out_familiar"] < 0.1
    assert report["generated"] < 0.1 < 1 < report["held_out"]


def test_fingerprints_do_not_hear_the_level() -> None:
    mels = np.random.default_rng(0).normal(0, 1, (2, 100, 128))
    marks = evaluate._fingerprints(mels)
    assert marks.shape == (2, 8 * 128)
    assert np.allclose(marks, evaluate._fingerprints(mels + 2.5))
    assert not np.allclose(marks[0], marks[1])


def test_sounds_like_names_the_stem() -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, RATE)
    assert [evaluate.sounds_like(Roles(i), audio) for i in range(4)] == list(STEMS)


def report() -> dict:
    score = {"own": 0.9, "aligned": 0.8, "sounds_like_role": 1.0}
    row = dict.fromkeys(("true", "generated", "copy", "drone"), score) | {
        "own_of_true": 0.95,
        "aligned_of_true": 0.81,
        "worst_si_sdr_to_context": -23.4,
        "level_within_12_db": 0.96,
    }
    values = dict.fromkeys(STEMS, 6.25)
    method = {"mean": 6.25, "stems": values, "interval": dict.fromkeys(STEMS, (5.5, 7.0)), "scored": 64}
    prompt = {
        "low": "dark",
        "high": "bright",
        "figure": "brightness",
        "stem": "mix",
        "means": [900.0, 1800.0],
    }
    return {
        "model": "backline-default 1",
        "windows": 24,
        "machine": "x86_64, 2 cores",
        "fill": dict.fromkeys(STEMS, row),
        "split": {"methods": {"mask": method}, "worst_null_db": -123.4},
        "prompts": [
            prompt | {"right_way": True, "share_of_seeds": 1.0},
            prompt | {"right_way": False, "share_of_seeds": 0.2},
        ],
        "novelty": {"generated": 0.5, "held_out": 0.4, "held_out_familiar": 0.3, "training_windows": 2000},
        "speed": {"real_time_factor": 0.3, "threads": 2, "load_s": 1.2, "peak_mb": 900.0},
        "seeds": {"same_seed_same_bytes": True, "other_seed_differs": True},
    }


def test_tables_are_whole_and_leave_out_what_was_not_measured() -> None:
    text = markdown(report())
    assert "| mask | 6.25 | 6.25 (5.5..7.0) |" in text and "-123 dB at worst" in text
    assert "| paper, dirac (other data) | 3.06 | 3.26 |" in text
    assert "1 of 2 move the right way" in text and "900 -> 1.8e+03" in text
    assert "sounds of training 0.300" in text
    assert "real-time factor 0.30 on 2 threads (x86_64, 2 cores)" in text
    assert text.count("| generated |") == 4 and "| piano | 0.95 | 0.81 | 1.00 | -23.4 dB | 0.96 |" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1, "as many cells in every row"
    short = markdown({k: v for k, v in report().items() if k not in PARTS})
    assert "##" not in short and short.startswith("# backline-default 1")


@pytest.mark.parametrize(("only", "missing"), [("fill", "--classifier"), ("novelty", "--data")])
def test_missing_options_are_named(
    only: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--grooves", "g.json", "--only", only])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and missing in capsys.readouterr().err
