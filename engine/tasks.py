"""The tasks: generate a band, fill in missing stems, continue a take, split a mix."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio, add_into, check, empty, fit, is_silent, resample
from engine.conditions import check_tempo, chords_condition, grid_condition, parse_chords, prompt_film
from engine.errors import UsageError
from engine.harmony import UNPITCHED, heard_chords
from engine.lead_sheet import draw_bpm, draw_chords, metre_in
from engine.listening import gain_to, model_signal, signal_level, window_mel
from engine.manifest import Manifest
from engine.model import Model
from engine.separation import split as split
from engine.take import Callback, Settings, Take, clock, make_record, resolve, stretch
from engine.windows import (
    Batch,
    Conditions,
    Known,
    decode_timeline,
    nothing_known,
    sample_timeline,
    timeline_frames,
    vocode_timeline,
)

FloatArray = NDArray[np.float32]

# What settings.listening weighs in `fill`.
HEARD = ("context", "context_mask", "mixture", "mixture_mask", "mixture_stems", "grid", "chords")
MIN_SECONDS, MAX_SECONDS = 1.0, 1800.0
ATTEMPTS, RESTING_DB = 3, 40.0
FULL_SCALE = 0.99
PEAK_BLOCK = 1 << 18  # samples looked at together
HUSH_BLOCK = 1 << 12  # mel frames
NEXT_SEED = 1 << 32  # past the seeds that users type


def generate(
    model: Model,
    *,
    seconds: float,
    text: str | None = None,
    audio: Audio | None = None,
    bpm: float | None = None,
    chords: str | None = None,
    beats_per_bar: int = 4,
    first_beat: float = 0.0,
    free: bool = False,
    settings: Settings | None = None,
    batch: Batch | None = None,
    callback: Callback | None = None,
) -> Take:
    """All stems, round(seconds * rate) samples each, mono at the vocoder's rate, their sum within full scale.

    text, audio: prompts. bpm, beats_per_bar, first_beat (seconds): the tempo grid. chords: a chart such as
    "C | Am | F G | G7", one cell a bar, repeated over the length. What of tempo and chords is not told is
    drawn from the seed where the model takes both, as a band that plays together needs them, and as the text
    says where it speaks of them; not with an audio prompt, which has its own, and not where the band is to be
    `free`. Where the tempo is drawn, a text that asks for a waltz has three beats a bar. batch: takes that
    differ in settings.seed alone and are sampled together, unless something is drawn. callback(phase,
    fraction of the job) raises to cancel.
    Raises UsageError for a request that the model cannot meet.
    """
    # the bundle's listening is that of fill; what is told is kept without more weight
    settings = resolve(settings or Settings(), model.manifest, listening=1.0)
    _check_length(seconds)
    timings: dict[str, float] = {"load": round(model.seconds_loading, 4)}
    started = time.perf_counter()
    stretch(callback, "listen", 0.0, 0.05)(0.0)
    # chords without a tempo are refused below
    draws = chords is None and audio is None and not free
    if draws and model.supports("grid") and model.supports("chords"):
        batch = None  # each take plays something else
        said = text or ""
        if bpm is None:
            bpm, beats_per_bar = draw_bpm(settings.seed, said), metre_in(said, beats_per_bar)
        chords = draw_chords(settings.seed, said)
    conditions = _told(model, text, audio, bpm, chords, beats_per_bar, first_beat)
    started = clock(timings, "listen", started)
    latents = sample_timeline(
        model,
        timeline_frames(model.manifest, seconds),
        settings,
        known=nothing_known(model),
        conditions=conditions,
        heard=("grid", "chords"),
        batch=batch,
        report=stretch(callback, "sample", 0.05, 0.8),
    )
    started = clock(timings, "sample", started)
    rate = model.manifest.vocoder.sample_rate
    makeup = _makeup(model.manifest, model.manifest.stems, settings, alone=True)
    rendered = _render(model, latents, makeup, callback)
    rendered *= _unclipped(rendered)
    stems = {
        name: Audio(fit(rendered[i : i + 1], round(seconds * rate)), rate)
        for i, name in enumerate(model.manifest.stems)
    }
    clock(timings, "render", started)
    request = _request(text, audio, bpm, chords, beats_per_bar, first_beat)
    request |= {"free": free, "seconds": seconds}
    return Take(stems, make_record("generate", model, settings, request) | {"timings": timings})


def fill(
    model: Model,
    context: Mapping[str, Audio],
    armed: Sequence[str],
    *,
    silent: Sequence[str] = (),
    text: str | None = None,
    audio: Audio | None = None,
    bpm: float | None = None,
    chords: str | None = None,
    beats_per_bar: int = 4,
    first_beat: float = 0.0,
    other: Audio | None = None,
    settings: Settings | None = None,
    batch: Batch | None = None,
    callback: Callback | None = None,
) -> Take:
    """The armed stems, to go with the context: at its rate, its length and its highest channel count.

    context: the known stems, all at one rate; shorter ones are padded with silence; one that is armed
    is not listened to. silent: stems known to be silent. A stem that is none of these is unknown: it is
    generated along and thrown away. other: a mix of other material to listen to (capability `mixture`).
    Where no chords are given, those that the context is heard to play take their place.
    The rest as in `generate`.
    Raises UsageError for unknown, contradictory or missing stems and unequal rates.
    """
    settings = resolve(settings or Settings(), model.manifest)
    known = {name: audio_ for name, audio_ in context.items() if name not in armed}
    _check_stems(model.manifest, known, armed, silent)
    for name, part in known.items():
        check(part, f"The stem {name}")
    if other is not None:
        check(other, "The other material")
        if "mixture_stems" not in model.inputs("unet"):
            raise UsageError(
                f"The model {model.manifest.name} cannot listen to other material than its stems."
            )
    rate, length, channels = _common_shape(list(known.values()) or [part for part in [other] if part])

    timings: dict[str, float] = {"load": round(model.seconds_loading, 4)}
    started = time.perf_counter()
    listen = stretch(callback, "listen", 0.0, 0.05)
    listen(0.0)
    signals: dict[str, FloatArray] = {}
    for name, part in known.items():
        signals[name] = model_signal(part, model.manifest)
        listen(len(signals) / (len(known) + 1))
    heard = None if other is None else model_signal(other, model.manifest)
    gain = _context_gain(model.manifest, signals, heard)
    told = _told(model, text, audio, bpm, chords, beats_per_bar, first_beat)
    total = timeline_frames(model.manifest, length / rate)
    if chords is None and model.supports("chords"):
        told = _with_chords(model, told, signals, heard, total)
    started = clock(timings, "listen", started)

    wanted = [name for name in model.manifest.stems if name in armed]
    rows = [model.manifest.stems.index(name) for name in wanted]

    def sample(attempt: int) -> FloatArray:
        """Log mels of the armed stems; every attempt draws other noise."""
        latents = sample_timeline(
            model,
            total,
            replace(settings, seed=settings.seed + attempt * NEXT_SEED),
            known=_context_latents(model, signals, silent, gain),
            conditions=told if heard is None else _with_other(model, told, heard, gain),
            heard=HEARD,
            batch=None if attempt else batch,
            report=stretch(callback, "sample", 0.8 if attempt else 0.05, 0.8),
        )
        return decode_timeline(model, latents[rows], stretch(callback, "render", 0.8, 0.85))

    mels = _sounding(sample, model.manifest)
    started = clock(timings, "sample", started)
    rendered = _played(model, mels, _makeup(model.manifest, wanted, settings), callback)
    rendered /= np.float32(gain)
    at_rate = fit(resample(Audio(rendered, model.manifest.vocoder.sample_rate), rate).samples, length)
    stems = {
        name: Audio(np.broadcast_to(at_rate[i], (channels, length)), rate) for i, name in enumerate(wanted)
    }
    clock(timings, "render", started)
    request = _request(text, audio, bpm, chords, beats_per_bar, first_beat) | {
        "armed": wanted,
        "context": sorted(known),
        "silent": sorted(silent),
        "other": other is not None,
        "seconds": length / rate,
    }
    record = make_record("fill", model, settings, request) | {"timings": timings}
    for name in np.array(wanted)[_resting(mels, model.manifest)]:
        record["warnings"].append(f"The stem {name} rests: nothing of it is heard.")
    if all(is_silent(part) for part in known.values()) and heard is None:
        record["warnings"].append("The context is silent: there was nothing to play along with.")
    return Take(stems, record)


def continue_(
    model: Model,
    before: Mapping[str, Audio],
    *,
    seconds: float,
    text: str | None = None,
    audio: Audio | None = None,
    bpm: float | None = None,
    chords: str | None = None,
    beats_per_bar: int = 4,
    first_beat: float = 0.0,
    settings: Settings | None = None,
    batch: Batch | None = None,
    callback: Callback | None = None,
) -> Take:
    """What the stems of `before` play next: round(seconds * rate) samples each, to follow their last one.

    before: stems at one rate, which the result has too; they end where the longest does. The model hears
    the last half window of them. first_beat counts from their beginning, and so does a chart of chords.
    Stems that are not in `before` are generated along and thrown away. The rest as in `generate`.
    Raises UsageError for unknown stems, none, and unequal rates.
    """
    manifest = model.manifest
    settings = resolve(settings or Settings(), manifest)
    _check_length(seconds)
    _check_names(manifest, before)
    for name, part in before.items():
        check(part, f"The stem {name}")
    if not before:
        raise UsageError("There is nothing to continue: give at least one stem.")
    rate, length, channels = _common_shape(list(before.values()))

    timings: dict[str, float] = {"load": round(model.seconds_loading, 4)}
    started = time.perf_counter()
    stretch(callback, "listen", 0.0, 0.05)(0.0)
    frame = manifest.mel.hop * manifest.latent.frames / manifest.mel.sample_rate  # seconds
    heard = max(1, min(manifest.window_frames // 2, int(length / rate / frame)))
    signals = {
        name: model_signal(Audio(fit(part.samples, length), rate), manifest) for name, part in before.items()
    }
    gain = _context_gain(manifest, signals, None)
    beginning = length / rate - heard * frame  # of the timeline, in seconds of `before`
    told = _told(model, text, audio, bpm, chords, beats_per_bar, first_beat - beginning)
    known = _ending_latents(model, signals, heard, gain)
    started = clock(timings, "listen", started)

    latents = sample_timeline(
        model,
        timeline_frames(manifest, heard * frame + seconds),
        settings,
        known=known,
        conditions=told,
        batch=batch,
        report=stretch(callback, "sample", 0.05, 0.8),
    )
    started = clock(timings, "sample", started)
    wanted = [name for name in manifest.stems if name in before]
    made = latents[[manifest.stems.index(name) for name in wanted]]
    rendered = _render(model, made, _makeup(manifest, wanted, settings), callback)
    rendered = rendered[:, heard * manifest.latent.frames * manifest.vocoder.hop :]
    rendered /= np.float32(gain)
    size = round(seconds * rate)
    at_rate = fit(resample(Audio(rendered, manifest.vocoder.sample_rate), rate).samples, size)
    stems = {
        name: Audio(np.broadcast_to(at_rate[i], (channels, size)), rate) for i, name in enumerate(wanted)
    }
    clock(timings, "render", started)
    request = _request(text, audio, bpm, chords, beats_per_bar, first_beat)
    request |= {"before": wanted, "before_seconds": length / rate, "seconds": seconds}
    return Take(stems, make_record("continue", model, settings, request) | {"timings": timings})


def _sounding(sample: Callable[[int], FloatArray], manifest: Manifest) -> FloatArray:
    """The first of ATTEMPTS samples (S, frames, mels) in which no stem rests, or that in which fewest do.

    A stem may rest in a song, so a model may say so; but who arms a track wants it played.
    """
    best = sample(0)
    for attempt in range(1, ATTEMPTS):
        if not _resting(best, manifest).any():
            break
        other = sample(attempt)
        if _resting(other, manifest).sum() < _resting(best, manifest).sum():
            best = other
    return best


def _resting(mels: FloatArray, manifest: Manifest) -> NDArray[np.bool_]:
    """(S,) which of the stems (S, frames, mels), log magnitude, is RESTING_DB under a band in every frame."""
    if manifest.level is None:
        return np.zeros(len(mels), bool)
    least = 10 ** ((manifest.level.mixture_db - RESTING_DB) / 10)
    starts = range(0, mels.shape[1], manifest.window_frames)
    parts = [np.exp(2 * mels[:, start : start + manifest.window_frames]).mean(axis=2) for start in starts]
    return np.asarray(np.max([part.max(axis=1) for part in parts], axis=0) < least)


def _told(
    model: Model,
    text: str | None,
    audio: Audio | None,
    bpm: float | None,
    chords: str | None,
    beats_per_bar: int,
    first_beat: float,
) -> Conditions:
    """Prompt, tempo and chords as UNet inputs of any window. Raises UsageError as the task does."""
    manifest = model.manifest
    check_tempo(manifest, bpm, beats_per_bar, chords)
    chart = None if chords is None else parse_chords(chords)
    film = prompt_film(model, text, None if audio is None else check(audio, "The audio prompt"))

    def conditions(start: int, frames: int) -> dict[str, FloatArray]:
        told: dict[str, FloatArray] = {}
        if film is not None:
            told["film"] = film
        if bpm is not None and model.supports("grid"):
            told["grid"] = grid_condition(manifest, start, frames, bpm, beats_per_bar, first_beat)
        if bpm is not None and chart is not None:
            told["chords"] = chords_condition(manifest, start, frames, chart, bpm, beats_per_bar, first_beat)
        return told

    return conditions


def _with_other(model: Model, told: Conditions, heard: FloatArray, gain: float) -> Conditions:
    """The conditions and the other material as a mixture that holds none of the stems."""

    def conditions(start: int, frames: int) -> dict[str, FloatArray]:
        mixture = model.encode(window_mel(heard, model.manifest, start, frames, gain)[None])
        return told(start, frames) | {
            "mixture": mixture,
            "mixture_mask": np.ones((1, frames), np.float32),
            "mixture_stems": np.zeros((1, len(model.manifest.stems)), np.float32),
        }

    return conditions


def _with_chords(
    model: Model, told: Conditions, signals: Mapping[str, FloatArray], other: FloatArray | None, total: int
) -> Conditions:
    """The conditions and the chords that the context plays, where it plays any."""
    pitched = [signal for name, signal in signals.items() if name not in UNPITCHED]
    pitched += [] if other is None else [other]
    if not pitched:
        return told
    chords = heard_chords(_sum(pitched), model.manifest, total)

    def conditions(start: int, frames: int) -> dict[str, FloatArray]:
        return told(start, frames) | {"chords": chords[None, start : start + frames]}

    return conditions


def _context_latents(
    model: Model, signals: Mapping[str, FloatArray], silent: Sequence[str], gain: float
) -> Known:
    """Latents and mask of the known stems, whole windows of them."""
    manifest = model.manifest
    blank = nothing_known(model)
    quiet = np.zeros(1, np.float32)

    def known(start: int, frames: int) -> tuple[FloatArray, FloatArray]:
        latents, mask = blank(start, frames)
        sources = dict(signals) | dict.fromkeys(silent, quiet)
        if not sources:
            return latents, mask
        rows = [manifest.stems.index(name) for name in sources]
        mels = [window_mel(signal, manifest, start, frames, gain) for signal in sources.values()]
        latents[rows] = model.encode(np.stack(mels))
        mask[rows] = 1
        return latents, mask

    return known


def _ending_latents(model: Model, signals: Mapping[str, FloatArray], heard: int, gain: float) -> Known:
    """Latents and mask of a timeline that begins with the last `heard` latent frames of the signals."""
    manifest = model.manifest
    blank = nothing_known(model)
    rows = [manifest.stems.index(name) for name in signals]
    # A whole window that ends where the signals do: the encoder of some bundles takes nothing shorter.
    size = manifest.window_frames * manifest.mel.hop * manifest.latent.frames
    ends = [np.pad(signal[-size:], (max(0, size - len(signal)), 0)) for signal in signals.values()]
    mels = [window_mel(end, manifest, 0, manifest.window_frames, gain) for end in ends]
    ending = model.encode(np.stack(mels))[:, :, manifest.window_frames - heard :]

    def known(start: int, frames: int) -> tuple[FloatArray, FloatArray]:
        latents, mask = blank(start, frames)
        inside = ending[:, :, start : start + frames]
        latents[rows, :, : inside.shape[2]] = inside
        mask[rows, : inside.shape[2]] = 1
        return latents, mask

    return known


def _sum(signals: Collection[FloatArray]) -> FloatArray:
    """Signals (n,) of any lengths -> their sum, as long as the longest."""
    total = empty(max(len(signal) for signal in signals))
    for signal in signals:
        add_into(total, signal)
    return total


def _context_gain(manifest: Manifest, signals: Mapping[str, FloatArray], heard: FloatArray | None) -> float:
    """What brings the context (or, without one, the other material) to the level the model was trained at."""
    if manifest.level is None:
        return 1.0
    if signals:
        return gain_to(manifest.level.context_db, signal_level(_sum(signals.values()), manifest))
    return 1.0 if heard is None else gain_to(manifest.level.mixture_db, signal_level(heard, manifest))


def _check_length(seconds: float) -> None:
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise UsageError(f"The length must be {MIN_SECONDS:g} to {MAX_SECONDS:g} s, not {seconds:g}.")


def _check_names(manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        if name not in manifest.stems:
            raise UsageError(f"There is no stem {name!r}: this model plays {', '.join(manifest.stems)}.")


def _check_stems(
    manifest: Manifest, known: Mapping[str, Audio], armed: Sequence[str], silent: Sequence[str]
) -> None:
    _check_names(manifest, [*armed, *silent, *known])
    if not armed:
        raise UsageError("No stem is armed: say which to play.")
    if set(armed) == set(manifest.stems):
        raise UsageError("All stems are armed: that is generate, not fill.")
    for name in silent:
        if name in armed or name in known:
            raise UsageError(
                f"The stem {name} cannot be both silent and {'armed' if name in armed else 'given'}."
            )


def _common_shape(parts: Sequence[Audio]) -> tuple[int, int, int]:
    """(rate, longest length, most channels). Raises UsageError where nothing is given or rates differ."""
    if not parts:
        raise UsageError("There is no context: give at least one stem that is not armed, or use generate.")
    rates = sorted({part.sample_rate for part in parts})
    if len(rates) > 1:
        raise UsageError(
            f"The stems have different sample rates ({', '.join(map(str, rates))} Hz): make them one."
        )
    return rates[0], max(part.length for part in parts), max(part.channels for part in parts)


def _render(model: Model, latents: FloatArray, makeup: FloatArray, callback: Callback | None) -> FloatArray:
    """(N, Z, total, F) -> audio (N, samples) at the vocoder's rate, with the makeup (N, 1) in dB."""
    mels = decode_timeline(model, latents, stretch(callback, "render", 0.8, 0.85))
    return _played(model, mels, makeup, callback)


