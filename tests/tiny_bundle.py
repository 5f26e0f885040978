"""A bundle of tiny analytic graphs, so that the engine's tests run in milliseconds.

The VAE averages and repeats, so encoding then decoding loses only detail within a latent frame. The UNet's
prediction answers to every input it declares through fixed random weights; past the schedule's last timestep
it has another answer at the same noise, as a distilled one has, and past twice that a third, as a weakened
one has. The vocoder sums one steady cosine per mel band, scaled by the band's magnitude.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.bundle import file_sha256
from engine.manifest import (
    Chords,
    Clap,
    Distilled,
    Grid,
    Latent,
    Level,
    Manifest,
    Mel,
    NoiseSchedule,
    Preset,
    Sampling,
    Vocoder,
    Weakened,
)
from engine.schedule import make_schedule

STEMS = ("bass", "drums", "guitar", "piano")
BANDS, FRAMES, CHANNELS, FILM = 16, 4, 8, 6
HOP, RATE = 160, 16000
VOCODER_HOP, VOCODER_RATE = 320, 32000
WINDOW = 48  # latent frames, 1.92 s
SCHEDULE = NoiseSchedule(start=0.0015, end=0.0195, steps=1000)
ALL = ("text", "audio", "context", "mixture", "grid", "chords")
FEW: dict[str, Any] = {  # what makes the bundle a distilled one
    "capabilities": (*ALL, "distilled"),
    "distilled": Distilled(steps=6, listening=2.0),
    "sampling": Sampling(
        sampler="dpmpp_2m", steps=4, quality={"draft": Preset(sampler="distilled", steps=6)}, listening=2.0
    ),
}
WEAK: dict[str, Any] = {  # and one that is guided by a weakened prediction
    **FEW,
    "capabilities": (*ALL, "distilled", "weakened"),
    "weakened": Weakened(listening={"piano": 3.0}, freed=("piano",)),
}
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def write_tiny_bundle(
    folder: Path, *, capabilities: Sequence[str] = ALL, prediction: str = "v", **fields: Any
) -> Path:
    """Writes the bundle and returns its folder; `fields` replace fields of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    prompted = bool({"text", "audio"} & set(capabilities))
    _write_unet(folder / "unet.onnx", capabilities, prompted, prediction)
    _write_vae(folder)
    _write_vocoder(folder / "vocoder.onnx")
    if "text" in capabilities:
        _write_text_tower(folder)
    if "audio" in capabilities:
        _write_audio_tower(folder / "clap_audio.onnx")
    files = {
        path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"
    }
    values: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "licence": "CC0-1.0",
        "stems": STEMS,
        "mel": Mel(
            sample_rate=RATE,
            n_fft=512,
            win_length=512,
            hop=HOP,
            n_mels=BANDS,
            f_min=0,
            f_max=8000,
            floor=1e-4,
        ),
        "latent": Latent(channels=CHANNELS, frames=FRAMES, freq=1, scale_factor=0.5),
        "vocoder": Vocoder(sample_rate=VOCODER_RATE, hop=VOCODER_HOP, trim=8),
        "schedule": SCHEDULE,
        "prediction": prediction,
        "sampling": Sampling(sampler="dpmpp_2m", steps=4),
        "window_frames": WINDOW,
        "capabilities": tuple(capabilities),
        "film_dim": FILM if prompted else None,
        "film_uncond": (0.0,) * FILM if prompted else None,
        "clap": Clap(tokenizer="tokenizer.json" if "text" in capabilities else None) if prompted else None,
        "grid": Grid() if "grid" in capabilities else None,
        "chords": Chords() if "chords" in capabilities else None,
        "level": Level(mixture_db=-20.0, context_db=-24.0),
        "files": files,
    }
    manifest = Manifest.model_validate(values | fields)
    (folder / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")), "utf-8")
    return folder


class _Graph:
    """Collects the nodes of one graph; `add` returns the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def save(
        self, path: Path, inputs: dict[str, tuple[int, Sequence[Any]]], output: str, shape: Sequence[Any]
    ) -> None:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
            [helper.make_tensor_value_info(output, FLOAT, shape)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))


def _shares() -> tuple[np.ndarray, np.ndarray]:
    schedule = make_schedule(SCHEDULE)
    return np.sqrt(np.tile(schedule.alphas_cumprod, 3)), np.sqrt(1 - np.tile(schedule.alphas_cumprod, 3))


def _write_unet(path: Path, capabilities: Sequence[str], prompted: bool, prediction: str) -> None:
    rng = np.random.default_rng(1)
    stems = len(STEMS)
    g = _Graph()
    inputs: dict[str, tuple[int, Sequence[Any]]] = {
        "latents": (FLOAT, ["B", stems, CHANNELS, "T", 1]),
        "timestep": (INT, ["B"]),
    }

    def weight(*shape: int) -> str:
        return g.constant(rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[:-1])))

    time = g.add("Div", g.add("Cast", "timestep", to=FLOAT), g.constant(1000))
    parts = [
        g.add("Einsum", "latents", weight(stems, CHANNELS, stems * CHANNELS), equation="bsztf,szo->bot"),
        g.add("Einsum", time, weight(1, stems * CHANNELS), equation="b,io->bo"),
    ]
    parts[1] = g.add("Unsqueeze", parts[1], g.constant([2], np.int64))
    if prompted:
        inputs["film"] = (FLOAT, ["B", FILM])
        film = g.add("Einsum", "film", weight(FILM, stems * CHANNELS), equation="be,eo->bo")
        parts.append(g.add("Unsqueeze", film, g.constant([2], np.int64)))
    if "context" in capabilities:
        inputs["context"] = (FLOAT, ["B", stems, CHANNELS, "T", 1])
        inputs["context_mask"] = (FLOAT, ["B", stems, "T"])
        known = weight(stems, CHANNELS, stems * CHANNELS)
        parts.append(g.add("Einsum", "context", known, equation="bsztf,szo->bot"))
        parts.append(g.add("Einsum", "context_mask", weight(stems, stems * CHANNELS), equation="bst,so->bot"))
    if "mixture" in capabilities:
        inputs["mixture"] = (FLOAT, ["B", CHANNELS, "T", 1])
        inputs["mixture_mask"] = (FLOAT, ["B", "T"])
        inputs["mixture_stems"] = (FLOAT, ["B", stems])
        parts.append(g.add("Einsum", "mixture", weight(CHANNELS, stems * CHANNELS), equation="bztf,zo->bot"))
        parts.append(g.add("Einsum", "mixture_mask", weight(1, stems * CHANNELS), equation="bt,io->bot"))
        contained = g.add("Einsum", "mixture_stems", weight(stems, stems * CHANNELS), equation="bs,so->bo")
        parts.append(g.add("Unsqueeze", contained, g.constant([2], np.int64)))
    for name, width in (("grid", 6), ("chords", 25)):
        if name in capabilities:
            inputs[name] = (FLOAT, ["B", "T", width])
            parts.append(g.add("Einsum", name, weight(width, stems * CHANNELS), equation="btc,co->bot"))
    total = parts[0]
    for part in parts[1:]:
        total = g.add("Add", total, part)
    clean = g.add("Reshape", g.add("Tanh", total), g.add("Shape", "latents"))  # F is 1
    # Bounded clean latents at every step, said in the terms of the prediction.
    wide = g.constant([1, 2, 3, 4], np.int64)
    alpha, noise = (g.add("Unsqueeze", g.add("Gather", g.constant(t), "timestep"), wide) for t in _shares())
    if prediction == "x0":
        g.add("Identity", clean, output="prediction")
    elif prediction == "eps":
        rest = g.add("Sub", "latents", g.add("Mul", alpha, clean))
        g.add("Div", rest, noise, output="prediction")
    else:
        rest = g.add("Sub", g.add("Mul", alpha, "latents"), clean)
        g.add("Div", rest, noise, output="prediction")
    g.save(path, inputs, "prediction", ["B", stems, CHANNELS, "T", 1])


def _write_vae(folder: Path) -> None:
    pairs = BANDS // CHANNELS
    encoder = _Graph()
    split = encoder.constant([0, -1, FRAMES, CHANNELS, pairs], np.int64)
    mean = encoder.add("ReduceMean", encoder.add("Reshape", "mel", split), axes=[2, 4], keepdims=0)  # N, T, Z
    mean = encoder.add(
        "Unsqueeze", encoder.add("Transpose", mean, perm=[0, 2, 1]), encoder.constant([3], np.int64)
    )
    scaled = encoder.add("Add", encoder.add("Mul", mean, encoder.constant(0.5)), encoder.constant(2.0))
    encoder.add("Concat", scaled, encoder.add("Mul", scaled, encoder.constant(0.0)), axis=1, output="moments")
    encoder.save(
        folder / "vae_encoder.onnx",
        {"mel": (FLOAT, ["N", 1, "M", BANDS])},
        "moments",
        ["N", 2 * CHANNELS, "T", 1],
    )
    decoder = _Graph()
    mels = decoder.add("Mul", decoder.add("Sub", "latents", decoder.constant(2.0)), decoder.constant(2.0))
    mels = decoder.add("Transpose", mels, perm=[0, 3, 2, 1])  # N, 1, T, Z
    scales = decoder.constant([1, 1, FRAMES, pairs])
    decoder.add(
        "Resize",
        mels,
        "",
        scales,
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
        output="mel",
    )
    decoder.save(
        folder / "vae_decoder.onnx",
        {"latents": (FLOAT, ["N", CHANNELS, "T", 1])},
        "mel",
        ["N", 1, "M", BANDS],
    )


def _write_vocoder(path: Path) -> None:
    g = _Graph()
    # Whole cycles per hop, so that a steady mel is a steady tone.
    n = np.arange(VOCODER_HOP)
    tones = np.cos(2 * np.pi * np.outer(np.arange(1, BANDS + 1) * 2, n) / VOCODER_HOP)
    frames = g.add("MatMul", g.add("Transpose", g.add("Exp", "mel"), perm=[0, 2, 1]), g.constant(0.1 * tones))
    audio = g.add("Reshape", frames, g.constant([0, 1, -1], np.int64))
    g.add("Pad", audio, g.constant([0, 0, 0, 0, 0, 8], np.int64), output="audio")
    g.save(path, {"mel": (FLOAT, ["N", BANDS, "M"])}, "audio", ["N", 1, "L"])


def _write_text_tower(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "warm", "bright", "slow", "fast", "piano", "drums"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    g = _Graph()
    table = g.constant(np.random.default_rng(2).normal(0, 1, (len(words), FILM)))
    mask = g.add("Unsqueeze", g.add("Cast", "attention_mask", to=FLOAT), g.constant([2], np.int64))
    masked = g.add("Mul", g.add("Gather", table, "input_ids"), mask)
    g.add("ReduceSum", masked, g.constant([1], np.int64), keepdims=0, output="embedding")
    ids = {name: (INT, ["B", "L"]) for name in ("input_ids", "attention_mask")}
    g.save(folder / "clap_text.onnx", ids, "embedding", ["B", FILM])


def _write_audio_tower(path: Path) -> None:
    g = _Graph()
    mean = g.add("ReduceMean", "mel", axes=[1, 2], keepdims=0)
    projection = g.constant(np.random.default_rng(3).normal(0, 0.1, (BANDS, FILM)))
    g.add("MatMul", mean, projection, output="embedding")
    g.save(path, {"mel": (FLOAT, ["B", 1, "M", BANDS])}, "embedding", ["B", FILM])
