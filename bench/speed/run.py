"""The whole measurement of `backline bench speed`, as plain values."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe_machine
from bench.speed.ceilings import Ceilings, cpu_ceilings, cuda_ceilings
from bench.speed.cost import random_feed
from bench.speed.peers import (
    default_contest,
    diffusers_contest,
    reference_contest,
    why_not_torch,
)
from bench.speed.stages import (
    end_to_end,
    load_seconds,
    stage_calls,
    stage_costs,
    stage_feeds,
    stage_rows,
    unet_shapes,
)
from bench.timing import interleaved
from engine.model import PROVIDERS, Device, Model, available_cores
from engine.take import Settings

Say = Callable[[str, float], None]
BATCHES = (1, 2, 4, 8)
ROUNDS, FULL_ROUNDS = 5, 9


def measure(
    bundle: Path | None,
    device: Device,
    *,
    full: bool,
    report: Say,
    threads: int | None = None,
    reference: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Everything that is timed. reference: width and frames of the 3-D UNet, where not the usual ones.

    Raises BacklineError where the bundle cannot be opened or has no UNet that onnxruntime runs.
    """
    threads = threads or available_cores()
    rounds = FULL_ROUNDS if full else ROUNDS
    report("load", 0.0)
    model, loading = load_seconds(bundle, device, threads)
    on_gpu = model.provider == PROVIDERS["cuda"]
    report("ceilings", 0.05)
    ceilings = cuda_ceilings() if on_gpu else cpu_ceilings(threads)
    report("stages", 0.1)
    costs = stage_costs(model)
    seconds = {name: median(row) for name, row in interleaved(stage_calls(model), rounds).items()}
    report("end to end", 0.3)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "model": f"{model.manifest.name} {model.manifest.version}",
        "provider": model.provider,
        "warnings": model.warnings,
        "threads": threads,
        "rounds": rounds,
        "full": full,
        "ceilings": vars(ceilings),
        "load_seconds": loading,
        "stages": stage_rows(seconds, costs, ceilings),
        "end_to_end": end_to_end(model, Settings(), 3),
    }
    report("torch", 0.5)
    result["unet"] = contests(model, full, rounds, reference or {}, on_gpu)
    if full:
        report("batches", 0.9)
        result["batches"] = throughput(model, ceilings, rounds)
    report("done", 1.0)
    return result


def contests(
    model: Model, full: bool, rounds: int, reference: dict[str, int], on_gpu: bool
) -> list[dict[str, Any]]:
    """One UNet step, the engine beside torch: the bundle's, and in full the reference's layout."""
    name, feed = stage_feeds(model)["step"]
    cost = stage_costs(model)["step"]
    if on_gpu:
        return [{"network": name, "missing": {"torch": "timed on a GPU by bench/gpu.py"}}]
    if reason := why_not_torch():
        return [{"network": model.manifest.name, "missing": {"torch": reason}}]
    rows = [default_contest(model, feed, cost, full).run(rounds)]
    if full:
        with reference_contest(model.threads, True, **reference) as contest:
            rows.append(contest.run(max(3, rounds // 2)))
        rows[0]["diffusers"] = diffusers_contest(model.threads, cost)
    return rows


def throughput(model: Model, ceilings: Ceilings, rounds: int) -> list[dict[str, float]]:
    """One UNet step of several windows together: windows a second, against the batch."""
    rows = []
    names = set(model.inputs("unet"))
    calls = {}
    for batch in BATCHES:
        feed = random_feed(unet_shapes(model.manifest, batch, names))
        x = feed.pop("latents")
        del feed["timestep"]
        denoise = model.denoiser(feed)
        calls[str(batch)] = lambda denoise=denoise, x=x: denoise(x, 500)
    flops = stage_costs(model)["step"].flops
    for name, row in interleaved(calls, rounds).items():
        batch, seconds = int(name), median(row)
        rows.append(
            {
                "batch": batch,
                "seconds": seconds,
                "windows_per_second": batch / seconds,
                "of_ceiling": batch * flops / seconds / ceilings.flops,
            }
        )
    return rows


def missing_packages() -> list[str]:
    """What --full would use and is not installed."""
    return [name for name in ("torch", "onnx", "diffusers") if importlib.util.find_spec(name) is None]
