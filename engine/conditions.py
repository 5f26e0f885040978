"""What a model is told beside the audio: the prompt, the tempo grid, the chords."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio, fit, mono, resample
from engine.errors import BacklineError, UsageError
from engine.features import log_mel
from engine.listening import gain_to, signal_level
from engine.manifest import Manifest
from engine.model import Model

FloatArray = NDArray[np.float32]

MIN_BPM, MAX_BPM = 20.0, 400.0
NATURALS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"": 0, "#": 1, "b": -1, "♯": 1, "♭": -1}
MAJOR, MINOR = (0, 4, 7), (0, 3, 7)
# Semitones above the root, by how the quality is written.
QUALITIES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("", "maj", "M"), MAJOR),
    **dict.fromkeys(("m", "min", "-"), MINOR),
    **dict.fromkeys(("7", "dom7"), (*MAJOR, 10)),
    **dict.fromkeys(("maj7", "M7", "Δ"), (*MAJOR, 11)),
    **dict.fromkeys(("m7", "min7", "-7"), (*MINOR, 10)),
    **dict.fromkeys(("mM7", "m(maj7)", "mmaj7", "minmaj7"), (*MINOR, 11)),
    **dict.fromkeys(("6", "maj6", "M6"), (*MAJOR, 9)),
    **dict.fromkeys(("m6", "min6"), (*MINOR, 9)),
    **dict.fromkeys(("69", "6/9"), (*MAJOR, 9, 2)),
    "9": (*MAJOR, 10, 2),
    **dict.fromkeys(("maj9", "M9"), (*MAJOR, 11, 2)),
    **dict.fromkeys(("m9", "min9"), (*MINOR, 10, 2)),
    "11": (*MAJOR, 10, 2, 5),
    **dict.fromkeys(("m11", "min11"), (*MINOR, 10, 2, 5)),
    "13": (*MAJOR, 10, 2, 9),
    **dict.fromkeys(("add9", "add2"), (*MAJOR, 2)),
    **dict.fromkeys(("madd9", "m(add9)"), (*MINOR, 2)),
    **dict.fromkeys(("dim", "°", "o"), (0, 3, 6)),
    **dict.fromkeys(("dim7", "°7", "o7"), (0, 3, 6, 9)),
    **dict.fromkeys(("m7b5", "m7-5", "ø", "ø7"), (0, 3, 6, 10)),
    **dict.fromkeys(("aug", "+"), (0, 4, 8)),
    **dict.fromkeys(("aug7", "+7", "7#5"), (0, 4, 8, 10)),
    "7b5": (0, 4, 6, 10),
    "7b9": (*MAJOR, 10, 1),
    "7#9": (*MAJOR, 10, 3),
    "sus2": (0, 2, 7),
    **dict.fromkeys(("sus4", "sus"), (0, 5, 7)),
    **dict.fromkeys(("7sus4", "7sus"), (0, 5, 7, 10)),
    "9sus4": (0, 5, 7, 10, 2),
    "5": (0, 7),
}


def prompt_film(model: Model, text: str | None, audio: Audio | None) -> FloatArray | None:
    """(1, E) embedding of the prompt, None for no prompt; text and audio together are averaged.

    Raises UsageError where the bundle does not declare what is asked.
    """
    embeddings = []
    if text is not None and text.strip():
        embeddings.append(model.embed_text(text.strip()))
    if audio is not None:
        embeddings.append(_audio_embedding(model, audio))
    return _mean_direction(np.concatenate(embeddings)) if embeddings else None


def grid_condition(
    manifest: Manifest, start: int, frames: int, bpm: float, beats_per_bar: int = 4, first_beat: float = 0.0
) -> FloatArray:
    """(1, T, 6) tempo grid of latent frames start .. start + T, laid out as manifest.Grid says.

    first_beat: seconds at which a bar begins.
    """
    beats = _beats(manifest, start, frames, bpm, first_beat)
    beat, bar = 2 * np.pi * beats, 2 * np.pi * beats / beats_per_bar
    tempo = np.full(frames, np.log2(bpm / 120))
    columns = [np.sin(beat), np.cos(beat), np.sin(bar), np.cos(bar), tempo, np.ones(frames)]
    return np.stack(columns, axis=-1).astype(np.float32)[None]


def chords_condition(
    manifest: Manifest,
    start: int,
    frames: int,
    chart: list[list[FloatArray]],
    bpm: float,
    beats_per_bar: int = 4,
    first_beat: float = 0.0,
) -> FloatArray:
    """(1, T, 25) chords of latent frames start .. start + T; the chart repeats over the length."""
    bars = _beats(manifest, start, frames, bpm, first_beat) / beats_per_bar
    rows = np.zeros((frames, 25), np.float32)
    for i, position in enumerate(bars):
        bar = chart[int(np.floor(position)) % len(chart)]
        rows[i] = bar[int((position - np.floor(position)) * len(bar))]
    return rows[None]


def parse_chords(text: str) -> list[list[FloatArray]]:
    """A chart such as "C | Am | F G | G7" -> bars of chord vectors (25,), as manifest.Chords lays them out.

    Chords in a bar share it equally, % repeats the bar before, N.C. is no known chord, and a bass after a
    slash joins the chord's tones. Raises UsageError for what is no chord.
    """
    bars: list[list[FloatArray]] = []
    for cell in text.strip().strip("|").split("|"):
        words = cell.split()
        if not words:
            raise UsageError(f"The chords {text!r} have an empty bar.")
        if words == ["%"]:
            if not bars:
                raise UsageError("The chords begin with %, which repeats a bar that is not there.")
            bars.append(bars[-1])
        else:
            bars.append([chord_vector(word) for word in words])
    return bars


def chord_vector(name: str) -> FloatArray:
    """(25,) for a chord's name: root one-hot, the pitch classes that sound, 1. Raises UsageError."""
    vector = np.zeros(25, np.float32)
    if name.upper() in ("N.C.", "NC", "N"):
        return vector
    match = re.fullmatch(r"([A-G])([#b♯♭]?)(.*?)(?:/([A-G])([#b♯♭]?))?", name)
    if match is None or match[3] not in QUALITIES:
        raise UsageError(f"There is no chord {name!r}.")
    root = (NATURALS[match[1]] + ACCIDENTALS[match[2]]) % 12
    tones = {(root + interval) % 12 for interval in QUALITIES[match[3]]}
    if match[4]:
        tones.add((NATURALS[match[4]] + ACCIDENTALS[match[5]]) % 12)
    vector[root] = 1
    vector[[12 + tone for tone in tones]] = 1
    vector[24] = 1
    return vector


