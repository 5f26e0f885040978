"""Running the command inside the test process, and small sounds to give it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from bridge.cli import run

RATE = 22050
STEMS = ("bass", "drums", "guitar", "piano")


@dataclass(frozen=True)
class Ran:
    """How a command line ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def backline(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run `backline ARGUMENTS`; whatever happens, no traceback reaches the user."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return Ran(status, out, err)


def refused(ran: Ran, status: int, *words: str) -> None:
    """A user's mistake: this exit status, and one sentence on standard error that holds these words."""
    assert ran.status == status, ran
    sentence = ran.err.strip()
    assert sentence and "\n" not in sentence and sentence.endswith("."), ran.err
    assert "unexpected" not in sentence
    for word in words:
        assert word in sentence, sentence


def noise(seconds: float, *, rate: int = RATE, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """(samples, channels) of plucked noise, well below full scale."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    plucks = np.exp(-5 * (times % 0.5))[:, None]
    return (0.1 * plucks * rng.standard_normal((len(times), channels))).astype(np.float32)


def write_song(
    folder: Path, names: tuple[str, ...] = STEMS, *, seconds: float = 3.0, rate: int = RATE, channels: int = 1
) -> Path:
    """A folder with one wav per name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        samples = noise(seconds, rate=rate, channels=channels, seed=seed)
        soundfile.write(folder / f"{name}.wav", samples, rate, "FLOAT")
    return folder


def samples(path: Path) -> NDArray[np.float32]:
    """(samples, channels) of a wav."""
    return soundfile.read(path, dtype="float32", always_2d=True)[0]
