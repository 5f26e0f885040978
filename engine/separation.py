"""Splitting a mix: stems as masks on the mix's own spectrogram, heard by a separator or by the UNet.

A mask keeps the mix's phase, rate and channels, and masks that sum to one give stems that sum to the mix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio, check, empty, fit, mono, release, resample
from engine.denoisers import dirac, gaussian
from engine.errors import UsageError
from engine.factorisation import LEAST, geometric_mean, refined
from engine.features import istft, mel_edges, stft
from engine.listening import gain_to, model_signal, signal_level, window_mel
from engine.manifest import Manifest, Mel, Separator
from engine.model import Model
from engine.samplers import Denoiser
from engine.take import Callback, Settings, Take, clock, make_record, resolve, stretch
from engine.wiener import covariances, panned, wiener
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
Array = NDArray[np.floating]
Masks = Callable[[Array, Array], FloatArray]  # seconds (n,), Hz (bins,) -> (S, n, bins) that sum to one
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
# In semitones, what a separator hears the mix transposed by: where it errs differs with the pitch. On 48
# windows of songs and sounds it never heard two pitches gain 0.17 dB of SI-SDR over one, five 0.23.
PITCHES = {"draft": (0.0,), "normal": (-1.0, 1.0), "best": (-4.0, -2.0, 0.0, 2.0, 4.0)}
# Random beginnings of the factorisation, see `refined`: there one gains 0.6 dB at one pitch, three at two.
STARTS = {"draft": 1, "normal": 3, "best": 5}
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

    method: `mask` asks the bundle's separator where it declares one, at the PITCHES of the quality, hears
    what repeats in the mix (`engine.factorisation`) and, unless at `draft`, asks the UNet as far as the
    bundle says that this helps (separator.share);
    else it evaluates the posterior mean given the mix once where the bundle declares `mixture`
    (settings.steps above 1 sample from it instead) and is `dirac` otherwise; `dirac` and `gaussian` sample
    MSDM's posteriors on any bundle. residual: a further stem takes what no stem of the UNet's explains and
    sums with the rest. raw: the vocoder's audio instead of masks on the mix, mono on every channel, which
    does not sum to the mix.
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
    names = [*manifest.stems, RESIDUAL] if residual else list(manifest.stems)
    separator = manifest.separator if one_look and settings.steps == 1 and not raw else None
    quality = settings.quality or "normal"
    masks: Masks | None = None
    resolution = STFT_SECONDS
    share, done = 1.0, 0.0
    if separator is not None:
        started = time.perf_counter()
        share = 1.0 if quality == "draft" else separator.share
        done = 0.7 if share == 1 and not residual else 0.4
        report = stretch(callback, "sample", 0.0, done)
        masks = _heard(model, separator, mix, PITCHES[quality], _part(report, 0, 2))
        masks = _repeated(model, separator, mix, masks, STARTS[quality], _part(report, 1, 2))
        resolution = separator.n_fft / separator.sample_rate
        clock(timings, "sample", started)
    if masks is None or share < 1 or residual:
        estimate = _estimated(model, mix, method, one_look, settings, callback, timings, done)
        mix_mels = (
            timeline_mels(estimate.signal, manifest, estimate.total, estimate.gain) if residual else None
        )
        by_mels = mel_masks(estimate.mels, manifest.mel, mix_mels, manifest.mask_power)
        masks = by_mels if masks is None else joined(masks, by_mels, share)
    started = time.perf_counter()
    rendering = stretch(callback, "render", 0.7, 1.0)
    if raw:
        parts = _vocoded(model, estimate.mels, mix, estimate.gain, rendering)
    else:
        parts = apply_masks(mix, masks, len(names), resolution, rendering)
    clock(timings, "render", started)
    stems = {name: Audio(parts[i], mix.sample_rate) for i, name in enumerate(names)}
    request = {"method": method, "residual": residual, "raw": raw, "seconds": mix.seconds}
    return Take(stems, make_record("split", model, settings, request) | {"timings": timings})


@dataclass(frozen=True)
class Estimate:
    """What the UNet hears in a mix: stems' log mels (S, frames, mels) of the signal (n,) under a gain."""

    mels: FloatArray
    signal: FloatArray
    gain: float
    total: int  # latent frames


