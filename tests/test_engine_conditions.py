"""Tempo grid, chord charts and prompts."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_bundle import FILM, FRAMES, HOP, RATE

from engine.audio import Audio
from engine.conditions import (
    check_tempo,
    chord_vector,
    chords_condition,
    grid_condition,
    parse_chords,
    prompt_film,
)
from engine.errors import UsageError
from engine.model import Model

FRAME_SECONDS = FRAMES * HOP / RATE


def tones(name: str) -> set[int]:
    return set(np.flatnonzero(chord_vector(name)[12:24]).tolist())


def test_grid_layout(tiny_model: Model) -> None:
    grid = grid_condition(tiny_model.manifest, 0, 100, 90.0, beats_per_bar=3)[0]
    assert grid.shape == (100, 6)
    centres = (np.arange(100) + 0.5) * FRAME_SECONDS
    beats = centres * 90 / 60
    assert np.allclose(np.arctan2(grid[:, 0], grid[:, 1]) % (2 * np.pi), 2 * np.pi * (beats % 1), atol=1e-4)
    assert np.allclose(
        np.arctan2(grid[:, 2], grid[:, 3]) % (2 * np.pi), 2 * np.pi * (beats / 3 % 1), atol=1e-4
    )
    assert np.allclose(grid[:, 4], np.log2(90 / 120))
    assert (grid[:, 5] == 1).all()


def test_grid_starts_where_it_is_told(tiny_model: Model) -> None:
    manifest = tiny_model.manifest
    whole = grid_condition(manifest, 0, 60, 120.0)
    assert np.array_equal(grid_condition(manifest, 20, 40, 120.0), whole[:, 20:])
    later = grid_condition(manifest, 0, 60, 120.0, first_beat=2.0)  # a bar of 4 beats at 120 bpm lasts 2 s
    assert np.allclose(later, whole, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("C", 0, {0, 4, 7}),
        ("Am", 9, {9, 0, 4}),
        ("G7", 7, {7, 11, 2, 5}),
        ("F#m7b5", 6, {6, 9, 0, 4}),
        ("Bbmaj7", 10, {10, 2, 5, 9}),
        ("EbM7", 3, {3, 7, 10, 2}),
        ("Dsus4", 2, {2, 7, 9}),
        ("Bdim7", 11, {11, 2, 5, 8}),
        ("C/G", 0, {0, 4, 7}),
        ("C/Bb", 0, {0, 4, 7, 10}),
        ("D6/9", 2, {2, 6, 9, 11, 4}),
        ("Cb", 11, {11, 3, 6}),
        ("E5", 4, {4, 11}),
    ],
)
def test_chord_names(name: str, root: int, expected: set[int]) -> None:
    vector = chord_vector(name)
    assert np.flatnonzero(vector[:12]).tolist() == [root]
    assert tones(name) == expected
    assert vector[24] == 1


@pytest.mark.parametrize("name", ["H", "Cmin3", "c", "7", "C##", "C/H", "|"])
def test_names_that_are_no_chord(name: str) -> None:
    with pytest.raises(UsageError, match="no chord"):
        chord_vector(name)


def test_no_chord_is_unknown() -> None:
    assert not chord_vector("N.C.").any()


def test_chart_shares_bars_and_repeats(tiny_model: Model) -> None:
    chart = parse_chords("| C | Am | F G | % |")
    assert [len(bar) for bar in chart] == [1, 1, 2, 2]
    # 240 bpm in 4/4: a bar lasts 1 s, 25 latent frames of 40 ms.
    rows = chords_condition(tiny_model.manifest, 0, 200, chart, 240.0)[0]
    roots = rows[:, :12].argmax(axis=1)
    assert (roots[:25] == 0).all()
    assert (roots[25:50] == 9).all()
    assert (roots[50:62] == 5).all()
    assert (roots[63:75] == 7).all()
    assert np.array_equal(rows[100:], rows[:100])
    assert np.array_equal(chords_condition(tiny_model.manifest, 30, 40, chart, 240.0)[0], rows[30:70])


@pytest.mark.parametrize("text", ["", "|", "C || F", "% | C", "C | Am | Xyz"])
def test_charts_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_chords(text)


def test_tempo_is_checked(tiny_model: Model, plain_model: Model) -> None:
    check_tempo(tiny_model.manifest, 120.0, 4, "C")
    check_tempo(tiny_model.manifest, None, 4, None)
    with pytest.raises(UsageError, match="need a tempo"):
        check_tempo(tiny_model.manifest, None, 4, "C")
    for bpm in (5.0, 1000.0, float("nan")):
        with pytest.raises(UsageError, match="20 to 400"):
            check_tempo(tiny_model.manifest, bpm, 4, None)
    with pytest.raises(UsageError, match="1 to 16"):
        check_tempo(tiny_model.manifest, 120.0, 0, None)
    with pytest.raises(UsageError, match="takes no tempo"):
        check_tempo(plain_model.manifest, 120.0, 4, None)
    with pytest.raises(UsageError, match="takes no chords"):
        check_tempo(plain_model.manifest, 120.0, 4, "C")


def test_prompts(tiny_model: Model, plain_model: Model) -> None:
    audio = Audio(np.random.default_rng(0).normal(0, 0.1, (2, 100000)).astype(np.float32), 44100)
    text_film, audio_film = prompt_film(tiny_model, "warm", None), prompt_film(tiny_model, None, audio)
    both = prompt_film(tiny_model, " warm ", audio)
    assert text_film is not None and audio_film is not None and both is not None
    assert text_film.shape == audio_film.shape == both.shape == (1, FILM)
    direction = text_film + audio_film
    assert np.allclose(both / np.linalg.norm(both), direction / np.linalg.norm(direction), atol=1e-5)
    assert prompt_film(tiny_model, None, None) is None
    assert prompt_film(tiny_model, "  ", None) is None
    with pytest.raises(UsageError, match="no audio prompt"):
        prompt_film(plain_model, None, audio)


def test_audio_prompt_does_not_depend_on_its_level(tiny_model: Model) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (1, 100000)).astype(np.float32)
    loud, quiet = (prompt_film(tiny_model, None, Audio(samples * gain, 44100)) for gain in (1, 0.01))
    assert loud is not None and quiet is not None
    assert np.allclose(loud, quiet, atol=1e-3)
