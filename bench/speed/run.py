"""The whole measurement of `backline bench speed`, as plain values."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe_machine
from bench.speed.ceilings import Ceilings, ceiling_calls, read_ceilings
from bench.speed.copies import loop_copies, unet_nodes
from bench.speed.cost import Cost, random_feed
from bench.speed.networks import why_not_torch
from bench.speed.peers import contest, diffusers_contest, session_call
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
# The narrowest multiple of 32, which its norms ask for, that is not below a quarter of the released 192.
REFERENCE_WIDTH, REFERENCE_FRAMES = 64, 256
# Rounds at most, and seconds after which no further one begins: stages, jobs, UNet steps.
ROUNDS, LIMITS = 7, (12.0, 8.0, 5.0)
FULL_ROUNDS, FULL_LIMITS = 15, (60.0, 40.0, 60.0)


def measure(
    bundle: Path | None,
    device: Device,
    *,
    full: bool,
    report: Say,
    threads: int | None = None,
    reference: Mapping[str, int] | None = None,
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """Everything that is timed.

    full: also torch.compile, diffusers, batches, copies and a 3-D UNet of the reference's layout. reference:
    its width and frames; empty for the usual ones, None for no such UNet. cuda_graph: as `Model.open` has it.

    Raises BacklineError where the bundle cannot be opened, and on a GPU without torch for CUDA.
    """
    began = time.perf_counter()
    threads = threads or available_cores()
    rounds, limits = (FULL_ROUNDS, FULL_LIMITS) if full else (ROUNDS, LIMITS)
    report("load", 0.0)
    model, loading = load_seconds(bundle, device, threads, cuda_graph)
    where = "cuda" if model.provider == PROVIDERS["cuda"] else "cpu"
    report("count", 0.05)
    feeds, costs = stage_feeds(model), stage_costs(model)
    report("stages", 0.1)
    seconds = interleaved(stage_calls(model) | ceiling_calls(where, threads), rounds, limits[0])
    ceilings = read_ceilings(seconds, where)
    report("end to end", 0.3)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "model": f"{model.manifest.name} {model.manifest.version}",
        "device": where,
        "provider": model.provider,
        "cuda_graph": cuda_graph,
        "warnings": model.warnings,
        "threads": threads,
        "full": full,
        "rounds": len(seconds["step"]),
        "ceilings": vars(ceilings),
        "load_seconds": loading,
        "stages": stage_rows({stage: median(seconds[stage]) for stage in costs}, costs, ceilings),
        "end_to_end": end_to_end(model, Settings(), rounds, limits[1]),
    }
    report("torch", 0.5)
    step = feeds["step"][1]
    result["unet"] = [
        contest(model, step, costs["step"], ceilings, where, rounds=rounds, limit=limits[2], compiled=full)
    ]
    if full:
        result |= _the_rest(model, costs["step"], ceilings, where, report, reference, result)
    result["took_seconds"] = time.perf_counter() - began
    report("done", 1.0)
    return result


def _the_rest(
    model: Model,
    cost: Cost,
    ceilings: Ceilings,
    where: str,
    report: Say,
    reference: Mapping[str, int] | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """What --full adds: the reference's layout, diffusers, batches, copies."""
    report("3-D UNet", 0.6)
    rows = list(result["unet"])
    if reference is not None:
        rows.append(reference_contest(model.device, model.threads, ceilings, where, **reference))
    report("diffusers", 0.8)
    why_not = why_not_torch()
    diffusers = {"missing": why_not} if why_not else diffusers_contest(model.threads, where, cost.flops)
    report("batches", 0.85)
    feed = stage_feeds(model)["step"][1]
    return {
        "unet": rows,
        "diffusers": diffusers,
        "batches": throughput(model, cost, ceilings, where),
        "copies": loop_copies(model, Settings()) | {"nodes": unet_nodes(model, feed)},
    }


def reference_contest(
    device: Device,
    threads: int,
    ceilings: Ceilings,
    where: str,
    width: int = REFERENCE_WIDTH,
    frames: int = REFERENCE_FRAMES,
) -> dict[str, Any]:
    """The step of a 3-D UNet of the released layout with random weights, from a bundle as imported."""
    if reason := why_not_torch():
        return {"network": f"stand-in of width {width}", "missing": {"torch": reason}}
    from bench.speed.stand_in import write_stand_in

    with tempfile.TemporaryDirectory() as folder:
        network = write_stand_in(Path(folder) / "bundle", width, frames)
        model = Model.open(Path(folder) / "bundle", device, threads)
        feed = stage_feeds(model)["step"][1]
        cost = stage_costs(model, ["step"])["step"]
        return contest(
            model, feed, cost, ceilings, where,
            rounds=FULL_ROUNDS, limit=FULL_LIMITS[2], compiled=True, network=network,
        )  # fmt: skip


def throughput(model: Model, cost: Cost, ceilings: Ceilings, where: str) -> list[dict[str, float]]:
    """One UNet step of several windows together: windows a second, against the batch."""
    names = set(model.inputs("unet"))
    calls = {
        str(batch): session_call(model, "unet", random_feed(unet_shapes(model.manifest, batch, names)), where)
        for batch in BATCHES
    }
    medians = {int(k): median(row) for k, row in interleaved(calls, FULL_ROUNDS, FULL_LIMITS[0]).items()}
    return [
        {
            "batch": batch,
            "seconds": seconds,
            "windows_per_second": batch / seconds,
            "of_ceiling": batch * cost.flops / seconds / ceilings.flops,
        }
        for batch, seconds in medians.items()
    ]
