"""The tasks on a tiny bundle: shapes, seeds, subsets, cancelling, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import STEMS, VOCODER_RATE, write_tiny_bundle

from engine import tasks
from engine.audio import Audio
from engine.errors import BacklineError, Cancelled, UsageError
from engine.model import Model
from engine.take import Settings, Take

FEW = Settings(steps=2)
PLAIN = ("text",)  # no context, mixture, grid or chords: what any published model can do


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(write_tiny_bundle(tmp_path_factory.mktemp("full")), "cpu", 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("plain")
    return Model.open(write_tiny_bundle(folder, capabilities=PLAIN, prediction="eps", level=None), "cpu", 1)


def tone(seconds: float = 1.5, rate: int = 16000, channels: int = 1, hz: float = 220.0) -> Audio:
    time = np.arange(round(seconds * rate)) / rate
    left = 0.2 * np.sin(2 * np.pi * hz * time) * (1 + np.sin(2 * np.pi * 3 * time))
    return Audio(np.stack([left * (1 + 0.1 * c) for c in range(channels)]).astype(np.float32), rate)


def band(seconds: float = 1.5, rate: int = 16000, channels: int = 1) -> dict[str, Audio]:
    return {name: tone(seconds, rate, channels, 110.0 * (i + 1)) for i, name in enumerate(STEMS)}


def samples(take: Take) -> bytes:
    return b"".join(take.stems[name].samples.tobytes() for name in sorted(take.stems))


@pytest.mark.parametrize("seconds", [1.0, 1.37, 1.92, 4.003])
def test_generate_has_the_exact_length(model: Model, seconds: float) -> None:
    take = tasks.generate(model, seconds=seconds, settings=FEW)
    assert tuple(take.stems) == STEMS
    for audio in take.stems.values():
        assert audio.samples.shape == (1, round(seconds * VOCODER_RATE))
        assert audio.samples.dtype == np.float32
        assert np.abs(audio.samples).max() > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fill_takes_every_subset(model: Model, plain: Model, size: int) -> None:
    for armed in itertools.combinations(STEMS, size):
        context = {name: audio for name, audio in band().items() if name not in armed}
        for each in (model, plain):
            take = tasks.fill(each, context, armed, settings=FEW)
            assert tuple(take.stems) == armed
            assert all(audio.samples.shape == (1, 24000) for audio in take.stems.values())
