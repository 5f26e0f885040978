"""Audio in memory and on disk: reading with clear refusals, atomic float32 wav, resampling."""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from engine.errors import BacklineError

MIN_SECONDS = 1.0
MIN_RATE, MAX_RATE = 8000, 192000  # Hz
MAX_CHANNELS = 8
BLOCK = 1 << 20  # samples a channel handled at a time
SPILL = 16 << 20  # bytes; a longer signal lives in a temporary file, so that long jobs need no more memory
RIFF_LIMIT = (1 << 32) - (1 << 16)  # bytes; sizes past 32 bits need RF64
IEEE_FLOAT = 3  # the wave format tag


@dataclass(frozen=True)
class Audio:
    """samples: float32 (channels, n); sample_rate: Hz."""

    samples: NDArray[np.float32]
    sample_rate: int

    @property
    def channels(self) -> int:
        return self.samples.shape[0]

    @property
    def length(self) -> int:
        """Samples per channel."""
        return self.samples.shape[1]

    @property
    def seconds(self) -> float:
        return self.length / self.sample_rate


def empty(*shape: int) -> NDArray[np.float32]:
    """Room for float32 of this shape, all zero: in memory, or in an unnamed temporary file past 16 MiB.

    Raises BacklineError where the disk has no room for that file.
    """
    size = 4 * math.prod(shape)
    if size <= SPILL:
        return np.zeros(shape, np.float32)
    try:
        with tempfile.TemporaryFile(prefix="backline-") as file:
            if hasattr(os, "posix_fallocate"):
                # Reserved now: a mapped page that finds the disk full later would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float32, "w+", shape=shape)
    except OSError as error:
        raise _unwritable(Path(tempfile.gettempdir()), error) from error


def release(*arrays: NDArray[np.float32]) -> None:
    """Gives back the memory of what `empty` put into a file; the samples stay there and are read when needed.

    A page of the file that was touched counts as this process's until then. Views of such an array will do;
    other arrays are left as they are.
    """
    for array in arrays:
        mapped: object = array
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def add_into(total: NDArray[np.float32], part: NDArray[np.float32]) -> None:
    """total (..., n) += part (..., up to n samples), a block at a time."""
    for start in range(0, part.shape[-1], BLOCK):
        stop = min(start + BLOCK, part.shape[-1])
        total[..., start:stop] += part[..., start:stop]
        release(total, part)


def check(audio: Audio, name: str, shortest: float = MIN_SECONDS) -> Audio:
    """The audio itself, if a task can use it. Raises BacklineError, a sentence that begins with `name`.

    shortest: seconds that it must last.
    """
    samples, rate = audio.samples, audio.sample_rate
    if samples.ndim != 2:
        raise BacklineError(f"{name} must be (channels, samples), not of shape {samples.shape}.")
    if not 1 <= samples.shape[0] <= MAX_CHANNELS:
        raise BacklineError(f"{name} has {samples.shape[0]} channels; 1 to {MAX_CHANNELS} are supported.")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BacklineError(f"{name} is sampled at {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz are supported.")
    if samples.shape[1] == 0:
        raise BacklineError(f"{name} is empty: it holds no samples.")
    if samples.shape[1] < shortest * rate:
        have, need = f"{samples.shape[1] / rate:.2f}", f"{shortest:g}"
        raise BacklineError(f"{name} is only {have} s long; at least {need} s is needed.")
    for block in _blocks(samples):
        if not np.isfinite(block).all():
            raise BacklineError(f"{name} holds NaN or infinite samples.")
    return audio


def is_silent(audio: Audio) -> bool:
    """Whether every sample is exactly zero."""
    return not any(block.any() for block in _blocks(audio.samples))


def mono(audio: Audio) -> NDArray[np.float32]:
    """(n,) mean of the channels; the first channel where the mean cancels (channels in opposite phase)."""
    if audio.channels == 1:
        return audio.samples[0]
    mean = empty(audio.length)
    kept = power = 0.0
    for start in range(0, audio.length, BLOCK):
        block = audio.samples[:, start : start + BLOCK]
        mean[start : start + BLOCK] = block.mean(axis=0)
        kept += float(np.square(mean[start : start + BLOCK], dtype=np.float64).sum())
        power += float(np.square(block, dtype=np.float64).sum()) / audio.channels
        release(mean, block)
    return mean if kept >= 1e-4 * power else audio.samples[0]


