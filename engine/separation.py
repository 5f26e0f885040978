"""Splitting a mix: stems estimated as latents, then as masks on the mix's own spectrogram.

A mask keeps the mix's phase, rate and channels, and masks that sum to one give stems that sum to the mix.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio, check, empty, fit, release, resample
from engine.denoisers import dirac, gaussian
from engine.errors import UsageError
from engine.features import istft, mel_edges, stft
from engine.listening import gain_to, model_signal, signal_level, window_mel
from engine.manifest import Manifest, Mel
from engine.model import Model
from engine.samplers import Denoiser
from engine.take import Callback, Settings, Take, clock, make_record, resolve, stretch
from engine.windows import (
    SEAM,
    Report,
    blend,
    decode_timeline,
    nothing_known,
    sample_timeline,
    timeline_frames,
    vocode_timeline,
    window_starts,
)

FloatArray = NDArray[np.float32]
Method = Literal["mask", "dirac", "gaussian"]

RESIDUAL = "residual"
POWER = 2.0  # of the magnitudes whose ratios are masks: a Wiener filter's; a bundle may declare another
# Powers of stems add up to the mix's only on average: up to twice their sum counts as explained.
EXPLAINED = 2.0
# The posteriors pull on the sum of S stems S times as fast as on one, so a step that shrinks sigma by more
# than 2 / S of itself overshoots: they need more steps than generating, and no extrapolation between them.
POSTERIOR_STEPS = 64
POSTERIOR_QUALITY = {"draft": 0.5, "normal": 1.0, "best": 2.0}  # times POSTERIOR_STEPS
POSTERIOR_SAMPLER = "euler"
STFT_SECONDS = 0.0464  # 2048 samples at 44.1 kHz
BLOCK = 1 << 21  # complex values of the masked spectrograms held at a time


def split(
    model: Model,
    mix: Audio,
    *,
    method: Method = "mask",
    residual: bool = False,
    raw: bool = False,
    settings: Settings | None = None,
    callback: Callback | None = None,
) -> Take:
    """One stem per instrument with the mix's rate, channels and frame count; they sum to the mix.

    method: `mask` evaluates the posterior mean given the mix once where the bundle declares `mixture`
    (settings.steps above 1 sample from it instead) and is `dirac` otherwise; `dirac` and `gaussian`
    sample MSDM's posteriors on any bundle. residual: a further stem takes what no stem explains and
    sums with the rest. raw: the vocoder's audio instead of masks on the mix, mono on every channel,
    which does not sum to the mix.
    Raises UsageError for an unknown method or `raw` with `residual`.
    """
    if method not in ("mask", "dirac", "gaussian"):
        raise UsageError(f"There is no method {method!r}: choose mask, dirac or gaussian.")
    if raw and residual:
        raise UsageError("A residual needs masks: leave out raw or residual.")
    one_look = method == "mask" and model.supports("mixture")
    settings = _resolve(settings or Settings(), model.manifest, one_look)
    check(mix, "The mix")
    manifest = model.manifest
    timings: dict[str, float] = {"load": round(model.seconds_loading, 4)}
    started = time.perf_counter()
    stretch(callback, "listen", 0.0, 0.05)(0.0)
    signal = model_signal(mix, manifest)
    gain = 1.0
    if manifest.level is not None:
        gain = gain_to(manifest.level.mixture_db, signal_level(signal, manifest))
    total = timeline_frames(manifest, mix.seconds)
    started = clock(timings, "listen", started)

    report = stretch(callback, "sample", 0.05, 0.6)
    if one_look and settings.steps == 1:
        latents = posterior_mean(model, signal, total, gain, settings.seed, report)
    else:
        latents = _posterior_sample(model, signal, total, gain, method, settings, report)
    started = clock(timings, "sample", started)
    mels = decode_timeline(model, latents, stretch(callback, "render", 0.6, 0.7))
    if one_look and model.supports("masks"):
        mels = refined_mels(model, mels, signal, total, gain)
    names = [*manifest.stems, RESIDUAL] if residual else list(manifest.stems)
    rendering = stretch(callback, "render", 0.7, 1.0)
    if raw:
        parts = _vocoded(model, mels, mix, gain, rendering)
    else:
        mix_mels = timeline_mels(signal, manifest, total, gain) if residual else None
        parts = mask_mix(
            mix, mels, manifest.mel, mix_mels=mix_mels, power=manifest.mask_power, report=rendering
        )
    clock(timings, "render", started)
    stems = {name: Audio(parts[i], mix.sample_rate) for i, name in enumerate(names)}
    request = {"method": method, "residual": residual, "raw": raw, "seconds": mix.seconds}
    return Take(stems, make_record("split", model, settings, request) | {"timings": timings})


def posterior_mean(
    model: Model, signal: FloatArray, total: int, gain: float, seed: int, report: Report
) -> FloatArray:
    """(S, Z, total, F): the clean latents predicted from noise at the highest step, given the mix (n,)."""
    stems, channels, window, freq = model.manifest.latent_shape
    window = min(window, total)
    highest = model.schedule.steps - 1
    timeline = np.zeros((stems, total, channels, freq), np.float32)  # time second, as `blend` wants it
    starts = window_starts(total, window, window // SEAM)
    done = 0
    for number, start in enumerate(starts):
        report(number / len(starts))
        rng = np.random.default_rng([seed, number])
        noise = rng.standard_normal((1, stems, channels, window, freq), np.float32)
        denoise = model.denoiser(_mixture_condition(model, signal, gain, start, window))
        estimate = denoise(noise, highest)[0].transpose(0, 2, 1, 3)
        blend(timeline, estimate, start, max(0, done - start))
        done = start + window
    report(1.0)
    return timeline.transpose(0, 2, 1, 3)


def timeline_mels(signal: FloatArray, manifest: Manifest, total: int, gain: float = 1.0) -> FloatArray:
    """Log mels (total * latent.frames, mels) of a mono signal (n,) at the mel's rate."""
    ratio, window = manifest.latent.frames, manifest.window_frames
    mels = empty(total * ratio, manifest.mel.n_mels)
    for start in range(0, total, window):
        frames = min(window, total - start)
        mels[start * ratio : (start + frames) * ratio] = window_mel(signal, manifest, start, frames, gain)
        release(mels)
    return mels