def _played(model: Model, mels: FloatArray, makeup: FloatArray, callback: Callback | None) -> FloatArray:
    """Log mels (N, frames, mels), which are changed -> audio (N, samples) with the makeup (N, 1) in dB."""
    hush(mels, makeup, model.manifest.mel.floor)
    rendered = vocode_timeline(model, mels, stretch(callback, "render", 0.85, 1.0))
    rendered *= 10 ** (makeup / 20)
    return rendered


def hush(mels: FloatArray, gain: FloatArray, floor: float) -> None:
    """Takes down, in place, what a gain (N, 1) in dB would bring up from the floor of log mels (N, T, M).

    Bands at the floor tell nothing: their sound, made louder, is hiss under the music. A downward expander of
    ratio 2, whose threshold is as far above the floor as the gain reaches, ends where it would have been.
    """
    reach = gain[:, 0] * np.float32(np.log(10) / 20)
    for number in np.flatnonzero(gain[:, 0] > 0):
        for start in range(0, mels.shape[1], HUSH_BLOCK):
            block = mels[number, start : start + HUSH_BLOCK]
            np.minimum(block, 2 * block - np.float32(np.log(floor)) - reach[number], out=block)


def _makeup(
    manifest: Manifest, stems: Sequence[str], settings: Settings, *, alone: bool = False
) -> FloatArray:
    """(len(stems), 1) dB that bring what the model makes of each stem to its usual level.

    settings: resolved. alone: made up with nothing to play along with.
    """
    level = manifest.level
    if level is None:
        return np.zeros((len(stems), 1), np.float32)
    db = level.alone_db if alone and level.alone_db else level.makeup_db
    more = {} if settings.sampler == "distilled" else level.ordinary_db
    return np.array([[db.get(s, 0.0) + more.get(s, 0.0)] for s in stems], np.float32)


def _unclipped(stems: FloatArray) -> np.float32:
    """The factor, at most 1, that keeps every stem (S, n) and their sum within full scale."""
    peak = 0.0
    for start in range(0, stems.shape[1], PEAK_BLOCK):  # a take may be half an hour long
        block = stems[:, start : start + PEAK_BLOCK]
        peak = max(peak, float(np.abs(block).max()), float(np.abs(block.sum(axis=0)).max()))
    return np.float32(min(1.0, FULL_SCALE / max(peak, 1e-9)))


def _request(
    text: str | None,
    audio: Audio | None,
    bpm: float | None,
    chords: str | None,
    beats: int,
    first_beat: float,
) -> dict[str, Any]:
    return {
        "text": text,
        "audio": None if audio is None else round(audio.seconds, 3),
        "bpm": bpm,
        "chords": chords,
        "beats_per_bar": beats,
        "first_beat": first_beat,
    }
