"""Whom the engine is timed beside: the same networks in torch, eager and compiled, a UNet of diffusers."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.speed.cost import Cost, graph_cost, random_feed
from bench.timing import interleaved
from engine.model import Model

Feed = Mapping[str, NDArray[Any]]
Call = Callable[[], object]
REFERENCE_WIDTH = 48  # a quarter of the released UNet's
REFERENCE_FRAMES = 256


@dataclass
class Contest:
    """Ways to make one UNet step, and why one of those wanted is missing."""

    name: str
    calls: dict[str, Call]
    cost: Cost
    missing: dict[str, str] = field(default_factory=dict)

    def run(self, rounds: int) -> dict[str, Any]:
        """Medians over interleaved rounds, and the engine's time as a multiple of each peer's."""
        seconds = {name: median(row) for name, row in interleaved(self.calls, rounds).items()}
        return {
            "network": self.name,
            "gflop": self.cost.flops / 1e9,
            "seconds": seconds,
            "engine_over": {
                name: seconds["engine"] / value for name, value in seconds.items() if name != "engine"
            },
            "missing": self.missing,
        }


def why_not_torch() -> str | None:
    """A sentence where the peers cannot run at all."""
    absent = [name for name in ("torch", "onnx") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (the extra 'export')"
    return None


def why_not_compile() -> str | None:
    """A sentence where torch.compile cannot run."""
    return None if shutil.which("g++") else "torch.compile wants a C++ compiler (g++), and there is none"


def default_contest(model: Model, feed: Feed, cost: Cost, compiled: bool) -> Contest:
    """The bundle's own UNet, where it is of the default family, with its own weights."""
    contest = Contest(model.manifest.name, {}, cost)
    conditions = {name: value for name, value in feed.items() if name not in ("latents", "timestep")}
    contest.calls["engine"] = _engine_call(model, feed, conditions)
    try:
        from training.from_bundle import read_unet

        network = read_unet(model.bundle)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        contest.missing["torch"] = f"this UNet could not be made again in torch: {error}"
        return contest
    _add_torch(contest, network, feed, model.threads, compiled)
    return contest


@contextlib.contextmanager
def reference_contest(
    threads: int, compiled: bool, width: int = REFERENCE_WIDTH, frames: int = REFERENCE_FRAMES
) -> Iterator[Contest]:
    """A 3-D UNet of the released layout with random weights, exported as a bundle holds it."""
    import onnxruntime as ort
    import torch

    from bench.unet3d import DEPTH, FREQUENCY, export_variant
    from export.unet3d import UNet3d, UNet3dConfig

    torch.manual_seed(0)
    config = UNet3dConfig(width=width)
    network = UNet3d(config).eval().requires_grad_(False)
    shapes = {"latents": (1, config.stems, DEPTH, frames, FREQUENCY), "timestep": (1,)}
    shapes["film"] = (1, config.film_dim or 0)
    feed = random_feed(shapes)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = export_variant("folded", config, network, Path(folder) / "unet.onnx")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        contest = Contest(f"3-D UNet, width {width}", {}, graph_cost(path, feed))
        contest.calls["engine"] = lambda: session.run(None, feed)
        _add_torch(contest, network, feed, threads, compiled)
        yield contest


def diffusers_contest(threads: int, cost: Cost) -> dict[str, Any]:
    """One step of a diffusers UNet of MusicLDM's kind, its width chosen for about as many FLOPs as ours."""
    if importlib.util.find_spec("diffusers") is None:
        return {"missing": "diffusers is not installed (pip install diffusers)"}
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(threads)

    def build(width: int) -> tuple[Any, dict[str, Any], float]:
        torch.manual_seed(0)
        network = UNet2DConditionModel(
            in_channels=8, out_channels=8, sample_size=(256, 16), norm_num_groups=8,
            block_out_channels=(width, 2 * width, 3 * width, 5 * width), layers_per_block=2,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            attention_head_dim=8, cross_attention_dim=None, class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=512, class_embeddings_concat=True,
        ).eval().requires_grad_(False)  # fmt: skip
        inputs = {
            "sample": torch.randn(1, 8, 256, 16), "timestep": torch.tensor(500),
            "encoder_hidden_states": None, "class_labels": torch.randn(1, 512),
        }  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
        return network, inputs, float(counter.get_total_flops())

    network, inputs, flops = min(
        (build(width) for width in (8, 16, 24, 32, 64)), key=lambda found: abs(np.log(found[2] / cost.flops))
    )
    seconds = median(interleaved({"diffusers": lambda: network(**inputs)}, 5)["diffusers"])
    return {"seconds": seconds, "gflop": flops / 1e9, "gflop_per_second": flops / seconds / 1e9}


def _engine_call(model: Model, feed: Feed, conditions: Feed) -> Call:
    denoise = model.denoiser(conditions)
    x, t = feed["latents"], int(feed["timestep"][0])
    return lambda: denoise(x, t)


def _add_torch(contest: Contest, network: Any, feed: Feed, threads: int, compiled: bool) -> None:
    """torch eager and, if asked for, compiled, on as many threads as the engine."""
    import torch

    torch.set_num_threads(threads)
    network = network.eval().requires_grad_(False)
    given = {name: torch.from_numpy(value) for name, value in feed.items()}

    def without_gradient(step: Any) -> Call:
        def call() -> object:
            with torch.no_grad():
                return step(**given)

        return call

    contest.calls["torch"] = without_gradient(network)
    if not compiled:
        return
    reason = why_not_compile()
    if reason:
        contest.missing["torch.compile"] = reason
        return
    contest.calls["torch.compile"] = without_gradient(torch.compile(network))
