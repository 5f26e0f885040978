"""Words for a window of music: measured (density, brightness) or known (tempo, instruments, style, key)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from training.dataset import RenderedSong, Windows, draw
from training.mel import FLOOR, GEOMETRY
from training.stems import STEMS

STYLE_WORDS = (
    "rock", "swing", "jazz", "waltz", "ballad", "blues", "bossa", "samba", "folk", "country", "march",
    "polka", "tango", "rhumba", "salsa", "mambo", "merengue", "calypso", "ska", "funk", "soul", "ragtime",
    "twist", "disco", "broadway", "foxtrot", "bolero", "beguine", "latin", "cha", "gypsy", "bluegrass",
    "spiritual", "dixie", "trance", "pop", "soft", "light", "combo", "bebop", "boogie", "zydeco",
    "charleston", "hymn", "lullaby", "arpeggio",
)  # fmt: skip
MEASURED_WORDS = ("slow", "fast", "sparse", "busy", "dark", "bright", "major", "minor", "bpm")
FILLER = (
    "a", "an", "the", "with", "and", "in", "at", "by", "of", "no", "without", "band", "song", "music",
    "track", "groove", "plays", "playing", "sound", "style", "feel", "loop",
)  # fmt: skip
PACE = (95.0, 125.0)  # bpm; slower is slow, faster is fast
FRAME_RATE = GEOMETRY.sample_rate / GEOMETRY.hop


def centroid(mels: torch.Tensor) -> torch.Tensor:
    """Brightness: the magnitude-weighted mean mel band, (..., frames, mels) -> (...); 0 where silent."""
    magnitude = (mels.exp() - np.exp(FLOOR)).clamp_min(0)
    bands = torch.arange(mels.shape[-1], dtype=mels.dtype)
    return (magnitude * bands).sum((-1, -2)) / magnitude.sum((-1, -2)).clamp_min(1e-6)


def onset_density(song: RenderedSong, start: int, frames: int) -> float:
    """Different onset times (50 ms apart) of all stems together, per second."""
    begin, end = start / FRAME_RATE, (start + frames) / FRAME_RATE
    inside = np.searchsorted(song.onsets, end) - np.searchsorted(song.onsets, begin)
    return float(inside / (end - begin))


@dataclass(frozen=True)
class Thresholds:
    """Thirds of the training data's brightness (mixture, then each stem) and of its onset density."""

    brightness: tuple[tuple[float, float], ...]
    density: tuple[float, float]


def measure_thresholds(songs: list[RenderedSong], windows: int = 256) -> Thresholds:
    """The thirds over random augmented windows; the same songs and count give the same numbers."""
    rng = np.random.default_rng(0)
    bright, dense = [], []
    for _ in range(windows // 16):
        batch = draw(songs, 16, rng)
        bright.append(torch.cat([centroid(batch.mixture)[:, None], centroid(batch.mels)], 1).numpy())
        length = batch.mels.shape[2]
        dense += [onset_density(s, t, length) for s, t in zip(batch.songs, batch.starts, strict=True)]
    columns = np.concatenate(bright).T
    thirds = tuple((float(a), float(b)) for a, b in (np.quantile(c[c > 0], (1 / 3, 2 / 3)) for c in columns))
    low, high = np.quantile(dense, (1 / 3, 2 / 3))
    return Thresholds(thirds, (float(low), float(high)))


def load_thresholds(towers: Path) -> Thresholds:
    """What `training.train_towers` measured and trained with."""
    stored = json.loads((towers / "thresholds.json").read_text())
    low, high = stored["density"]
    return Thresholds(tuple((a, b) for a, b in stored["brightness"]), (low, high))


def _level(value: float, thirds: tuple[float, float], low: str, high: str) -> str | None:
    return low if value < thirds[0] else high if value > thirds[1] else None


def style_words(style: str, beats_per_bar: float, swing: bool) -> list[str]:
    """What a listener would call an MMA library such as `slowbolero`."""
    words = [w for w in STYLE_WORDS if w in style]
    if beats_per_bar == 3 and "waltz" not in words:
        words.append("waltz")
    return words + (["swing"] if swing and "swing" not in words else [])


def describe(batch: Windows, thresholds: Thresholds, rng: np.random.Generator) -> list[str]:
    """One caption per window, naming a random part of what is true of it."""
    brightness = torch.cat([centroid(batch.mixture)[:, None], centroid(batch.mels)], 1).tolist()
    return [_caption(batch, b, brightness[b], thresholds, rng) for b in range(len(batch.songs))]


def _caption(
    batch: Windows, b: int, brightness: list[float], limits: Thresholds, rng: np.random.Generator
) -> str:
    def keep(share: float) -> bool:
        return rng.random() < share

    song, labels = batch.songs[b], batch.songs[b].labels
    bpm = labels["bpm"]
    pace = _level(bpm, PACE, "slow", "fast")
    onsets = onset_density(song, batch.starts[b], batch.mels.shape[2])
    density = _level(onsets, limits.density, "sparse", "busy")
    tone = _level(brightness[0], limits.brightness[0], "dark", "bright")
    head = [w for w in (pace, density, tone) if w and keep(0.6)]
    styles = style_words(labels["style"], labels["beats_per_bar"], labels["swing"])
    if styles and keep(0.7):
        head += styles
    if keep(0.3):
        head.append(labels["key"].split()[1])
    parts = []
    for i, stem in enumerate(STEMS):
        if brightness[1 + i] == 0:
            if keep(0.7):
                parts.append(f"no {stem}")
        elif keep(0.55):
            words = labels["sources"][i][batch.renders[b, i]]["words"]
            colour = _level(brightness[1 + i], limits.brightness[1 + i], "dark", "bright")
            name = words[1] if keep(0.5) else f"{words[0]} {stem}"
            parts.append(f"{colour} {name}" if colour and keep(0.6) else name)
    text = " ".join(head) + (" band" if keep(0.3) else "")
    if parts:
        parts = [parts[i] for i in rng.permutation(len(parts))]
        text += " with " + " and ".join(parts)
    if keep(0.25):
        text += f" at {round(bpm / 10) * 10} bpm"
    return text.strip()


def make_tokenizer(songs: list[RenderedSong]) -> Tokenizer:
    """A word-level tokenizer over every word a caption can hold; other words become [UNK]."""
    words = {*MEASURED_WORDS, *STYLE_WORDS, *FILLER, *STEMS}
    words |= {str(n) for n in range(40, 260, 10)}
    for song in songs:
        for renders in song.labels["sources"]:
            for source in renders:
                words |= set(" ".join(source["words"]).replace("-", " ").split())
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(sorted(words))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    return tokenizer


def for_prompts(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for bundles that leaves out the words no caption has, because [UNK] was never trained.

    A prompt without a known word becomes one masked token, as "" does in `encode`.
    """
    prompts = Tokenizer.from_str(tokenizer.to_str())
    words = sorted(w for w in tokenizer.get_vocab() if not w.startswith("["))
    known = Regex(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
    prompts.pre_tokenizer = pre_tokenizers.Split(known, "removed", invert=True)
    prompts.enable_padding(length=1)
    return prompts


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (B, L), padded to the longest; an empty text has an empty mask."""
    rows = [tokenizer.encode(t).ids for t in texts]
    length = max(1, max(len(r) for r in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask
