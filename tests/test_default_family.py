"""The default family's networks, exported: graphs that compute what torch does, and every task on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from default_family import CHANNELS, FILM, FRAMES, MELS, WINDOW, networks

from engine.audio import Audio
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill, generate, split
from export.bundle_writer import graph_inputs, graph_outputs
from export.onnx_writer import relative_error, write_graph


@pytest.fixture(scope="module")
def model(tiny_default_bundle: Path) -> Model:
    return Model.open(tiny_default_bundle, "cpu", 1)


@pytest.mark.parametrize(
    "graph", ["unet", "vae_encoder", "vae_decoder", "vocoder", "clap_text", "clap_audio", "separator"]
)
def test_float32_graphs_equal_torch(model: Model, graph: str, tmp_path: Path) -> None:
    """At lengths that the networks' own halving does not divide, too (a separator's frames are even)."""
    sizes = [
        {"batch": batch, "time": time, "frames": time * FRAMES, "length": length}
        for batch, time, length in ((1, 12, 3), (2, 17, 6))
    ]
    inputs, outputs = graph_inputs(model.manifest, graph), graph_outputs(model.manifest, graph)
    assert write_graph(networks()[graph], inputs, outputs, tmp_path / "graph.onnx", sizes=sizes) <= 1e-4


def test_bundle_says_how_near_its_float16_graphs_are(model: Model) -> None:
    export = model.manifest.provenance["export"]
    assert export["precision"] == "fp16" and set(export["relative_error"]) == set(networks())
    assert all(0 < error <= 2e-2 for error in export["relative_error"].values())


def test_every_condition_reaches_the_prediction(model: Model) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, CHANNELS, 12, 1), np.float32)
    plain = model.predict(x, 400, {})
    mask = {"context": "context_mask", "mixture_stems": "mixture_mask"}
    for name, shape in (
        ("film", (1, FILM)),
        ("context", x.shape),
        ("context_mask", (1, 4, 12)),
        ("mixture", (1, CHANNELS, 12, 1)),
        ("mixture_mask", (1, 12)),
        ("mixture_stems", (1, 4)),
        ("grid", (1, 12, 6)),
        ("chords", (1, 12, 25)),
    ):
        known = {name: np.abs(rng.standard_normal(shape, np.float32))}
        if name in mask:
            known[mask[name]] = np.ones((1, 4, 12) if name == "context" else (1, 12), np.float32)
        assert relative_error(model.predict(x, 400, known), plain) > 1e-3, name


def test_encoding_takes_torchs_mean(model: Model) -> None:
    mel = np.random.default_rng(0).standard_normal((2, WINDOW * FRAMES, MELS), np.float32) - 5
    with torch.no_grad():
        moments = networks()["vae_encoder"].eval()(torch.from_numpy(mel)[:, None])
    assert relative_error(model.encode(mel), moments[:, :CHANNELS].numpy() * 0.5) <= 2e-2


def test_every_task(model: Model) -> None:
    settings = Settings(seed=1, steps=2)
    rng = np.random.default_rng(0)
    stems = model.manifest.stems
    sources = {name: Audio(0.1 * rng.standard_normal((1, 20000), np.float32), 16000) for name in stems}
    takes = [
        generate(model, seconds=1.0, settings=settings, **options)  # type: ignore[arg-type]
        for options in (
            {},
            {"text": "warm piano"},
            {"audio": sources["bass"]},
            {"bpm": 120},
            {"bpm": 120, "chords": "C | Am"},
        )
    ]
    sounds = [np.concatenate([audio.samples for audio in take.stems.values()]) for take in takes]
    assert all(np.isfinite(sound).all() and np.any(sound) for sound in sounds)
    assert all(relative_error(sound, sounds[0]) > 1e-4 for sound in sounds[1:])
    armed = fill(model, {name: sources[name] for name in stems[:3]}, ["piano"], settings=settings)
    assert armed.stems["piano"].samples.shape == (1, 20000)
    mix = Audio(np.sum([audio.samples for audio in sources.values()], axis=0), 16000)
    for method in ("mask", "dirac", "gaussian"):
        parts = split(model, mix, method=method, settings=settings)
        total = np.sum([audio.samples for audio in parts.stems.values()], axis=0)
        assert relative_error(total, mix.samples) < 1e-5
