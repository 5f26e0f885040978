"""What every task takes and returns: settings, a take, progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np

from engine.audio import Audio, add_into, empty
from engine.errors import UsageError
from engine.manifest import Manifest, Quality
from engine.model import Model
from engine.samplers import SAMPLERS

Callback = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How to sample; None takes the bundle's own default.

    seed: the same seed gives the same bytes on the same device. eta: 0 deterministic .. 1 as much fresh
    noise as the model's own process. guidance: weight of the prompt, 1 is none. listening: the same for
    what `fill` hears, and 1 in `generate` if not given; the sampler `distilled` has learnt its own. gamma:
    width of the Gaussian posterior in units of sigma. quality: the bundle's steps and sampler for `draft`,
    `normal` (if not given) or `best`; steps and sampler, where given, go before it.
    """

    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    listening: float | None = None
    eta: float | None = None
    gamma: float = 1.0
    quality: Quality | None = None


@dataclass(frozen=True)
class Take:
    """stems: audio by stem name; record: what take.json says, enough to make the take again."""

    stems: dict[str, Audio]
    record: dict[str, Any] = field(default_factory=dict)

    def mix(self) -> Audio:
        """The sum of the stems."""
        parts = list(self.stems.values())
        total = empty(*parts[0].samples.shape)
        for part in parts:
            add_into(total, part.samples)
        return Audio(total, parts[0].sample_rate)


def resolve(settings: Settings, manifest: Manifest, *, listening: float | None = None) -> Settings:
    """Every None filled in from the manifest, that of the listening with `listening` where it is given.

    Where a quality stands for distilled steps and the settings ask for other steps or a listening, `best` is
    sampled. Raises UsageError for values out of range.
    """
    defaults = manifest.sampling
    quality = settings.quality or "normal"
    if quality not in get_args(Quality):
        raise UsageError(f"There is no quality {quality!r}: choose {', '.join(get_args(Quality))}.")
    preset = defaults.preset(quality, manifest.schedule.steps)
    otherwise = settings.steps not in (None, preset.steps) or settings.listening is not None
    if settings.sampler is None and preset.sampler == "distilled" and otherwise:
        preset = defaults.preset("best", manifest.schedule.steps)
    steps = preset.steps if settings.steps is None else settings.steps
    sampler = preset.sampler if settings.sampler is None else settings.sampler
    guidance = defaults.guidance if settings.guidance is None else settings.guidance
    weight = defaults.listening if listening is None else listening
    weight = weight if settings.listening is None else settings.listening
    eta = defaults.eta if settings.eta is None else settings.eta
    if not 0 <= settings.seed < 1 << 63:
        raise UsageError(f"The seed must be 0 or more and below 2^63, not {settings.seed}.")
    if sampler not in SAMPLERS:
        raise UsageError(f"There is no sampler {sampler!r}: choose {', '.join(SAMPLERS)}.")
    if sampler == "distilled":
        steps, weight = _distilled(settings, manifest), 1.0
    if not 1 <= steps <= manifest.schedule.steps:
        raise UsageError(f"The number of steps must be 1 to {manifest.schedule.steps}, not {steps}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta must be 0 to 1, not {eta}.")
    for name, value in (("guidance", guidance), ("listening", weight)):
        if not (np.isfinite(value) and value >= 0):
            raise UsageError(f"The {name} must be 0 or more, not {value}.")
    if not (np.isfinite(settings.gamma) and settings.gamma > 0):
        raise UsageError(f"gamma must be above 0, not {settings.gamma}.")
    return replace(
        settings,
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        listening=weight,
        eta=eta,
        quality=quality,
    )


def _distilled(settings: Settings, manifest: Manifest) -> int:
    """Steps of distilled sampling. Raises UsageError where it cannot be had as these settings want it."""
    if manifest.distilled is None:
        raise UsageError(f"The model {manifest.name} is not distilled: choose another sampler.")
    steps = manifest.distilled.steps
    if settings.steps not in (None, steps):
        raise UsageError(f"Distilled sampling takes {steps} steps, not {settings.steps}.")
    if settings.listening not in (None, 1.0):
        raise UsageError("Distilled sampling has learnt its listening: leave it out.")
    return steps


def make_record(task: str, model: Model, settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    """The record of a take, without timings. request: the task's own arguments, as plain values."""
    return {
        "task": task,
        "request": request,
        "seed": settings.seed,
        "settings": asdict(settings),
        "model": {"name": model.manifest.name, "version": model.manifest.version},
        "provider": model.provider,
        "device": model.device,
        "threads": model.threads,
        "warnings": list(model.warnings),
    }


def clock(phases: dict[str, float], phase: str, started: float) -> float:
    """Adds the time since `started` to a phase, in seconds; returns now."""
    now = time.perf_counter()
    phases[phase] = round(phases.get(phase, 0.0) + now - started, 4)
    return now


def stretch(callback: Callback | None, phase: str, start: float, end: float) -> Callable[[float], None]:
    """A function of 0..1 that reports this phase as the part start..end of the whole job."""

    def report(fraction: float) -> None:
        if callback is not None:
            callback(phase, start + (end - start) * min(1.0, fraction))

    return report
