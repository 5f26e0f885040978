"""Any length by overlapping windows: sampling latents, decoding and vocoding them without a seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.audio import empty, release
from engine.batching import is_shared
from engine.denoisers import guided, inpainted
from engine.errors import BacklineError
from engine.loop import Guidance, Held, asked_by, sample_on_device
from engine.manifest import Manifest
from engine.model import Asked, Model
from engine.samplers import SAMPLERS, Denoiser
from engine.take import Settings

FloatArray = NDArray[np.float32]
Report = Callable[[float], None]
# Latents (S, Z, T, F) and a mask (S, T) of what is known in latent frames start .. start + T.
Known = Callable[[int, int], tuple[FloatArray, FloatArray]]
Conditions = Callable[[int, int], dict[str, FloatArray]]
Wrap = Callable[[Denoiser, int, int], Denoiser]

SEAM = 4  # a quarter of a window is given to the next one as context
BLEND = 8  # an eighth of a window is crossfaded where decoded windows meet
FADE = 4  # mel frames in which vocoded windows are joined
SHARED_FACTOR = 8  # a shorter window keeps this common factor with the model's own, for its downsampling


@dataclass
class Batch:
    """Takes of one request: a task called with one seed after another samples the next `size` together.

    seeds: all of them, in the order in which they will be asked for; the rest of the request must be the
    same. made: latents that wait to be asked for.
    """

    seeds: Sequence[int]
    size: int = 8
    made: dict[int, FloatArray] = field(default_factory=dict)

    def next(self, seed: int) -> list[int]:
        """The seeds to sample together now, beginning with this one."""
        first = self.seeds.index(seed)
        return list(self.seeds[first : first + self.size])


def window_starts(total: int, window: int, overlap: int) -> list[int]:
    """Where windows begin that cover `total` frames; all fit, so the last may overlap by more."""
    starts = list(range(0, max(1, total - overlap), window - overlap))
    return [max(0, min(start, total - window)) for start in starts]


def timeline_frames(manifest: Manifest, seconds: float) -> int:
    """Latent frames that cover this time: at least a window, or a quarter where the model takes less."""
    samples = manifest.mel.hop * manifest.latent.frames
    wanted = int(np.ceil(seconds * manifest.mel.sample_rate / samples - 1e-9))
    window = manifest.window_frames
    if wanted >= window:
        return wanted
    if not manifest.dynamic_window:
        return window
    factor = gcd(window, SHARED_FACTOR)
    shortest = max(wanted, window // 4)
    return min(window, -(-shortest // factor) * factor)


def sample_timeline(
    model: Model,
    total: int,
    settings: Settings,
    *,
    known: Known,
    conditions: Conditions,
    heard: Sequence[str] = (),
    wrap: Wrap | None = None,
    batch: Batch | None = None,
    report: Report,
) -> FloatArray:
    """(S, Z, total, F) latents, scaled. `settings` must be resolved. batch: takes that are sampled together.

    Windows follow one another; what a window shares with the one before is known to it, per stem and frame,
    as `context` where the bundle declares it and by inpainting in any case. `heard` names the conditions that
    settings.listening weighs. `wrap` puts a posterior around the denoiser of a window, which is then sampled
    in numpy; else the device does it (engine.loop). Each window draws its noise from the seed and its number.
    """
    if batch is not None and settings.seed in batch.made:
        return batch.made.pop(settings.seed)
    # Fresh noise in every step is drawn in the order of the batch: such takes are made alone.
    seeds = batch.next(settings.seed) if batch is not None and not settings.eta else [settings.seed]
    stems, channels, window, freq = model.manifest.latent_shape
    window = min(window, total)
    timeline = np.zeros((len(seeds), stems, channels, total, freq), np.float32)
    starts = window_starts(total, window, window // SEAM)
    done = 0
    for number, start in enumerate(starts):
        shared = max(0, done - start)
        given, mask = known(start, window)
        free = (1 - mask[:, :shared])[:, None, :, None]
        given = np.repeat(given[None], len(seeds), axis=0)
        given[:, :, :, :shared] += free * timeline[:, :, :, start:done]
        mask[:, :shared] = 1
        passes, guidance = _window_passes(model, settings, given, mask, conditions(start, window), heard)
        asked = _asked(model, settings, passes, heard)
        rngs = [np.random.default_rng([seed, number]) for seed in seeds]
        x = np.stack([rng.standard_normal((stems, channels, window, freq), np.float32) for rng in rngs])
        held = Held(given, mask[None], x.copy()) if mask.any() else None

        def step(done_steps: int, steps: int, number: int = number) -> None:
            report((number + done_steps / steps) / len(starts))

        sampling: dict[str, Any] = {
            "steps": settings.steps,
            "eta": settings.eta,
            "rng": rngs[0],
            "callback": step,
        }
        if wrap is None and not is_shared():
            name = str(settings.sampler)
            latents = sample_on_device(
                model, x, passes, asked=asked, guidance=guidance, held=held, sampler=name, **sampling
            )
        else:
            denoise = _denoiser(model, passes, asked, guidance)
            denoise = denoise if wrap is None else wrap(denoise, start, window)
            if held is not None:
                denoise = inpainted(denoise, held.known, held.mask, model.schedule, held.noise)
            latents = SAMPLERS[str(settings.sampler)](denoise, x, model.schedule, **sampling)
        timeline[:, :, :, start + shared : start + window] = latents[:, :, :, shared:]
        done = start + window
    if batch is not None:
        batch.made.update(zip(seeds[1:], timeline[1:], strict=True))
    return timeline[0]


def nothing_known(model: Model) -> Known:
    """The `known` of a task without context."""
    stems, channels, _, freq = model.manifest.latent_shape

    def known(start: int, frames: int) -> tuple[FloatArray, FloatArray]:
        return np.zeros((stems, channels, frames, freq), np.float32), np.zeros((stems, frames), np.float32)

    return known


def decode_timeline(model: Model, latents: FloatArray, report: Report) -> FloatArray:
    """(N, Z, total, F), scaled -> log mels (N, total * latent.frames, mels)."""
    manifest = model.manifest
    ratio = manifest.latent.frames
    mels = empty(len(latents), latents.shape[2] * ratio, manifest.mel.n_mels)
    window = min(manifest.window_frames, latents.shape[2])
    starts = window_starts(latents.shape[2], window, window // BLEND)
    done = 0
    for number, start in enumerate(starts):
        report(number / len(starts))
        block = _sound(model, model.decode(latents[:, :, start : start + window]))
        blend(mels, block, start * ratio, max(0, done - start) * ratio)
        release(mels)
        done = start + window
    report(1.0)
    return mels


def vocode_timeline(model: Model, log_mels: FloatArray, report: Report) -> FloatArray:
    """(N, frames, mels) -> (N, frames * vocoder.hop) at the vocoder's rate.

    Windows overlap, so that each knows its neighbours, but are joined within a few frames in the middle of
    that: two windows of one sound need not be in phase, and what a long crossfade cancels would be heard.
    """
    manifest = model.manifest
    hop = manifest.vocoder.hop
    audio = empty(len(log_mels), log_mels.shape[1] * hop)
    window = min(manifest.window_frames * manifest.latent.frames, log_mels.shape[1])
    starts = window_starts(log_mels.shape[1], window, window // BLEND)
    done = 0
    for number, start in enumerate(starts):
        report(number / len(starts))
        block = _sound(model, model.vocode(log_mels[:, start : start + window]))
        shared = max(0, done - start)
        fade = min(FADE, shared)
        skipped = (shared - fade) // 2
        blend(audio, block[:, skipped * hop :], (start + skipped) * hop, fade * hop)
        release(audio, log_mels)
        done = start + window
    report(1.0)
    return audio


def blend(target: FloatArray, block: FloatArray, start: int, shared: int) -> None:
    """Writes a block (N, n, ...) into target (N, total, ...) at `start`; its first `shared` samples fade in.

    The fade is linear: both sides are the same sound.
    """
    ramp = ((np.arange(shared, dtype=np.float32) + 0.5) / max(1, shared)).reshape(
        -1, *(1,) * (target.ndim - 2)
    )
    target[:, start : start + shared] *= 1 - ramp
    target[:, start : start + shared] += ramp * block[:, :shared]
    target[:, start + shared : start + block.shape[1]] = block[:, shared:]


def _sound(model: Model, values: FloatArray) -> FloatArray:
    if not np.isfinite(values).all():
        raise BacklineError(
            f"The model {model.manifest.name} produced NaN or infinite values: more steps may help."
        )
    return values


def _window_passes(
    model: Model,
    settings: Settings,
    given: FloatArray,
    mask: FloatArray,
    conditions: dict[str, FloatArray],
    heard: Sequence[str],
) -> tuple[list[dict[str, FloatArray]], list[Guidance]]:
    if model.supports("context"):
        known = given * mask[:, None, :, None]
        conditions = conditions | {"context": known, "context_mask": mask[None]}
    # a prompt may change how loud a stem is, what is heard may not
    weights: list[tuple[Sequence[str], Guidance]] = []
    if settings.guidance not in (None, 1.0):
        weights.append((("film",), (float(settings.guidance), 0.0)))
    if settings.listening not in (None, 1.0):
        weights.append((heard, _listening(model.manifest, float(settings.listening))))
    return _passes(conditions, weights)


def _listening(manifest: Manifest, weight: float) -> Guidance:
    """The guidance by what is heard, one for each stem where the bundle says more of it than one weight."""
    weak = manifest.weakened
    if weak is None:
        return weight, 1.0
    least = weak.listening if weight > 1 else {}
    scales = np.array([max(weight, least.get(stem, weight)) for stem in manifest.stems], np.float32)
    rescales = np.array([stem not in weak.freed for stem in manifest.stems], np.float32)
    return scales[:, None, None, None], rescales[:, None, None, None]


def _asked(
    model: Model, settings: Settings, passes: Sequence[dict[str, FloatArray]], heard: Sequence[str]
) -> list[Asked]:
    """What each pass asks the UNet for: a weakened prediction where it hears less than the first."""
    usual = asked_by(str(settings.sampler))
    if model.manifest.weakened is None:
        return [usual] * len(passes)
    told = passes[0].keys() & set(heard)
    return ["weakened" if told - conditions.keys() else usual for conditions in passes]


def _passes(
    conditions: dict[str, FloatArray], weights: Sequence[tuple[Sequence[str], Guidance]]
) -> tuple[list[dict[str, FloatArray]], list[Guidance]]:
    """Guidance by one condition after another, each against the same without it.

    weights: the names of the condition's inputs, and its guidance. Returns the conditions of each pass of the
    UNet, the first told all, in the order of `sample_on_device`, and the guidance that is left.
    """
    if not weights:
        return [conditions], []
    (names, guidance), *rest = weights
    told, inner = _passes(conditions, rest)
    without = {name: value for name, value in conditions.items() if name not in names}
    if len(without) == len(conditions):
        return told, inner
    return told + _passes(without, rest)[0], [guidance, *inner]


def _denoiser(
    model: Model,
    passes: Sequence[dict[str, FloatArray]],
    asked: Sequence[Asked],
    guidance: Sequence[Guidance],
) -> Denoiser:
    denoisers = [model.denoiser(given, asked=kind) for given, kind in zip(passes, asked, strict=True)]
    for scale, rescale in reversed(guidance):
        pairs = zip(denoisers[::2], denoisers[1::2], strict=True)
        denoisers = [guided(told, untold, scale, rescale=rescale) for told, untold in pairs]
    return denoisers[0]
