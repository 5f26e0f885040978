"""Chord charts: what the bands play over and what the model is told."""

from __future__ import annotations

import numpy as np
import pytest

from training.charts import BLUES, MAJOR, MINOR, PITCH_NAMES, QUALITIES, parse_symbol, random_chart, timeline


@pytest.mark.parametrize(
    ("symbol", "root", "tones"),
    [
        ("C", 0, {0, 4, 7}),
        ("Bb", 10, {10, 2, 5}),
        ("Bm7b5", 11, {11, 2, 5, 9}),
        ("Dbm7", 1, {1, 4, 8, 11}),
        ("GM7", 7, {7, 11, 2, 6}),
        ("A9", 9, {9, 1, 4, 7, 11}),
        ("Ebsus4", 3, {3, 8, 10}),
        ("F6", 5, {5, 9, 0, 2}),
    ],
)
def test_symbols(symbol: str, root: int, tones: set[int]) -> None:
    found_root, found_tones = parse_symbol(symbol)
    assert (found_root, set(found_tones)) == (root, tones)


@pytest.mark.parametrize("symbol", ["H", "Cx", "", "C7sus4", "c"])
def test_symbols_that_are_none(symbol: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        parse_symbol(symbol)


def test_every_chart_spells_chords_that_can_be_read() -> None:
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(400):
        chart, key = random_chart(rng, 16)
        assert len(chart) == 16
        assert key.split()[0] in PITCH_NAMES and key.split()[1] in ("major", "minor")
        for bar in chart:
            assert len(bar) in (1, 2)
            for symbol in bar:
                root, tones = parse_symbol(symbol)
                assert tones[0] == root and len(set(tones)) == len(tones)
                seen.add(symbol[len(PITCH_NAMES[root]) :])
    written = {token for text in (*MAJOR, *MINOR, *BLUES) for bar in text.split() for token in bar.split("|")}
    # "7sus4" is the fifth degree with a sus4: a degree takes all the digits that lead a token
    assert {token.lstrip("0123456789") for token in written} <= seen <= set(QUALITIES)


def test_a_chart_is_built_of_repeated_sections() -> None:
    for seed in range(50):
        chart, _ = random_chart(np.random.default_rng(seed), 32)
        assert chart[:4] == chart[4:8] or chart[:12] == chart[12:24]


def test_timeline_shares_bars_and_counts_beats() -> None:
    chords = timeline([["C"], ["Am", "F"], ["G7"]], 3.0)
    assert [(c.beat, c.root, c.symbol) for c in chords] == [
        (0.0, 0, "C"),
        (3.0, 9, "Am"),
        (4.5, 5, "F"),
        (6.0, 7, "G7"),
    ]
    assert chords[3].tones == (7, 11, 2, 5)
