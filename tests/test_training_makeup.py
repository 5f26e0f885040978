"""Makeup gain: what is measured is what is missing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from tiny_bundle import FEW, write_tiny_bundle

from engine.errors import BacklineError
from engine.manifest import Preset
from engine.model import Model
from engine.take import Settings
from engine.tasks import generate
from training.bands import Song
from training.charts import timeline
from training.held_out import RATE, Window
from training.makeup import (
    SAMPLES,
    louder_in_ordinary_steps,
    made_up,
    retuned,
    too_quiet,
    too_quiet_alone,
)
from training.metrics import rms_db
from training.stems import STEMS


class Heard:
    """As much of a window as is looked at: stems of noise at different levels."""

    seed = 3
    song = Song({}, 120.0, 4.0, 8.0, timeline([["C"], ["F"]], 4.0), "C major", "rock", {}, False)
    stems = np.random.default_rng(0).normal(0, 1, (len(STEMS), SAMPLES + RATE)).astype(np.float32)
    stems *= np.array([[0.1], [0.05], [0.02], [0.01]], np.float32)


class Quiet(Heard):
    """So much that no band of these levels clips."""

    stems = Heard.stems * np.float32(0.1)


def test_what_is_made_up_is_what_was_missing(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.makeup.SAMPLES", 2 * RATE)
    windows = [cast(Window, Heard())]
    found = too_quiet(tiny_model, windows)
    assert set(found) == set(STEMS) and all(np.isfinite(list(found.values())))
    assert rms_db(Heard.stems[0]) == pytest.approx(-20, abs=0.1)
    louder = copy.copy(tiny_model)
    alone = too_quiet_alone(tiny_model, windows)
    louder.manifest = made_up(tiny_model.manifest, found, alone, {})
    assert too_quiet(louder, windows) == pytest.approx(dict.fromkeys(STEMS, 0.0), abs=0.05)


def test_bands_from_nothing_come_out_at_the_level_of_true_stems(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.makeup.SAMPLES", 2 * RATE)
    windows = [cast(Window, Quiet())] * 3
    alone = too_quiet_alone(tiny_model, windows)
    level = tiny_model.manifest.level
    assert level is not None
    levelled = copy.copy(tiny_model)
    levelled.manifest = made_up(tiny_model.manifest, {"bass": 3.0}, alone, {})
    assert levelled.manifest.level is not None and levelled.manifest.level.makeup_db == {"bass": 3.0}
    made = generate(levelled, seconds=2, settings=Settings(seed=Heard.seed))
    for stem, truth in zip(STEMS, Quiet.stems, strict=True):
        assert rms_db(made.stems[stem].samples[0]) == pytest.approx(rms_db(truth), abs=0.2)


def test_ordinary_steps_come_out_as_loud_as_distilled_ones(
    tmp_path: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.makeup.SAMPLES", 2 * RATE)
    windows = [cast(Window, Heard())]
    assert louder_in_ordinary_steps(tiny_model, windows) == {}, "all its steps are ordinary"
    model = Model.open(write_tiny_bundle(tmp_path / "few", **FEW), "cpu", 2)
    best = Preset(sampler="dpmpp_2m", steps=3)
    sampling = model.manifest.sampling.model_copy(
        update={"sampler": "distilled", "steps": 6, "quality": {"best": best}}
    )
    model.manifest = model.manifest.model_copy(update={"sampling": sampling})
    louder = louder_in_ordinary_steps(model, windows)
    assert set(louder) == set(STEMS) and any(abs(by) > 0.1 for by in louder.values())
    model.manifest = made_up(model.manifest, {}, {}, louder)
    assert louder_in_ordinary_steps(model, windows) == pytest.approx(dict.fromkeys(STEMS, 0.0), abs=0.06)


def test_another_listening(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    assert retuned(manifest, None, None) == manifest
    changed = retuned(manifest, 1.5, "9")
    assert changed.sampling.listening == 1.5 and changed.version == "9"
    assert changed.sampling.steps == manifest.sampling.steps and changed.files == manifest.files


def test_a_bundle_without_levels_is_refused(tiny_model: Model) -> None:
    deaf = tiny_model.manifest.model_copy(update={"level": None})
    with pytest.raises(BacklineError, match="declares no level"):
        made_up(deaf, {"bass": 1.0}, {"bass": 1.0}, {})