def read(path: str | Path, shortest: float = MIN_SECONDS) -> Audio:
    """Any file libsndfile reads (wav, flac, aiff, ogg, mp3; 8 bit to float64) as float32.

    Raises BacklineError for a missing or unreadable file, no audio, no samples, less than `shortest`
    seconds, NaN or infinite samples, a rate outside 8 to 192 kHz, or more than 8 channels.
    """
    path = Path(path)
    if not path.exists():
        raise BacklineError(f"{path} does not exist.")
    if not path.is_file():
        raise BacklineError(f"{path} is not a file.")
    if not os.access(path, os.R_OK):
        raise BacklineError(f"{path} cannot be read: permission denied.")
    if path.stat().st_size == 0:
        raise BacklineError(f"{path} is empty: the file has no bytes.")
    try:
        with soundfile.SoundFile(path) as file:
            # Checked before a sample is read: a header may promise more than memory holds.
            if file.channels > MAX_CHANNELS or not MIN_RATE <= file.samplerate <= MAX_RATE:
                return check(Audio(np.zeros((file.channels, 1), np.float32), file.samplerate), str(path))
            samples = _read_samples(file)
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        raise BacklineError(f"{path} is not an audio file that can be read.") from error
    return check(Audio(samples, rate), str(path), shortest)


def write(path: str | Path, audio: Audio) -> None:
    """A float32 wav, RF64 where it passes 4 GB; complete or not there at all.

    It is written under a temporary name in the same folder, flushed to the disk and renamed. The bytes
    depend on the samples alone: libsndfile would add a PEAK chunk with the time of day.
    Raises BacklineError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(_wav_header(audio))
            for block in _blocks(audio.samples):
                file.write(np.ascontiguousarray(block.T, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def resample(audio: Audio, sample_rate: int) -> Audio:
    """At another rate (soxr HQ); length round(n * new / old). The audio itself where the rate is the same."""
    if sample_rate == audio.sample_rate:
        return audio
    length = round(audio.length * sample_rate / audio.sample_rate)
    result = empty(audio.channels, length)
    for channel in range(audio.channels):
        _resample_channel(audio.samples[channel], audio.sample_rate, result[channel], sample_rate)
    return Audio(result, sample_rate)


def fit(samples: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """(..., n) cut or padded with zeros at the end to (..., length)."""
    if samples.shape[-1] >= length:
        return samples[..., :length]
    result = empty(*samples.shape[:-1], length)
    result[..., : samples.shape[-1]] = samples
    return result


def _resample_channel(source: NDArray[np.float32], old: int, target: NDArray[np.float32], new: int) -> None:
    stream = soxr.ResampleStream(old, new, 1, "float32", "HQ")
    written = 0
    for start in range(0, max(1, len(source)), BLOCK):
        last = start + BLOCK >= len(source)
        part = stream.resample_chunk(np.ascontiguousarray(source[start : start + BLOCK]), last)
        part = part[: len(target) - written]
        target[written : written + len(part)] = part
        written += len(part)
        release(source, target)


def _blocks(samples: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, samples.shape[1], BLOCK):
        yield samples[:, start : start + BLOCK]
        release(samples)


def _read_samples(file: soundfile.SoundFile) -> NDArray[np.float32]:
    parts: list[NDArray[np.float32]] = []
    samples = empty(file.channels, max(0, file.frames)) if file.seekable() else None
    position = 0
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        if samples is None or position + len(block) > samples.shape[1]:
            parts.append(block.T)  # a header that promised less than there is
        else:
            samples[:, position : position + len(block)] = block.T
            position += len(block)
            release(samples)
    read_so_far = np.zeros((file.channels, 0), np.float32) if samples is None else samples[:, :position]
    return np.concatenate([read_so_far, *parts], axis=1) if parts else read_so_far


def _wav_header(audio: Audio) -> bytes:
    frame = 4 * audio.channels
    size = frame * audio.length
    rate = audio.sample_rate
    layout = struct.pack("<HHIIHH", IEEE_FLOAT, audio.channels, rate, rate * frame, frame, 32)
    chunks = b"fmt " + struct.pack("<I", len(layout) + 2) + layout + b"\0\0"
    chunks += b"fact" + struct.pack("<II", 4, min(audio.length, 0xFFFFFFFF))
    if size < RIFF_LIMIT:
        chunks += b"data" + struct.pack("<I", size)
        return b"RIFF" + struct.pack("<I", 4 + len(chunks) + size) + b"WAVE" + chunks
    chunks += b"data" + struct.pack("<I", 0xFFFFFFFF)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 4 + 36 + len(chunks) + size, size, audio.length, 0)
    return b"RF64" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + sizes + chunks


def _unwritable(path: Path, error: OSError) -> BacklineError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return BacklineError(f"The disk is full: {path} could not be written.")
    return BacklineError(f"{path} could not be written: {error.strerror or error}.")
