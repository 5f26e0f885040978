"""Sessions: what a graph is fed, what comes back, and what is said when it does not fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import ALL, BANDS, CHANNELS, FILM, FRAMES, STEMS, VOCODER_HOP, write_tiny_bundle

from engine import model as engine_model
from engine.bundle import file_sha256
from engine.errors import BacklineError, UsageError
from engine.model import Model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


LATENTS = (1, len(STEMS), CHANNELS, 24, 1)


def test_shapes_round_trip(tiny_model: Model) -> None:
    mels = noise(11, 96, BANDS) - 3  # more than one batch
    latents = tiny_model.encode(mels)
    assert latents.shape == (11, CHANNELS, 24, 1)
    decoded = tiny_model.decode(latents)
    assert decoded.shape == mels.shape
    coarse = mels.reshape(11, 24, FRAMES, CHANNELS, -1).mean(axis=(2, 4))
    assert np.allclose(decoded[:, ::FRAMES, :: BANDS // CHANNELS], coarse, atol=1e-5)
    assert tiny_model.vocode(decoded).shape == (11, 96 * VOCODER_HOP)


@pytest.mark.parametrize("name", ["context", "context_mask", "mixture", "mixture_mask", "mixture_stems"])
def test_every_condition_reaches_the_unet(tiny_model: Model, name: str) -> None:
    shape = {
        "context": LATENTS,
        "context_mask": (1, len(STEMS), 24),
        "mixture": (1, CHANNELS, 24, 1),
        "mixture_mask": (1, 24),
        "mixture_stems": (1, len(STEMS)),
    }[name]
    x = noise(*LATENTS)
    zeros = tiny_model.predict(x, 500, {})
    assert np.array_equal(tiny_model.predict(x, 500, {name: np.zeros(shape, np.float32)}), zeros)
    assert np.abs(tiny_model.predict(x, 500, {name: np.ones(shape, np.float32)}) - zeros).max() > 1e-3


def test_no_prompt_is_the_unconditional_embedding(tmp_path: Path) -> None:
    film = tuple(np.linspace(-1, 1, FILM))
    model = Model.open(write_tiny_bundle(tmp_path / "b", film_uncond=film), "cpu", 1)
    x = noise(*LATENTS)
    said = model.predict(x, 10, {"film": np.array([film], np.float32)})
    assert np.array_equal(model.predict(x, 10, {}), said)


def test_a_denoiser_can_be_called_again(tiny_model: Model) -> None:
    denoise = tiny_model.denoiser({})
    x, other = noise(*LATENTS), noise(*LATENTS) * 0.5
    first = denoise(x, 999)
    kept = first.copy()
    second = denoise(other, 0)
    assert np.array_equal(first, kept)  # not a view of a buffer that is used again
    assert not np.array_equal(first, second)
    assert np.array_equal(denoise(x, 999), first)
    batch = denoise(np.concatenate([x, other]), 999)
    assert np.allclose(batch[0], first[0], atol=1e-5)


def test_an_unknown_condition_is_refused(plain_model: Model) -> None:
    with pytest.raises(BacklineError, match="has no input grid"):
        plain_model.predict(noise(*LATENTS), 5, {"grid": np.zeros((1, 24, 6), np.float32)})


def test_provider_and_threads_are_reported(tiny_model: Model) -> None:
    assert tiny_model.provider == "CPUExecutionProvider"
    assert tiny_model.threads == 1
    assert engine_model.available_cores() >= 1


def test_affinity_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(engine_model.os, "sched_getaffinity"):
        pytest.skip("no affinity on this system")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert engine_model.available_cores() == 1


def test_cuda_without_cuda_is_said_aloud(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    model = Model.open(tiny_bundle, "cuda", 1)
    assert model.provider == "CPUExecutionProvider"
    assert len(model.warnings) == 1
    assert "CPU" in model.warnings[0]
    assert Model.open(tiny_bundle, "auto", 1).warnings == []


def test_a_silent_fall_to_the_cpu_is_said_aloud(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without a GPU lists CUDA and then runs on the CPU without a word."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[Any]) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    model = Model.open(tiny_bundle, "auto", 1)
    assert model.provider == "CPUExecutionProvider"
    assert "CPU" in model.warnings[0]
    model.encode(noise(1, 96, BANDS))
    assert len(model.warnings) == 1


@pytest.mark.parametrize(("device", "threads"), [("tpu", None), ("cpu", 0)])
def test_a_device_that_is_not_there(tiny_bundle: Path, device: Any, threads: int | None) -> None:
    with pytest.raises(UsageError):
        Model.open(tiny_bundle, device, threads)


def test_without_onnxruntime(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BacklineError, match="onnxruntime is not installed"):
        Model.open(tiny_bundle, "cpu", 1)


def test_a_graph_that_onnxruntime_cannot_open(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (folder / "unet.onnx").write_bytes(b"\x08\x09 not a graph")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["unet.onnx"] = file_sha256(folder / "unet.onnx")
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BacklineError, match=r"onnxruntime cannot open .*unet\.onnx") as caught:
        Model.open(folder, "cpu", 1)
    assert "\n" not in str(caught.value)


def test_capabilities_and_inputs_must_agree(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    values = json.loads((folder / "manifest.json").read_text())
    values["capabilities"].remove("context")
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BacklineError, match="undeclared input context, context_mask"):
        Model.open(folder, "cpu", 1)
    write_tiny_bundle(tmp_path / "c", capabilities=("text",))
    values = json.loads((tmp_path / "c/manifest.json").read_text())
    values["capabilities"].append("mixture")
    (tmp_path / "c/manifest.json").write_text(json.dumps(values))
    with pytest.raises(BacklineError, match="no input mixture, mixture_mask"):
        Model.open(tmp_path / "c", "cpu", 1)


def test_a_model_without_prompts_has_no_film(tmp_path: Path) -> None:
    capabilities = [name for name in ALL if name not in ("text", "audio")]
    model = Model.open(write_tiny_bundle(tmp_path / "b", capabilities=capabilities), "cpu", 1)
    assert "film" not in model.inputs("unet")
    assert model.predict(noise(*LATENTS), 1, {}).shape == LATENTS
    with pytest.raises(UsageError, match="takes no text"):
        model.embed_text("warm")


def test_text_embeddings(tiny_model: Model) -> None:
    warm, bright = tiny_model.embed_text("warm piano"), tiny_model.embed_text("bright drums")
    assert warm.shape == (1, FILM)
    assert not np.allclose(warm, bright)
    assert tiny_model.embed_text("warm " * 500).shape == (1, FILM)  # cut at max_tokens


def test_a_tokenizer_that_cannot_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (folder / "tokenizer.json").write_text("{}")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["tokenizer.json"] = file_sha256(folder / "tokenizer.json")
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BacklineError, match="tokenizer"):
        Model.open(folder, "cpu", 1).embed_text("warm")
