"""Captions say what is true of a window, and the tokenizer knows every word of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from training_songs import song

from training.captions import (
    STYLE_WORDS,
    Thresholds,
    centroid,
    describe,
    encode,
    for_prompts,
    make_tokenizer,
    measure_thresholds,
    onset_density,
    style_words,
)
from training.dataset import Windows, draw
from training.mel import FLOOR
from training.stems import STEMS

MIDDLE = Thresholds(((0.0, 1e9),) * 5, (0.0, 1e9))  # nothing is dark, bright, sparse or busy


def windows(count: int = 8, **labels: Any) -> Windows:
    songs = [song(seed, **labels) for seed in range(2)]
    return draw(songs, count, np.random.default_rng(0), augment=False, frames=48)


def captions(batch: Windows, limits: Thresholds = MIDDLE, draws: int = 30) -> list[str]:
    rng = np.random.default_rng(1)
    return [text for _ in range(draws) for text in describe(batch, limits, rng)]


def said(word: str, texts: list[str]) -> float:
    """The share of captions with that word."""
    return float(np.mean([word in text.split() for text in texts]))


def test_brightness_is_the_mean_band_and_nothing_for_silence() -> None:
    mels = torch.full((3, 10, 128), FLOOR)
    mels[1, :, 40] = 0.0
    mels[2, :, 20], mels[2, :, 60] = 0.0, 0.0
    assert centroid(mels).tolist() == pytest.approx([0.0, 40.0, 40.0], abs=0.01)


def test_density_counts_different_onsets_a_second() -> None:
    made = replace(song(0), onsets=np.arange(0, 10, 0.25))
    frames = round(4 * 44100 / 512)
    assert onset_density(made, 0, frames) == pytest.approx(4, abs=0.3)
    assert onset_density(made, round(20 * 44100 / 512), frames) == 0


def test_tempo_words_are_true() -> None:
    slow, fast = captions(windows(bpm=80.0)), captions(windows(bpm=140.0))
    assert said("slow", slow) > 0.4 and said("fast", slow) == 0
    assert said("fast", fast) > 0.4 and said("slow", fast) == 0
    assert said("slow", captions(windows(bpm=110.0))) == 0
    assert said("80", slow) == said("bpm", slow) > 0.1


def test_brightness_and_density_words_are_true() -> None:
    batch = windows(style="nothing")
    dark = replace(MIDDLE, brightness=((1e8, 1e9),) * 5, density=(1e8, 1e9))
    bright = replace(MIDDLE, brightness=((0, 1e-9),) * 5, density=(0, 0))
    low, high, neither = captions(batch, dark), captions(batch, bright), captions(batch)
    for word, other, texts in (("dark", "bright", low), ("bright", "dark", high)):
        assert said(word, texts) > 0.5 and said(other, texts) == 0
    assert said("sparse", low) > 0.4 and said("busy", high) > 0.4
    assert sum(said(word, neither) for word in ("dark", "bright", "sparse", "busy")) == 0


def test_colours_belong_to_their_instruments() -> None:
    piano_is_bright = ((0.0, 1e9),) * 4 + ((0.0, 1e-9),)
    for text in captions(windows(), replace(MIDDLE, brightness=piano_is_bright)):
        for part in text.split(" with ")[-1].split(" and "):
            assert "bright" not in part or "piano" in part


def test_instruments_are_named_and_missing_ones_denied() -> None:
    batch = windows()
    mels = batch.mels.clone()
    mels[:, STEMS.index("drums")] = FLOOR
    texts = captions(replace(batch, mels=mels))
    assert np.mean(["no drums" in text for text in texts]) > 0.5
    assert not any("machine" in text for text in texts)
    assert not any("no bass" in text or "no piano" in text for text in texts)
    assert np.mean(["upright bass" in text or "acoustic bass" in text for text in texts]) > 0.35
    assert any("honky-tonk piano" in text for text in texts)


def test_key_is_major_or_minor_as_labelled() -> None:
    minor = captions(windows(key="Db minor"))
    assert said("minor", minor) > 0.15 and said("major", minor) == 0


@pytest.mark.parametrize(
    ("library", "beats", "swing", "expected"),
    [
        ("slowbolero", 4, False, {"bolero"}),
        ("jazzwaltz", 3, True, {"jazz", "waltz", "swing"}),
        ("60srock", 4, False, {"rock"}),
        ("metronome", 3, False, {"waltz"}),
        ("metronome", 4, False, set()),
    ],
)
def test_style_words(library: str, beats: float, swing: bool, expected: set[str]) -> None:
    words = style_words(library, beats, swing)
    assert set(words) == expected and len(words) == len(expected)


def test_thresholds_split_in_thirds() -> None:
    songs = [song(seed) for seed in range(3)]
    limits = measure_thresholds(songs, windows=16)
    assert limits == measure_thresholds(songs, windows=16)
    assert len(limits.brightness) == 1 + len(STEMS)
    for low, high in (*limits.brightness, limits.density):
        assert 0 < low < high
    batch = draw(songs, 120, np.random.default_rng(1), frames=48)
    bass = centroid(batch.mels[:, 0])
    low, high = limits.brightness[1]
    heard = bass[bass > 0]
    assert 0.1 < float((heard < low).float().mean()) < 0.6
    assert 0.1 < float((heard > high).float().mean()) < 0.6


def test_the_tokenizer_knows_every_word_of_every_caption() -> None:
    songs = [song(seed) for seed in range(2)]
    tokenizer = make_tokenizer(songs)
    for style in (*STYLE_WORDS, "slowbolero"):
        for text in captions(windows(2, style=style), draws=4):
            assert tokenizer.token_to_id("[UNK]") not in tokenizer.encode(text).ids, text
    assert tokenizer.encode("no word is Known").tokens == ["no", "[UNK]", "[UNK]", "[UNK]"]
    assert tokenizer.encode("Slow, JAZZ!").tokens == ["slow", "jazz"]


def test_encode_pads_and_masks() -> None:
    tokenizer = make_tokenizer([song(0)])
    ids, mask = encode(tokenizer, ["slow rock band", "", "piano"])
    assert ids.shape == mask.shape == (3, 3) and ids.dtype == mask.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert (ids[mask == 0] == tokenizer.token_to_id("[PAD]")).all() and (ids[mask == 1] > 1).all()
    assert encode(tokenizer, [""])[1].tolist() == [[0]]


def test_prompts_drop_unknown_words_and_change_no_known_ones() -> None:
    tokenizer = make_tokenizer([song(0)])
    prompts = Tokenizer.from_str(for_prompts(tokenizer).to_str())
    for text in captions(windows(2)):
        if text:
            assert prompts.encode(text).ids == tokenizer.encode(text).ids
    assert prompts.encode("a warm, slow waltz; rocky piano").tokens == ["a", "slow", "waltz", "piano"]
    for nothing in ("", "xyzzy 124", "[UNK]"):
        assert prompts.encode(nothing).ids == [0] and prompts.encode(nothing).attention_mask == [0]
    assert tokenizer.encode("warm").tokens == ["[UNK]"], "the training's own is left as it was"