def refined_mels(
    model: Model, stem_mels: FloatArray, signal: FloatArray, total: int, gain: float = 1.0
) -> FloatArray:
    """(S, frames, mels) with what the bundle's `masks` graph hears in the mix (n,), windows crossfaded."""
    manifest = model.manifest
    ratio, window = manifest.latent.frames, min(manifest.window_frames, total)
    refined = empty(*stem_mels.shape)
    done = 0
    for start in window_starts(total, window, window // SEAM):
        heard = window_mel(signal, manifest, start, window, gain)
        block = model.refine(stem_mels[:, start * ratio : (start + window) * ratio], heard)
        blend(refined, block, start * ratio, max(0, done - start) * ratio)
        done = start + window
        release(refined, stem_mels)
    return refined


def masks_from_mels(
    stem_mels: FloatArray, mix_mels: FloatArray | None = None, power: float = POWER
) -> FloatArray:
    """Log mels (S, frames, mels) -> masks that sum to one: each stem's share of the summed powers.

    mix_mels (frames, mels): log mels of the mix at the same gain; then a last mask, the residual, takes what
    is left where the stems' powers explain less than half of the mix's.
    """
    logits = power * stem_mels
    highest = logits.max(axis=0)
    shares = np.exp(logits - highest)
    total = shares.sum(axis=0)
    shares /= total
    if mix_mels is None:
        return shares
    explained = EXPLAINED * np.exp(np.minimum(0, highest + np.log(total) - power * mix_mels))
    rest = np.maximum(0, 1 - explained)
    return np.concatenate([shares * (1 - rest), rest[None]])


def mask_mix(
    mix: Audio,
    stem_mels: FloatArray,
    mel: Mel,
    *,
    mix_mels: FloatArray | None = None,
    power: float = POWER,
    report: Report | None = None,
) -> FloatArray:
    """(S, channels, n): the stems' masks on the mix's own spectrogram; with mix_mels (S + 1, ...), see above.

    stem_mels: log mels (S, frames, mels) of the stems at any common gain, estimated or, for the ceiling of
    the method, true. Masks are interpolated linearly in time and in Hz, and held beyond the first and last
    band and the last frame. What rounding leaves is shared out, so the stems sum to the mix.
    """
    stems = len(stem_mels) + (mix_mels is not None)
    n_fft = stft_size(mix.sample_rate)
    hop = n_fft // 4
    bands = _band_matrix(mel, n_fft, mix.sample_rate)
    result = empty(stems, mix.channels, mix.length)
    frames = max(8, BLOCK // (stems * mix.channels * (n_fft // 2 + 1)))
    for start in range(0, mix.length, frames * hop):
        if report is not None:
            report(start / mix.length)
        stop = min(mix.length, start + frames * hop)
        # Every frame that reaches into start .. stop: centres from start - n_fft/2 to stop + n_fft/2.
        first, last = start // hop - 2, -(-stop // hop) + 2
        piece = _slice(mix.samples, first * hop - n_fft // 2, last * hop + n_fft // 2)
        seconds = np.arange(first, last + 1) * hop / mix.sample_rate
        masks = _masks_at(seconds, stem_mels, mix_mels, mel, power) @ bands
        parts = istft(stft(piece, n_fft, hop)[None] * masks[:, None], n_fft, hop)
        offset = start - (first * hop - n_fft // 2)
        parts = parts[..., offset : offset + stop - start]
        parts += (mix.samples[:, start:stop] - parts.sum(axis=0)) / stems
        result[:, :, start:stop] = parts
        release(result, mix.samples, stem_mels)
    if report is not None:
        report(1.0)
    return result


def stft_size(sample_rate: int) -> int:
    """The power of two nearest to 46 ms: 42 to 64 ms at the usual rates, 2048 at 44.1 and 48 kHz."""
    return 1 << round(np.log2(sample_rate * STFT_SECONDS))


def _resolve(settings: Settings, manifest: Manifest, one_look: bool) -> Settings:
    """As engine.take.resolve, with the defaults of separation: one look is the best at any quality."""
    if settings.steps is None:
        share = POSTERIOR_QUALITY.get(settings.quality or "normal", 1.0)
        many = min(manifest.schedule.steps, round(share * max(manifest.sampling.steps, POSTERIOR_STEPS)))
        settings = replace(settings, steps=1 if one_look else many)
    if settings.sampler is None and not one_look:
        settings = replace(settings, sampler=POSTERIOR_SAMPLER)
    return resolve(settings, manifest)


def _posterior_sample(
    model: Model,
    signal: FloatArray,
    total: int,
    gain: float,
    method: Method,
    settings: Settings,
    report: Report,
) -> FloatArray:
    """(S, Z, total, F) sampled given the mix, by the `mixture` input (mask) or by a posterior."""
    conditioned = method == "mask" and model.supports("mixture")

    def conditions(start: int, frames: int) -> dict[str, FloatArray]:
        return _mixture_condition(model, signal, gain, start, frames) if conditioned else {}

    def wrap(denoise: Denoiser, start: int, frames: int) -> Denoiser:
        mixture = model.encode(window_mel(signal, model.manifest, start, frames, gain)[None])
        if method == "gaussian":
            return gaussian(denoise, mixture, model.schedule, settings.gamma)
        return dirac(denoise, mixture, model.schedule)

    return sample_timeline(
        model,
        total,
        settings,
        known=nothing_known(model),
        conditions=conditions,
        wrap=None if conditioned else wrap,
        report=report,
    )


def _mixture_condition(
    model: Model, signal: FloatArray, gain: float, start: int, frames: int
) -> dict[str, FloatArray]:
    told = {
        "mixture": model.encode(window_mel(signal, model.manifest, start, frames, gain)[None]),
        "mixture_mask": np.ones((1, frames), np.float32),
    }
    if "mixture_stems" in model.inputs("unet"):
        told["mixture_stems"] = np.ones((1, len(model.manifest.stems)), np.float32)
    return told


def _vocoded(model: Model, mels: FloatArray, mix: Audio, gain: float, report: Report) -> FloatArray:
    audio = vocode_timeline(model, mels, report)
    audio /= np.float32(gain)
    audio = resample(Audio(audio, model.manifest.vocoder.sample_rate), mix.sample_rate).samples
    audio = fit(audio, mix.length)
    return np.broadcast_to(audio[:, None], (len(audio), mix.channels, mix.length))


def _masks_at(
    seconds: NDArray[np.float64], stem_mels: FloatArray, mix_mels: FloatArray | None, mel: Mel, power: float
) -> FloatArray:
    """(S, len(seconds), mels): masks at these times, linear between mel frames."""
    position = np.clip(seconds * mel.sample_rate / mel.hop, 0, stem_mels.shape[1] - 1)
    first, last = int(position[0]), int(np.ceil(position[-1])) + 1
    heard = None if mix_mels is None else mix_mels[first:last]
    masks = masks_from_mels(stem_mels[:, first:last], heard, power)
    below = np.minimum(position.astype(np.int64) - first, masks.shape[1] - 1)
    above = np.minimum(below + 1, masks.shape[1] - 1)
    weight = (position - first - below).astype(np.float32)[:, None]
    return masks[:, below] * (1 - weight) + masks[:, above] * weight


def _band_matrix(mel: Mel, n_fft: int, sample_rate: int) -> FloatArray:
    """(mels, bins) linear interpolation in Hz between the centres of the bands, the edges held."""
    centres = mel_edges(mel)[1:-1]
    position = np.interp(np.fft.rfftfreq(n_fft, 1 / sample_rate), centres, np.arange(mel.n_mels))
    distance = np.abs(position[None] - np.arange(mel.n_mels)[:, None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _slice(samples: FloatArray, start: int, stop: int) -> FloatArray:
    """(channels, stop - start), zeros outside the signal."""
    result = np.zeros((samples.shape[0], stop - start), np.float32)
    inside = samples[:, max(0, start) : stop]
    result[:, max(0, -start) : max(0, -start) + inside.shape[1]] = inside
    return result
