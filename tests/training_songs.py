"""Songs as training.render writes them, made of noise in a few milliseconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training.charts import random_chart, timeline
from training.dataset import RenderedSong
from training.mel import GEOMETRY
from training.stems import STEMS

FRAMES = 900  # a little more than a window
RENDERS = 2
WORDS = {
    "bass": ("acoustic", "upright bass"),
    "drums": ("electric", "drum machine"),
    "guitar": ("acoustic", "steel guitar"),
    "piano": ("honky-tonk", "piano"),
}


def labels(rng: np.random.Generator, **changed: Any) -> dict[str, Any]:
    """Every label of a song, as its JSON file holds them."""
    beats_per_bar = float(rng.choice([3, 4, 6]))
    chart, key = random_chart(rng, 24)
    onsets = {stem: np.sort(rng.uniform(0, 10, 40)).round(3).tolist() for stem in STEMS}
    notes = [[i * 0.25, 0.2, 40 + int(rng.integers(24))] for i in range(40)]
    values = {
        "bpm": float(rng.uniform(70, 160)),
        "beats_per_bar": beats_per_bar,
        "seconds": FRAMES * GEOMETRY.hop / GEOMETRY.sample_rate,
        "chords": [asdict(chord) for chord in timeline(chart, beats_per_bar)],
        "chart": chart,
        "key": key,
        "style": "slowbolero",
        "swing": False,
        "grooves": dict.fromkeys(STEMS, "SlowBolero"),
        "onsets": onsets,
        "notes": {stem: notes for stem in STEMS if stem != "drums"},
        "sources": [[{"name": stem, "words": list(WORDS[stem])}] * RENDERS for stem in STEMS],
    }
    return values | changed


def song(seed: int, frames: int = FRAMES, **changed: Any) -> RenderedSong:
    """Each stem is noise in its own quarter of the mel bands, at the floor elsewhere."""
    rng = np.random.default_rng(seed)
    mels = np.zeros((len(STEMS), RENDERS, frames, GEOMETRY.n_mels), np.uint8)
    quarter = GEOMETRY.n_mels // len(STEMS)
    for i in range(len(STEMS)):
        noise = rng.normal(150, 20, (RENDERS, frames, quarter))
        mels[i, :, :, i * quarter : (i + 1) * quarter] = noise.clip(1, 255)
    known = labels(rng, **changed)
    times = np.concatenate([known["onsets"][stem] for stem in STEMS])
    return RenderedSong(mels, known, np.unique((times * 20).astype(int)) / 20)


def save(folder: Path, number: int, made: RenderedSong) -> Path:
    """Writes a song under its number; returns the path of its mels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:06d}.npy"
    np.save(path, made.mels)
    path.with_suffix(".json").write_text(json.dumps(made.labels))
    return path
