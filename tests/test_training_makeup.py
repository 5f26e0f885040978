"""Makeup gain: what is measured is what is missing."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import pytest

from engine.errors import BacklineError
from engine.model import Model
from training.held_out import RATE, Window
from training.makeup import SAMPLES, made_up, retuned, too_quiet
from training.metrics import rms_db
from training.stems import STEMS


class Heard:
    """As much of a window as is looked at: stems of noise at different levels."""

    seed = 3
    stems = np.random.default_rng(0).normal(0, 1, (len(STEMS), SAMPLES + RATE)).astype(np.float32)
    stems *= np.array([[0.1], [0.05], [0.02], [0.01]], np.float32)


def test_what_is_made_up_is_what_was_missing(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.makeup.SAMPLES", 2 * RATE)
    windows = [cast(Window, Heard())]
    found = too_quiet(tiny_model, windows)
    assert set(found) == set(STEMS) and all(np.isfinite(list(found.values())))
    assert rms_db(Heard.stems[0]) == pytest.approx(-20, abs=0.1)
    louder = copy.copy(tiny_model)
    louder.manifest = made_up(tiny_model.manifest, found)
    assert too_quiet(louder, windows) == pytest.approx(dict.fromkeys(STEMS, 0.0), abs=0.05)


def test_another_listening(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    assert retuned(manifest, None, None) == manifest
    changed = retuned(manifest, 1.5, "9")
    assert changed.sampling.listening == 1.5 and changed.version == "9"
    assert changed.sampling.steps == manifest.sampling.steps and changed.files == manifest.files


def test_a_bundle_without_levels_is_refused(tiny_model: Model) -> None:
    deaf = tiny_model.manifest.model_copy(update={"level": None})
    with pytest.raises(BacklineError, match="declares no level"):
        made_up(deaf, {"bass": 1.0})