def check_tempo(manifest: Manifest, bpm: float | None, beats_per_bar: int, chords: str | None) -> None:
    """Raises UsageError where tempo and chords make no sense or the bundle does not declare them."""
    if chords is not None and "chords" not in manifest.capabilities:
        raise UsageError(f"The model {manifest.name} takes no chords.")
    if chords is not None and bpm is None:
        raise UsageError("Chords need a tempo: say how many bpm.")
    if bpm is None:
        return
    if "grid" not in manifest.capabilities and chords is None:
        raise UsageError(f"The model {manifest.name} takes no tempo.")
    if not MIN_BPM <= bpm <= MAX_BPM:
        raise UsageError(f"The tempo must be {MIN_BPM:g} to {MAX_BPM:g} bpm, not {bpm:g}.")
    if not 1 <= beats_per_bar <= 16:
        raise UsageError(f"A bar must have 1 to 16 beats, not {beats_per_bar}.")


def _beats(manifest: Manifest, start: int, frames: int, bpm: float, first_beat: float) -> NDArray[np.float64]:
    """(T,) position in beats of the centre of each latent frame."""
    seconds = manifest.latent.frames * manifest.mel.hop / manifest.mel.sample_rate
    return ((np.arange(start, start + frames) + 0.5) * seconds - first_beat) * bpm / 60


def _audio_embedding(model: Model, audio: Audio) -> FloatArray:
    """(1, E): the mean direction over the windows of the reference."""
    clap = model.manifest.clap
    if not model.supports("audio") or clap is None:
        raise UsageError(f"The model {model.manifest.name} takes no audio prompt.")
    if clap.audio_input == "audio":
        if clap.sample_rate is None or clap.samples is None:
            raise BacklineError(f"The model {model.manifest.name} does not say what audio its prompt takes.")
        signal = mono(resample(audio, clap.sample_rate))
        if len(signal) < clap.samples:  # laion-clap's "repeatpad": whole repetitions, then silence
            signal = fit(np.tile(signal, clap.samples // len(signal)), clap.samples)
        parts = [model.embed_audio(audio=window[None]) for window in _cut(signal, clap.samples)]
        return _mean_direction(np.concatenate(parts))
    signal = mono(resample(audio, model.manifest.mel.sample_rate))
    if model.manifest.level is not None:
        gain = gain_to(model.manifest.level.mixture_db, signal_level(signal, model.manifest))
        signal = signal * np.float32(gain)
    windows = _cut(signal, model.manifest.window_samples)
    mels = [log_mel(window[None], model.manifest.mel)[:, None] for window in windows]
    return _mean_direction(np.concatenate([model.embed_audio(mel=mel) for mel in mels]))


def _cut(signal: FloatArray, size: int) -> list[FloatArray]:
    """Whole windows of a signal; a short one is repeated to fill one window."""
    if len(signal) < size:
        return [fit(np.tile(signal, -(-size // len(signal))), size)]
    return [signal[start : start + size] for start in range(0, len(signal) - size + 1, size)]


def _mean_direction(embeddings: FloatArray) -> FloatArray:
    """(N, E) -> (1, E): the mean, at the mean length of the rows."""
    mean = embeddings.mean(axis=0, keepdims=True)
    length = np.linalg.norm(embeddings, axis=1).mean()
    return (mean * (length / max(float(np.linalg.norm(mean)), 1e-12))).astype(np.float32)
