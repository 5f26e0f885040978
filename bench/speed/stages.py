"""The stages of a job, each as a graph with inputs of one window, and the whole of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.speed.ceilings import Ceilings
from bench.speed.cost import Cost, graph_cost, random_feed
from bench.timing import interleaved
from engine.manifest import Manifest
from engine.model import Device, Model
from engine.take import Settings
from engine.tasks import generate

Feed = dict[str, NDArray[Any]]


def unet_shapes(manifest: Manifest, batch: int, names: set[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the UNet's inputs for one window."""
    stems, channels, frames, freq = manifest.latent_shape
    known = {
        "latents": (batch, stems, channels, frames, freq),
        "timestep": (batch,),
        "film": (batch, manifest.film_dim or 0),
        "context": (batch, stems, channels, frames, freq),
        "context_mask": (batch, stems, frames),
        "mixture": (batch, channels, frames, freq),
        "mixture_mask": (batch, frames),
        "mixture_stems": (batch, stems),
        "grid": (batch, frames, 6),
        "chords": (batch, frames, 25),
    }
    return {name: shape for name, shape in known.items() if name in names}


def stage_feeds(model: Model) -> dict[str, tuple[str, Feed]]:
    """Stage -> graph and inputs: one window of all stems, one UNet step of one window."""
    manifest = model.manifest
    stems, channels, frames, freq = manifest.latent_shape
    length, bands = frames * manifest.latent.frames, manifest.mel.n_mels
    quiet = np.full((stems, length, bands), np.log(manifest.mel.floor) + 2, np.float32)
    return {
        "encode": ("vae_encoder", {"mel": quiet[:, None]}),
        "step": ("unet", random_feed(unet_shapes(manifest, 1, set(model.inputs("unet"))))),
        "decode": ("vae_decoder", random_feed({"latents": (stems, channels, frames, freq)})),
        "vocode": ("vocoder", {"mel": np.ascontiguousarray(quiet.transpose(0, 2, 1))}),
    }


def stage_calls(model: Model) -> dict[str, Callable[[], object]]:
    """Each stage as the engine runs it."""
    feeds = stage_feeds(model)
    mels = feeds["encode"][1]["mel"][:, 0]
    latents = feeds["decode"][1]["latents"]
    unet = dict(feeds["step"][1])
    x, _ = unet.pop("latents"), unet.pop("timestep")
    denoise = model.denoiser(unet)
    return {
        "encode": lambda: model.encode(mels),
        "step": lambda: denoise(x, 500),
        "decode": lambda: model.decode(latents),
        "vocode": lambda: model.vocode(mels),
    }


def stage_costs(
    model: Model, stages: Sequence[str] = ("encode", "step", "decode", "vocode")
) -> dict[str, Cost]:
    """What these stages have to compute and move."""
    feeds = stage_feeds(model)
    return {
        stage: graph_cost(model.bundle.path(f"{feeds[stage][0]}.onnx"), feeds[stage][1]) for stage in stages
    }


def stage_rows(seconds: dict[str, float], costs: dict[str, Cost], ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row a stage: seconds, what it computes and moves, and how many times its floor it takes."""
    rows = []
    for stage, cost in costs.items():
        floor = cost.floor(ceilings.flops, ceilings.bytes)
        rows.append(
            {
                "stage": stage,
                "seconds": seconds[stage],
                "gflop": cost.flops / 1e9,
                "megabytes": cost.bytes / 1e6,
                "activation_megabytes": cost.activations / 1e6,
                "floor_seconds": floor,
                "bound": "arithmetic" if cost.flops / ceilings.flops >= floor else "memory",
                "times_floor": seconds[stage] / floor,
            }
        )
    return rows


def load_seconds(
    bundle: Path | None, device: Device, threads: int, cuda_graph: bool = False
) -> tuple[Model, float]:
    """A model with every session started, and how long that took."""
    started = time.perf_counter()
    model = Model.open(bundle, device, threads, cuda_graph=cuda_graph)
    for graph in ("vae_encoder", "vae_decoder", "vocoder"):
        model.inputs(graph)
    return model, time.perf_counter() - started


def window_seconds(manifest: Manifest) -> float:
    """Of one whole window: 10 s of the default bundle, 10.24 s of the reference."""
    return manifest.window_samples / manifest.mel.sample_rate


def end_to_end(model: Model, settings: Settings, rounds: int, limit: float) -> dict[str, Any]:
    """A window of all stems, from noise to audio: its real-time factor, and the parts of the last round."""
    length = window_seconds(model.manifest)
    takes = []

    def job() -> None:
        takes.append(generate(model, seconds=length, settings=settings))

    took = median(interleaved({"job": job}, rounds, limit)["job"])
    record = takes[-1].record
    return {
        "window_seconds": length,
        "seconds": took,
        "real_time_factor": took / length,
        "steps": record["settings"]["steps"],
        "sampler": record["settings"]["sampler"],
        "parts": {name: round(value, 4) for name, value in record["timings"].items() if name != "load"},
    }