def _estimated(
    model: Model,
    mix: Audio,
    method: Method,
    one_look: bool,
    settings: Settings,
    callback: Callback | None,
    timings: dict[str, float],
    done: float,
) -> Estimate:
    """done: the fraction of the job that is behind."""
    manifest = model.manifest
    started = time.perf_counter()
    stretch(callback, "listen", done, done + 0.05)(0.0)
    signal = model_signal(mix, manifest)
    gain = 1.0
    if manifest.level is not None:
        gain = gain_to(manifest.level.mixture_db, signal_level(signal, manifest))
    total = timeline_frames(manifest, mix.seconds)
    started = clock(timings, "listen", started)
    report = stretch(callback, "sample", done + 0.05, 0.6)
    if one_look and settings.steps == 1:
        latents = posterior_mean(model, signal, total, gain, settings.seed, report)
    else:
        latents = _posterior_sample(model, signal, total, gain, method, settings, report)
    clock(timings, "sample", started)
    mels = decode_timeline(model, latents, stretch(callback, "render", 0.6, 0.7))
    return Estimate(mels, signal, gain, total)


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


def _heard(
    model: Model, separator: Separator, mix: Audio, pitches: tuple[float, ...], report: Report
) -> Masks:
    """The mean of the masks that the separator makes of the mix played faster by each of these semitones."""
    heard: list[tuple[float, Masks]] = []
    for number, semitones in enumerate(pitches):
        played = Audio(mix.samples, round(mix.sample_rate * 2 ** (semitones / 12)))
        told = _part(report, number, len(pitches))
        stored = _by_windows(model, separator, played, lambda magnitudes, _: model.separate(magnitudes), told)
        heard.append((played.sample_rate / mix.sample_rate, separator_masks(stored, separator)))

    def masks(seconds: Array, hz: Array) -> FloatArray:
        return np.mean([of(seconds / speed, hz * speed) for speed, of in heard], axis=0, dtype=np.float32)

    return masks


def _repeated(
    model: Model, separator: Separator, mix: Audio, masks: Masks, starts: int, report: Report
) -> Masks:
    """These masks, `refined` window by window, up to the highest frequency the separator knows about."""
    hz = np.arange(separator.bins) * separator.sample_rate / separator.n_fft
    known = int(np.searchsorted(hz, separator.f_max)) + 1

    def of(magnitudes: FloatArray, start: int) -> FloatArray:
        seconds = np.arange(start, start + len(magnitudes)) * separator.hop / separator.sample_rate
        heard = masks(seconds, hz)
        heard[..., :known] = refined(heard[..., :known], magnitudes[:, :known], starts)
        return heard

    return separator_masks(_by_windows(model, separator, mix, of, report), separator)


