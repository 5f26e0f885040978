"""`--quality`: presets from the manifest or derived from its defaults, beside explicit steps and samplers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import backline
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import write_tiny_bundle

from engine.audio import Audio
from engine.bundle import load_bundle
from engine.errors import UsageError
from engine.manifest import Manifest, Preset, Sampling
from engine.model import Model
from engine.separation import POSTERIOR_STEPS, split
from engine.take import Settings, resolve

Capture = pytest.CaptureFixture[str]
OWN = {"draft": {"sampler": "euler", "steps": 3}, "best": {"sampler": "ddim", "steps": 9}}


def with_sampling(manifest: Manifest, **sampling: Any) -> Manifest:
    return manifest.model_copy(update={"sampling": Sampling(**sampling)})


def steps_of(manifest: Manifest, **asked: Any) -> tuple[str | None, int | None]:
    settings = resolve(Settings(**asked), manifest)
    return settings.sampler, settings.steps


def test_normal_is_the_default(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    assert resolve(Settings(), manifest) == resolve(Settings(quality="normal"), manifest)
    assert resolve(Settings(), manifest).quality == "normal"
    assert steps_of(manifest) == (manifest.sampling.sampler, manifest.sampling.steps)


def test_a_bundle_names_its_own_presets(tiny_model: Model) -> None:
    manifest = with_sampling(tiny_model.manifest, sampler="dpmpp_2m", steps=5, quality=OWN)
    assert steps_of(manifest, quality="draft") == ("euler", 3)
    assert steps_of(manifest, quality="normal") == ("dpmpp_2m", 5)
    assert steps_of(manifest, quality="best") == ("ddim", 9)


def test_explicit_steps_and_sampler_go_first(tiny_model: Model) -> None:
    manifest = with_sampling(tiny_model.manifest, steps=5, quality=OWN)
    assert steps_of(manifest, quality="best", steps=2) == ("ddim", 2)
    assert steps_of(manifest, quality="best", sampler="euler") == ("euler", 9)


@given(st.integers(1, 1000), st.sampled_from(["ddim", "dpmpp_2m", "euler"]))
def test_derived_presets_are_in_order_and_in_range(steps: int, sampler: Any) -> None:
    sampling = Sampling(sampler=sampler, steps=steps)
    draft, normal, best = (sampling.preset(q, 1000).steps for q in ("draft", "normal", "best"))
    assert 1 <= draft <= normal <= best <= 1000
    assert draft <= 20
    assert sampling.preset("best", 1000).sampler == sampler


def test_a_draft_of_many_steps_is_left_to_the_better_solver() -> None:
    assert Sampling(sampler="ddim", steps=200).preset("draft", 1000) == Preset(sampler="dpmpp_2m", steps=20)
    assert Sampling(sampler="ddim", steps=16).preset("draft", 1000) == Preset(sampler="ddim", steps=8)


def test_another_quality_is_refused(tiny_model: Model) -> None:
    with pytest.raises(UsageError, match="no quality 'great': choose draft, normal, best"):
        resolve(replace(Settings(), quality="great"), tiny_model.manifest)  # type: ignore[arg-type]


def test_bundles_without_presets_stay_valid_and_those_with_them_are_read(tmp_path: Path) -> None:
    assert load_bundle(write_tiny_bundle(tmp_path / "old")).manifest.sampling.quality == {}
    sampling = {"sampler": "dpmpp_2m", "steps": 5, "quality": OWN}
    read = load_bundle(write_tiny_bundle(tmp_path / "new", sampling=sampling)).manifest.sampling
    assert read.quality["best"] == Preset(sampler="ddim", steps=9)


def test_split_takes_one_look_at_any_quality_and_posteriors_more_steps(
    tiny_model: Model, noise: Audio
) -> None:
    for quality, steps in (("draft", 1), ("best", 1)):
        take = split(tiny_model, noise, settings=Settings(quality=quality))  # type: ignore[arg-type]
        assert take.record["settings"]["steps"] == steps
        assert take.record["settings"]["quality"] == quality
    take = split(tiny_model, noise, method="gaussian", settings=Settings(quality="draft"))
    assert take.record["settings"]["steps"] == POSTERIOR_STEPS // 2


def test_the_command_writes_what_it_resolved(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("--seconds", 1, "--model", tiny_bundle, "--quality", "best", "--no-picture")
    ran = backline(capsys, "generate", "--out", tmp_path / "made", *words)
    assert ran.status == 0, ran
    settings = json.loads((tmp_path / "made" / "take.json").read_text())["settings"]
    sampling = load_bundle(tiny_bundle).manifest.sampling
    assert (settings["quality"], settings["steps"]) == ("best", 2 * sampling.steps)
    ran = backline(capsys, "generate", "--out", tmp_path / "no", *words[:4], "--quality", "great")
    assert ran.status == 2


@pytest.fixture
def noise() -> Audio:
    return Audio(np.random.default_rng(1).standard_normal((1, 16000)).astype(np.float32) / 10, 16000)
