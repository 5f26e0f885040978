"""What a bass plays, and what its chord is."""

from __future__ import annotations

import numpy as np

from engine.audio import Audio, resample
from training.bands import Song
from training.charts import Chord
from training.metrics import Array, rms_db

RATE = 44100
LOW_RATE = 5512  # the bass is analysed at
LOWEST, HIGHEST = 28, 64  # MIDI pitches
BINS = 1 << 16  # of the padded transform
HARMONICS, DECAY = 5, 0.8
QUIET_DB = -60.0
LATE = 0.04  # s after the beat, past the attack
LONGEST = 0.35  # s that are looked at


def pitch_class(audio: Array, start: float, seconds: float) -> int | None:
    """The pitch class (C = 0) of a monophonic bass in a stretch, None for silence.

    audio: at 44.1 kHz. The pitch whose harmonics are strongest (harmonic summation, Hermes 1988): on the
    held-out basses it is the written one in 133 of 133 notes, where YIN finds 98.
    """
    begin, end = round(start * RATE), round((start + seconds) * RATE)
    part = audio[max(0, begin) : end]
    if len(part) < 0.1 * RATE or rms_db(part) < QUIET_DB:
        return None
    low = resample(Audio(part[None].astype(np.float32), RATE), LOW_RATE).samples[0]
    spectrum = np.sqrt(np.abs(np.fft.rfft(low * np.hanning(len(low)), BINS)))
    pitches = np.arange(LOWEST - 0.3, HIGHEST + 0.3, 0.1)
    frequency = 440 * 2 ** ((pitches - 69) / 12)
    salience = np.zeros(len(pitches))
    for harmonic in range(1, HARMONICS + 1):
        bins = np.round(frequency * harmonic / LOW_RATE * BINS).astype(int)
        salience += DECAY ** (harmonic - 1) * spectrum[bins]
    return round(pitches[salience.argmax()]) % 12


def chord_at(song: Song, seconds: float) -> Chord:
    """The chord that sounds `seconds` into the song."""
    beat = seconds * song.bpm / 60 + 1e-6
    return [chord for chord in song.chords if chord.beat <= beat][-1]


def downbeats(song: Song, start: float, seconds: float) -> list[float]:
    """Times in the song at which a bar begins, within a window that begins at `start`."""
    bar = song.beats_per_bar * 60 / song.bpm
    first = int(np.ceil(start / bar - 1e-6))
    last = int(np.floor((start + seconds - LONGEST - LATE) / bar))
    return [number * bar for number in range(first, last + 1)]


def beat_one(audio: Array, song: Song, start: float, chords_of: Song | None = None) -> tuple[float, float]:
    """Shares of bars on whose first beat the bass plays the chord's root, and any of its tones.

    audio: the bass from `start` seconds into the song on. chords_of: another song, for the floor.
    """
    length = min(LONGEST, 60 / song.bpm)
    times = downbeats(song, start, len(audio) / RATE)
    roots = tones = 0
    for time in times:
        heard = pitch_class(audio, time - start + LATE, length)
        chord = chord_at(chords_of or song, time)
        roots += heard == chord.root
        tones += heard is not None and heard in chord.tones
    return roots / max(1, len(times)), tones / max(1, len(times))