def _by_windows(
    model: Model,
    separator: Separator,
    mix: Audio,
    of: Callable[[FloatArray, int], FloatArray],
    report: Report,
) -> FloatArray:
    """Masks (S, frames, bins) of the whole mix, frame i at i hops, windows crossfaded.

    of: those of a window's magnitudes (n, bins), at the separator's rate, and of its first frame.
    """
    n_fft, hop, patch = separator.n_fft, separator.hop, separator.patch
    signal = mono(resample(mix, separator.sample_rate))
    total = -(-(len(signal) // hop + 1) // patch) * patch
    window = min(separator.window_frames, total)
    shared = window // SEAM // patch * patch
    masks = empty(len(model.manifest.stems), total, separator.bins)
    done = 0
    starts = window_starts(total, window, shared)
    for number, start in enumerate(starts):
        report(number / len(starts))
        first = start * hop - n_fft // 2
        piece = _slice(signal[None], first, first + (window - 1) * hop + n_fft)
        block = of(np.abs(stft(piece, n_fft, hop)[0]), start)
        blend(masks, block, start, max(0, done - start))
        done = start + window
        release(masks, signal)
    report(1.0)
    return masks


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


def mel_masks(
    stem_mels: FloatArray, mel: Mel, mix_mels: FloatArray | None = None, power: float = POWER
) -> Masks:
    """`masks_from_mels` at any time and frequency: linear between frames and between the bands' centres in
    Hz, held beyond the first and last band and the last frame."""
    rate = mel.sample_rate / mel.hop

    def masks(seconds: Array, hz: Array) -> FloatArray:
        first, last = _reach(seconds * rate, stem_mels.shape[1])
        heard = None if mix_mels is None else mix_mels[first:last]
        shares = masks_from_mels(stem_mels[:, first:last], heard, power)
        release(stem_mels)
        return _at_times(shares, seconds * rate - first) @ _band_matrix(mel, hz)

    return masks


def separator_masks(stored: FloatArray, separator: Separator) -> Masks:
    """A separator's masks (S, frames, bins) at any time and frequency, linear in both, the edges held.

    Above separator.f_max, which its training had nothing to say of, those of f_max hold.
    """
    rate = separator.sample_rate / separator.hop

    def masks(seconds: Array, hz: Array) -> FloatArray:
        first, last = _reach(seconds * rate, stored.shape[1])
        bins = np.minimum(hz, separator.f_max) * separator.n_fft / separator.sample_rate
        bins = np.clip(bins, 0, separator.bins - 1)
        below = np.minimum(bins.astype(np.int64), separator.bins - 2)
        weight = (bins - below).astype(np.float32)
        near = _at_times(stored[:, first:last], seconds * rate - first)
        release(stored)
        return near[..., below] * (1 - weight) + near[..., below + 1] * weight

    return masks


def joined(heard: Masks, estimated: Masks, share: float) -> Masks:
    """The `geometric_mean`, `share` of it the first's, of two masks for every stem.

    Where `estimated` has a residual too, the stems give up what it takes.
    """

    def masks(seconds: Array, hz: Array) -> FloatArray:
        first, second = heard(seconds, hz), estimated(seconds, hz)
        rest = second[len(first) :]
        if share < 1:
            first = geometric_mean(first + LEAST, second[: len(first)] + LEAST, share)
        return np.concatenate([first * (1 - rest.sum(axis=0)), rest])

    return masks


def mask_mix(mix: Audio, stem_mels: FloatArray, mel: Mel) -> FloatArray:
    """(S, channels, n): `mel_masks` on the mix's own spectrogram.

    stem_mels: log mels (S, frames, mels) of the stems at any common gain, estimated or, for the ceiling of
    the method, true.
    """
    return apply_masks(mix, mel_masks(stem_mels, mel), len(stem_mels), STFT_SECONDS)


def apply_masks(
    mix: Audio, masks: Masks, stems: int, resolution: float, report: Report | None = None
) -> FloatArray:
    """(stems, channels, n): masks on the mix's own spectrogram, whose frames last about `resolution` seconds.

    Of stereo mixes they are gone through twice, to hear first where the stems are panned (`engine.wiener`).
    What rounding leaves is shared out, so the stems sum to the mix.
    """
    told = report or (lambda fraction: None)
    masked = _Masked(mix, masks, stft_size(mix.sample_rate, resolution))
    frames = max(8, BLOCK // (stems * mix.channels * len(masked.hz)))
    places: FloatArray | None = None
    if mix.channels == 2:
        places = _places(masked, stems, frames, _part(told, 0, 2))
        told = _part(told, 1, 2)
    result = empty(stems, mix.channels, mix.length)
    step = frames * masked.hop
    for start in range(0, mix.length, step):
        told(start / mix.length)
        stop = min(mix.length, start + step)
        result[:, :, start:stop] = _stems_between(masked, places, start, stop)
        release(result, mix.samples)
    told(1.0)
    return result


@dataclass(frozen=True)
class _Masked:
    """A mix and masks on its spectrogram, whose frame i has its centre at i hops."""

    mix: Audio
    masks: Masks
    n_fft: int

    @property
    def hop(self) -> int:
        return self.n_fft // 4

    @cached_property
    def hz(self) -> Array:
        return np.fft.rfftfreq(self.n_fft, 1 / self.mix.sample_rate)

    def at(self, first: int, last: int) -> tuple[NDArray[np.complexfloating], FloatArray]:
        """Spectrum (channels, n, bins) and masks (S, n, bins) of the frames first .. last."""
        margin = self.n_fft // 2
        piece = _slice(self.mix.samples, first * self.hop - margin, last * self.hop + margin)
        seconds = np.arange(first, last + 1) * self.hop / self.mix.sample_rate
        return stft(piece, self.n_fft, self.hop), self.masks(seconds, self.hz)


def _places(masked: _Masked, stems: int, frames: int, report: Report) -> FloatArray:
    """Where the stems sit in a stereo mix, as `engine.wiener.panned` has it, heard `frames` at a time."""
    count = -(-masked.mix.length // masked.hop)
    summed = np.zeros((stems, 4, len(masked.hz)))
    for first in range(0, count, frames):
        report(first / count)
        summed += covariances(*masked.at(first, min(count, first + frames) - 1))
        release(masked.mix.samples)
    return panned(summed)


def _stems_between(masked: _Masked, places: FloatArray | None, start: int, stop: int) -> FloatArray:
    """(S, channels, stop - start): the stems' samples, which sum to the mix's."""
    n_fft, hop = masked.n_fft, masked.hop
    # Every frame that reaches into start .. stop: centres from start - n_fft/2 to stop + n_fft/2.
    first = start // hop - 2
    spectrum, shares = masked.at(first, -(-stop // hop) + 2)
    of_stems = spectrum[None] * shares[:, None] if places is None else wiener(spectrum, shares, places)
    offset = start - (first * hop - n_fft // 2)
    parts: FloatArray = istft(of_stems, n_fft, hop)[..., offset : offset + stop - start]
    return parts + (masked.mix.samples[:, start:stop] - parts.sum(axis=0)) / len(parts)


def _part(report: Report, number: int, count: int) -> Report:
    """The report of one of `count` parts that follow each other."""
    return lambda fraction: report((number + fraction) / count)


def stft_size(sample_rate: int, seconds: float = STFT_SECONDS) -> int:
    """The power of two nearest to this; for 46 ms 42 to 64 ms at the usual rates, 2048 at 44.1 and 48 kHz."""
    return 1 << round(np.log2(sample_rate * seconds))


def _resolve(settings: Settings, manifest: Manifest, one_look: bool) -> Settings:
    """As engine.take.resolve, with the defaults of separation: of the UNet one look is the best."""
    if settings.steps is None:
        share = POSTERIOR_QUALITY.get(settings.quality or "normal", 1.0)
        many = min(manifest.schedule.steps, round(share * max(manifest.sampling.steps, POSTERIOR_STEPS)))
        settings = replace(settings, steps=1 if one_look else many)
    if settings.sampler == "distilled":
        raise UsageError("Distilled sampling plays stems and takes no mix apart: choose another sampler.")
    preset = manifest.sampling.preset(settings.quality or "normal", manifest.schedule.steps)
    if settings.sampler is None and (not one_look or preset.sampler == "distilled"):
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


def _reach(frames: Array, count: int) -> tuple[int, int]:
    """The slice of `count` frames that these places, in frames, lie between."""
    return int(np.clip(frames[0], 0, count - 1)), int(np.ceil(np.clip(frames[-1], 0, count - 1))) + 1


def _at_times(masks: FloatArray, frames: Array) -> FloatArray:
    """(S, len(frames), ...): masks (S, n, ...) at these places, linear between frames, the edges held."""
    position = np.clip(frames, 0, masks.shape[1] - 1)
    below = position.astype(np.int64)
    above = np.minimum(below + 1, masks.shape[1] - 1)
    weight = (position - below).astype(np.float32)[:, None]
    return masks[:, below] * (1 - weight) + masks[:, above] * weight


def _band_matrix(mel: Mel, hz: Array) -> FloatArray:
    """(mels, len(hz)) linear interpolation in Hz between the centres of the bands, the edges held."""
    position = np.interp(hz, mel_edges(mel)[1:-1], np.arange(mel.n_mels))
    distance = np.abs(position[None] - np.arange(mel.n_mels)[:, None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _slice(samples: FloatArray, start: int, stop: int) -> FloatArray:
    """(channels, stop - start), zeros outside the signal."""
    result = np.zeros((samples.shape[0], stop - start), np.float32)
    inside = samples[:, max(0, start) : stop]
    result[:, max(0, -start) : max(0, -start) + inside.shape[1]] = inside
    return result
