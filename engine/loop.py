"""A window's sampling as two graphs that take turns, the UNet and a step, with all state on the device.

The numpy samplers of engine.samplers say what is computed; here the same runs without a copy between host and
device from the first step to the last. Coefficients, noises and conditions are put on the device once per
window.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.batching import turn
from engine.model import GRAPHS, Asked, Conditions, Model
from engine.samplers import StepCallback, linear_steps, report
from engine.schedule import Schedule

FloatArray = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]
Guidance = tuple[float | FloatArray, float | FloatArray]  # scale and rescale

PASSES = (1, 2, 4)  # of the UNet in one step: without guidance, by one condition, by two
# A row of the step graph's table, see export/step_graph.py.
COLUMNS = ("alpha", "noise", "keep", "take", "x", "clean", "previous", "fresh", "alpha_next", "noise_next")
STATE = ("x", "previous", "counter")
graph_numbers = itertools.count(1)  # names of CUDA graphs; each is recorded over buffers of its own


@dataclass(frozen=True)
class Held:
    """What inpainting holds: known latents (B, S, Z, T, F), mask (B or 1, S, T), 1 where known, and their
    noise.
    """

    known: FloatArray
    mask: FloatArray
    noise: FloatArray


@dataclass
class _Loop:
    """Buffers on the device and the bindings that run on them; the state has two sides that take turns.

    number: names the CUDA graph that is recorded over these buffers.
    """

    values: dict[str, Any]
    sides: list[dict[str, Any]]
    unet: Any
    steps: list[Any]
    number: int


def step_graph_path(passes: int) -> Path:
    """Where the step graph for so many passes lies in the package."""
    return GRAPHS / f"step{passes}.onnx"


def sample_on_device(
    model: Model,
    x: FloatArray,
    passes: Sequence[Conditions],
    *,
    asked: Sequence[Asked] = (),
    guidance: Sequence[Guidance] = (),
    held: Held | None = None,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    """Clean latents (B, S, Z, T, F) from noise `x`, as the sampler of that name returns them.

    passes: the UNet's conditions of each pass, 1, 2 or 4 of them, in the order of export/step_graph.py; they
    run as one batch. asked: what each pass asks the UNet for, what goes with the sampler if not given.
    guidance: scale and rescale (`engine.denoisers.guided`) of the one condition, or of the outer and the
    inner one. eta's noises are drawn from `rng` as the sampler draws them. callback: before the first step
    and after each, raises to cancel.
    """
    path, updates = linear_steps(sampler, model.schedule, steps, eta)
    asked = asked or [asked_by(sampler)] * len(passes)
    told = np.array([[model.told_timestep(t, kind) for kind in asked] for t in path], np.int64)
    told = np.repeat(told, len(x), axis=1)
    feeds = _step_feeds(model, x, path, updates, held, rng)
    feeds["timesteps"] = np.concatenate([told[1:], told[-1:]])
    if guidance:
        scales, rescales = zip(*(list(guidance) * 2)[:2], strict=True)
        feeds |= {"scales": _by_stem(scales, x.shape[1]), "rescales": _by_stem(rescales, x.shape[1])}
    first = _arranged(x, held, model.schedule, path[0])
    unet_feeds = _unet_feeds(model, passes, x.shape)
    unet_feeds["latents"] = np.concatenate([first] * len(passes))
    unet_feeds["timestep"] = told[0]

    key = tuple((name, value.shape) for name, value in sorted((unet_feeds | feeds).items()))
    loop = model.loops.pop(key, None) or _open(model, unet_feeds, feeds, len(passes))
    for name, value in (unet_feeds | feeds).items():
        _fill(loop.values[name], value)
    for name, value in (("x", x), ("previous", np.zeros_like(x)), ("counter", np.zeros((), np.int64))):
        _fill(loop.sides[0][name], value)
    unet, step = model.session("unet"), model.session(f"step{len(passes)}")
    options = model.run_options(graph=loop.number)
    try:
        report(callback, 0, len(path))
        for i in range(len(path)):
            with turn():
                unet.run_with_iobinding(loop.unet, options)
                step.run_with_iobinding(loop.steps[i % 2])
            report(callback, i + 1, len(path))
        return np.array(loop.sides[len(path) % 2]["x"].numpy())
    finally:
        model.loops.clear()  # one is kept: the next window mostly has the same shapes
        model.loops[key] = loop


def asked_by(sampler: str) -> Asked:
    """What a sampler asks the UNet for."""
    return "distilled" if sampler == "distilled" else "ordinary"


def _by_stem(values: Sequence[float | FloatArray], stems: int) -> FloatArray:
    """(2, 1, S, 1, 1, 1) of two values, each one or one for each stem (S, 1, 1, 1)."""
    return np.stack([np.broadcast_to(np.float32(v), (1, stems, 1, 1, 1)) for v in values])


def table(
    schedule: Schedule, path: Sequence[int], updates: NDArray[np.float64], prediction: str
) -> FloatArray:
    """(steps, columns): arrangement, clean latents and update of each step; see COLUMNS."""
    alpha = np.array([schedule.alpha(t) for t in path])
    noise = np.array([schedule.noise(t) for t in path])
    # engine.model.clean_from as keep * latents + take * output
    keep, take = {
        "eps": (1 / alpha, -noise / alpha),
        "v": (alpha, -noise),
        "x0": (np.zeros_like(alpha), np.ones_like(alpha)),
    }[prediction]
    after = [np.append(values[1:], values[-1]) for values in (alpha, noise)]
    return np.column_stack([alpha, noise, keep, take, updates, *after]).astype(np.float32)


def _step_feeds(
    model: Model,
    x: FloatArray,
    path: Sequence[int],
    updates: NDArray[np.float64],
    held: Held | None,
    rng: np.random.Generator | None,
) -> dict[str, NDArray[Any]]:
    fresh = (updates[:, 3] > 0) & (rng is not None)
    updates = updates * [1, 1, 1, rng is not None]
    noises = np.zeros((1, 1, 1, 1, 1, 1), np.float32)
    if rng is not None and fresh.any():
        noises = np.stack([rng.standard_normal(x.shape, np.float32) for _ in range(int(fresh.sum()))])
    feeds: dict[str, NDArray[Any]] = {
        "table": table(model.schedule, path, updates, model.manifest.prediction),
        "draws": np.where(fresh, np.cumsum(fresh) - 1, 0).astype(np.int64),
        "noises": noises,
        "held": np.zeros((1, 1, 1, 1, 1), np.float32),
        "held_noise": np.zeros((1, 1, 1, 1, 1), np.float32),
        "free": np.ones((1, 1, 1, 1, 1), np.float32),
    }
    if held is not None:
        wide = _wide(held)
        feeds |= {"held": wide * held.known, "held_noise": wide * held.noise, "free": 1 - wide}
    return feeds


def _unet_feeds(model: Model, passes: Sequence[Conditions], shape: tuple[int, ...]) -> dict[str, Any]:
    rows = [model.condition_inputs(conditions, shape) for conditions in passes]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _arranged(x: FloatArray, held: Held | None, schedule: Schedule, t: int) -> FloatArray:
    if held is None:
        return x
    wide = _wide(held)
    known = schedule.alpha(t) * held.known + schedule.noise(t) * held.noise
    return ((1 - wide) * x + wide * known).astype(np.float32, copy=False)


def _wide(held: Held) -> FloatArray:
    return held.mask[:, :, None, :, None].astype(np.float32)


def _open(model: Model, unet_feeds: Feeds, step_feeds: Feeds, passes: int) -> _Loop:
    """Allocates everything and binds it: the UNet always reads and writes the same buffers."""
    feeds = {**unet_feeds, **step_feeds}
    values = {name: model.device_value(value.shape, value.dtype) for name, value in feeds.items()}
    latents = unet_feeds["latents"].shape
    batch = (latents[0] // passes, *latents[1:])
    values["prediction"] = model.device_value(latents, np.dtype(np.float32))
    sides = [
        {
            "x": model.device_value(batch, np.dtype(np.float32)),
            "previous": model.device_value(batch, np.dtype(np.float32)),
            "counter": model.device_value((), np.dtype(np.int64)),
        }
        for _ in range(2)
    ]
    unet = model.session("unet").io_binding()
    for name in unet_feeds:
        unet.bind_ortvalue_input(name, values[name])
    unet.bind_ortvalue_output("prediction", values["prediction"])
    steps = []
    for now, after in (sides, sides[::-1]):
        binding = model.session(f"step{passes}").io_binding()
        for name in ("prediction", *step_feeds):
            binding.bind_ortvalue_input(name, values[name])
        for name in STATE:
            binding.bind_ortvalue_input(name, now[name])
            binding.bind_ortvalue_output(f"{name}_next", after[name])
        binding.bind_ortvalue_output("latents", values["latents"])
        binding.bind_ortvalue_output("timestep", values["timestep"])
        steps.append(binding)
    return _Loop(values, sides, unet, steps, next(graph_numbers))


def _fill(value: Any, array: NDArray[Any]) -> None:
    value.update_inplace(np.ascontiguousarray(array))
