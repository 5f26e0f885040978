"""Copies between host and GPU while a sampler runs, seen by CUDA's own profiler and by onnxruntime's."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.speed.cost import profiled_nodes
from bench.speed.peers import Feed
from bench.speed.stages import window_seconds
from engine.model import Model
from engine.take import Settings
from engine.tasks import generate

FEW, MANY = 4, 12  # steps
TO_DEVICE, TO_HOST = "Memcpy HtoD", "Memcpy DtoH"


def loop_copies(model: Model, settings: Settings) -> dict[str, Any]:
    """Copies a step: those of a take of many steps less those of one of few, over the steps between them.

    Everything that this process asks of the GPU is seen. Without torch for CUDA: a sentence why not.
    """
    if importlib.util.find_spec("torch") is None:
        return {"missing": "torch is not installed, whose profiler counts the copies"}
    import torch

    if not torch.cuda.is_available():
        return {"missing": "there is no CUDA here, so there are no copies to a GPU"}
    few, many = (_counted(model, replace(settings, steps=steps)) for steps in (FEW, MANY))
    return {
        "to_device_per_step": (many[TO_DEVICE] - few[TO_DEVICE]) / (MANY - FEW),
        "to_host_per_step": (many[TO_HOST] - few[TO_HOST]) / (MANY - FEW),
        "in_a_take": {"steps": MANY, "to_device": many[TO_DEVICE], "to_host": many[TO_HOST]},
    }


def _counted(model: Model, settings: Settings) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    generate(model, seconds=window_seconds(model.manifest), settings=settings)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        generate(model, seconds=window_seconds(model.manifest), settings=settings)
    found: Counter[str] = Counter()
    for event in recorded.events():
        for kind in (TO_DEVICE, TO_HOST):
            found[kind] += event.name.startswith(kind)
    return found


def unet_nodes(model: Model, feed: Feed) -> dict[str, Any]:
    """Which provider runs how many of the UNet's nodes, and how many of them only copy (Memcpy)."""
    import onnxruntime as ort

    session = model.session("unet")
    chosen = session.get_provider_options()
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.intra_op_num_threads = model.threads
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        profiled = ort.InferenceSession(
            str(model.bundle.path("unet.onnx")),
            options,
            providers=[(name, chosen[name]) for name in session.get_providers()],
        )
        profiled.run(None, dict(feed))
        nodes = profiled_nodes(profiled)
    return {
        "by_provider": dict(Counter(node["provider"] for node in nodes)),
        "copies": sum(node["op_name"].startswith("Memcpy") for node in nodes),
    }
