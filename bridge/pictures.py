"""A picture of a job: mel spectrograms of what was given and what was made, on one time axis."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio
from engine.features import hann, mel_edges, mel_filterbank
from engine.manifest import Mel

COLUMNS = 1200  # frames drawn at most, whatever the length
BANDS = 96
LOWEST, HIGHEST = 40.0, 16000.0  # Hz
RANGE_DB = 70.0  # from white to black in a row
LIFT_DB = 24.0  # a quiet row is shown up to this much louder
TICKS = (300, 1000, 3000, 10000)  # Hz
GIVEN, MADE = "bone", "magma"  # colour maps
INK, PAPER = "#1c1c22", "#ffffff"


@dataclass(frozen=True)
class Row:
    """One spectrogram: what it is called, the sound, and whether the job was given it or made it."""

    label: str
    audio: Audio
    given: bool


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a PNG of `rows` from top to bottom.

    The rows start together; a shorter one ends earlier. A quiet row is brightened, but not beyond LIFT_DB,
    so that what is nearly silent looks so.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its font cache on a first run
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = max(row.audio.seconds for row in rows)
    pictures = [_power(row.audio, seconds) for row in rows]
    loudest = max(float(power.max()) for power, _ in pictures) or 1.0
    figure = Figure(figsize=(11, 0.9 + 1.25 * len(rows)), dpi=110, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axis, row, (power, edges) in zip(axes, rows, pictures, strict=True):
        white = max(float(power.max()), loudest * 10 ** (-LIFT_DB / 10))
        level = 10 * np.log10(np.maximum(power / white, 10 ** (-RANGE_DB / 10)))
        axis.imshow(
            level.T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=GIVEN if row.given else MADE,
            vmin=-RANGE_DB,
            vmax=0,
            extent=(0, row.audio.seconds, 0, BANDS),
        )
        ticks = [hz for hz in TICKS if edges[0] < hz < edges[-1]]
        positions = np.interp(ticks, edges, np.arange(len(edges)) - 0.5)
        axis.set_yticks(
            positions, [f"{hz // 1000} kHz" if hz >= 1000 else f"{hz} Hz" for hz in ticks], fontsize=7
        )
        axis.set_ylabel(f"{row.label}\n{'given' if row.given else 'made'}", fontsize=10, color=INK)
        axis.set_facecolor(INK)
    axes[0].set_xlim(0, seconds)
    axes[-1].set_xlabel("seconds", fontsize=10, color=INK)
    figure.suptitle(title, fontsize=12, color=INK)
    figure.savefig(path, format="png", metadata={"Software": None})


def _power(audio: Audio, seconds: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mel power (frames, BANDS), the mean of the channels, and the (BANDS + 2,) band corners in Hz.

    `seconds` is the whole picture's width; a shorter sound gets its share of the columns.
    """
    rate = audio.sample_rate
    n_fft = 1 << round(np.log2(rate / 20))
    mel = Mel(
        sample_rate=rate,
        n_fft=n_fft,
        win_length=n_fft,
        hop=max(1, n_fft // 4),
        n_mels=BANDS,
        f_min=LOWEST,
        f_max=min(HIGHEST, rate / 2),
        floor=1e-5,
    )
    hop = max(mel.hop, round(seconds * rate / COLUMNS))
    starts = np.arange(0, audio.length, hop)
    power = np.zeros((len(starts), BANDS))
    window, filters = hann(n_fft, n_fft), mel_filterbank(mel)
    for channel in audio.samples:
        frames = np.zeros((len(starts), n_fft), np.float32)
        for frame, start in zip(frames, starts, strict=True):
            samples = channel[start : start + n_fft]
            frame[: len(samples)] = samples
        magnitude = np.abs(np.fft.rfft(frames * window, axis=1))
        power += np.square(magnitude @ filters) / audio.channels
    return power, mel_edges(mel)
