"""Song forms: sections cover the song, resting stems are silent, stops stop, fills lead over."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import forms
from training.charts import PITCH_NAMES, chart_of, parse_symbol
from training.forms import BARS, RESTING, Section, arranged, drum_fill, random_form, without
from training.stems import STEMS

BAR = 2.0  # seconds: 120 bpm, 4/4


def steady(bars: int) -> dict[str, np.ndarray]:
    """A note of half a beat on every beat of every stem."""
    onsets = np.arange(0, bars * BAR, 0.5)
    rows = np.stack(
        [onsets, np.full_like(onsets, 0.25), np.full_like(onsets, 40), np.full_like(onsets, 90)], 1
    )
    return {stem: rows.copy() for stem in STEMS}


@given(st.integers(0, 10**6), st.integers(4, 80))
@settings(max_examples=60, deadline=None)
def test_a_form_covers_its_bars(seed: int, bars: int) -> None:
    form = random_form(np.random.default_rng(seed), bars)
    assert form[0].start == 0 and sum(s.bars for s in form) == bars
    assert all(a.start + a.bars == b.start for a, b in pairwise(form))
    for section in form[:-1]:
        low, high = RESTING[section.kind]
        assert section.bars in BARS[section.kind]
        assert low <= len(STEMS) - len(section.stems) <= high
    chart, key = chart_of(form, np.random.default_rng(seed))
    assert len(chart) == bars and key.split()[0] in PITCH_NAMES
    assert all(parse_symbol(symbol) for bar in chart for symbol in bar)


def test_sections_of_a_kind_share_their_chords() -> None:
    form = [Section("verse", 0, 4, STEMS), Section("chorus", 4, 4, STEMS), Section("verse", 8, 4, STEMS)]
    chart, _ = chart_of(form, np.random.default_rng(1))
    assert chart[:4] == chart[8:]


def test_a_stem_that_rests_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STOP_SHARE", 0.0)
    form = [Section("intro", 0, 2, ("bass",)), Section("verse", 2, 2, STEMS)]
    played = arranged(steady(4), form, BAR, 4, False, np.random.default_rng(0))
    for stem in STEMS:
        early = played[stem][played[stem][:, 0] < 2 * BAR]
        assert len(early) == (8 if stem == "bass" else 0)
        assert len(played[stem]) - len(early) == 8


def test_a_stop_silences_everybody_before_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STOP_SHARE", 1.0)
    form = [Section("verse", 0, 2, STEMS), Section("chorus", 2, 2, STEMS)]
    played = arranged(steady(4), form, BAR, 4, False, np.random.default_rng(0))
    for rows in played.values():
        assert not ((rows[:, 0] >= 3.5) & (rows[:, 0] < 4.0)).any()
        assert ((rows[:, 0] < 3.5) <= (rows[:, 0] + rows[:, 1] <= 3.5)).all(), "nothing rings into the stop"
        assert (rows[:, 0] == 4.0).any(), "and everybody is back on the one"


def test_the_drummer_leads_into_the_next_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STOP_SHARE", 0.0)
    monkeypatch.setattr(forms, "FILL_SHARE", 1.0)
    form = [Section("verse", 0, 2, STEMS), Section("chorus", 2, 2, STEMS)]
    played = arranged(steady(4), form, BAR, 4, False, np.random.default_rng(0))
    drums = played["drums"]
    assert forms.CRASH in drums[drums[:, 0] == 4.0, 2]
    assert set(drums[(drums[:, 0] >= 3.5) & (drums[:, 0] < 4.0), 2]) <= set(forms.FILL_DRUMS)
    assert (np.diff(drums[:, 0]) >= 0).all()
    assert np.array_equal(played["bass"], steady(4)["bass"])


@pytest.mark.parametrize("swing", [False, True])
def test_a_fill_grows_and_moves_downwards(swing: bool) -> None:
    run = drum_fill(3.0, 1.0, 0.5, swing, np.random.default_rng(0))[:-2]
    assert run[0, 0] == 3.0 and (run[:, 0] < 4.0).all()
    assert np.diff([forms.FILL_DRUMS.index(int(p)) for p in run[:, 2]]).min() >= 0
    assert run[-1, 3] > run[0, 3]
    assert len(run) == 6 if swing else len(run) in (4, 8)


def test_what_began_before_rings_a_little() -> None:
    rows = np.array([[0.0, 3.0, 40, 90], [1.5, 0.2, 40, 90], [4.0, 1.0, 40, 90]])
    left = without(rows, 1.0, 4.0, 0.25)
    assert left[:, 0].tolist() == [0.0, 4.0]
    assert left[0, 1] == pytest.approx(1.25)
    assert rows[0, 1] == 3.0, "the notes given stay as they are"
