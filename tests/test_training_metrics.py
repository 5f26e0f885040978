"""The evaluation's measures against values worked out by hand, and on signals made to order."""

from __future__ import annotations

import numpy as np
import pytest

from training import metrics
from training.mel import GEOMETRY
from training.metrics import MSDM_RATE, MSDM_STEP, MSDM_WINDOW

RATE = GEOMETRY.sample_rate


def clicks(times: np.ndarray, seconds: float) -> np.ndarray:
    """Short bursts of noise."""
    rng = np.random.default_rng(0)
    out = np.zeros(round(seconds * RATE))
    for time in times:
        start = round(time * RATE)
        burst = rng.normal(0, 0.3, 800) * np.exp(-np.arange(800) / 150)
        out[start : start + 800] += burst[: len(out) - start]
    return out.astype(np.float32)


def chord(pitches: tuple[int, ...], seconds: float) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return sum(0.1 * np.sin(2 * np.pi * 440 * 2 ** ((p - 69) / 12) * t) for p in pitches).astype(np.float32)


def test_si_sdr_by_hand() -> None:
    # projection of (2, 0, 0, 1) on (1, 0, 0, 0): target 2, noise 1
    assert metrics.si_sdr(np.array([2.0, 0, 0, 1]), np.array([1.0, 0, 0, 0])) == pytest.approx(
        10 * np.log10(4), abs=1e-6
    )
    # (3, 1) on (1, 1): target (2, 2), noise (1, -1), ratio 8 / 2
    assert metrics.si_sdr(np.array([3.0, 1.0]), np.array([1.0, 1.0])) == pytest.approx(
        10 * np.log10(4), abs=1e-6
    )


def test_si_sdr_does_not_see_the_scale_but_sees_an_offset() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 1000), rng.normal(0, 1, 1000)
    assert metrics.si_sdr(5 * x, y) == pytest.approx(metrics.si_sdr(x, y), abs=1e-6)
    assert metrics.si_sdr(y + 1.0, y) < 5  # no mean removal
    assert metrics.si_sdr(y, y) > 80


def test_msdm_skips_windows_with_one_stem_and_scores_active_stems_only() -> None:
    rng = np.random.default_rng(1)
    # 12 s: windows start at 0, 2, 4, 6, 8 s
    stems = rng.normal(0, 0.1, (3, 6 * MSDM_STEP))
    stems[0, : 2 * MSDM_STEP] = 0
    stems[1, : 2 * MSDM_STEP] = 0
    stems[2, 4 * MSDM_STEP :] = 0
    rows = metrics.msdm_improvements(stems, stems)
    # 0 s: stem 2 alone, skipped; 2, 4 and 6 s: all three; 8 s: stems 0 and 1
    assert [stem for stem, _ in rows] == [0, 1, 2] * 3 + [0, 1]
    assert MSDM_WINDOW == 4 * MSDM_RATE


def test_msdm_leaves_the_short_last_window_out() -> None:
    stems = np.random.default_rng(1).normal(0, 0.1, (2, MSDM_WINDOW + MSDM_STEP - 1))
    assert len(metrics.msdm_improvements(stems, stems)) == 2


def test_msdm_improvement_is_zero_for_the_mix_and_the_gain_for_the_truth() -> None:
    stems = np.random.default_rng(1).normal(0, 0.1, (2, MSDM_WINDOW))
    mixture = np.stack([stems.sum(0)] * 2)
    assert [gain for _, gain in metrics.msdm_improvements(mixture, stems)] == pytest.approx([0, 0])
    assert min(gain for _, gain in metrics.msdm_improvements(stems, stems)) > 60


def test_quiet_stems_count_as_silent_below_the_threshold() -> None:
    rng = np.random.default_rng(1)
    stems = rng.normal(0, 0.1, (3, MSDM_WINDOW))
    # the norm of a window at the threshold
    edge = metrics.SILENT * MSDM_WINDOW / np.linalg.norm(stems[2])
    for factor, scored in ((0.99, [0, 1]), (1.01, [0, 1, 2])):
        changed = np.stack([stems[0], stems[1], stems[2] * edge * factor])
        assert [stem for stem, _ in metrics.msdm_improvements(changed, changed)] == scored


def test_onsets_are_found_where_they_are() -> None:
    times = np.arange(0.5, 5.5, 0.5)
    found = metrics.onset_times(clicks(times, 6.0))
    assert len(found) == len(times)
    assert np.abs(found - times).max() < 0.04
    assert metrics.onsets_per_second(clicks(times, 6.0)) == pytest.approx(10 / 6)
    assert metrics.onsets_per_second(np.zeros(RATE, np.float32)) == 0


def test_chroma_shows_the_pitch_classes() -> None:
    features = metrics.chroma(chord((60, 64, 67), 2.0)).mean(0)
    assert set(np.argsort(features)[-3:]) == {0, 4, 7}
    assert features.sum() == pytest.approx(0, abs=1e-3)


def test_brightness_is_the_frequency_of_a_tone_and_rises() -> None:
    low, high = metrics.brightness(chord((69,), 1.0)), metrics.brightness(chord((93,), 1.0))
    assert low == pytest.approx(440, rel=0.1) and high == pytest.approx(1760, rel=0.1)


def test_own_context_wins_for_matching_stems_and_ties_count_half() -> None:
    rng = np.random.default_rng(0)
    features = [rng.normal(0, 1, (50, 12)) for _ in range(4)]
    assert metrics.share_of_own(features, features) == 1.0
    assert metrics.share_of_own(features[:2], features[1::-1]) == 0.0
    constant = [np.zeros((50, 12))] * 4
    assert metrics.share_of_own(constant, features) == 0.5


def test_aligned_wins_in_time_and_loses_a_beat_late() -> None:
    beat = 0.5
    rng = np.random.default_rng(3)
    times = [np.sort(rng.choice(np.arange(1, 18), 9, replace=False)) * beat for _ in range(3)]
    contexts = [metrics.onset_envelope(clicks(t, 10.0)) for t in times]
    assert metrics.share_of_aligned(contexts, contexts, [beat] * 3, "drums") == 1.0
    late = [metrics.shifted(c, beat, "drums") for c in contexts]
    assert (
        metrics.share_of_aligned(late, contexts, [beat] * 3, "drums") <= 2 / 3
    )  # one beat later fits better


def test_shifting_moves_by_seconds() -> None:
    envelope = metrics.onset_envelope(clicks(np.array([2.0]), 6.0))
    moved = metrics.shifted(envelope, 1.0, "drums")
    assert (moved.argmax() - envelope.argmax()) / metrics.FRAME_RATE == pytest.approx(1.0, abs=0.012)
    harmony = metrics.chroma(chord((60,), 6.0))
    harmony[10] += 5
    moved = metrics.shifted(harmony, 1.0, "bass")
    steps = moved.sum(1).argmax() - harmony.sum(1).argmax()
    assert steps * metrics.CHROMA_HOP / RATE == pytest.approx(1.0, abs=0.05)


def test_correlation_of_constants_is_nothing() -> None:
    assert metrics.correlation(np.ones(10), np.arange(10.0)) == 0
    assert metrics.correlation(np.arange(10.0), np.arange(12.0)) == pytest.approx(1)
    assert metrics.correlation(np.arange(10.0), -np.arange(10.0)) == pytest.approx(-1)


def test_levels_and_drones() -> None:
    assert metrics.rms_db(np.full(100, 0.1)) == pytest.approx(-20)
    assert metrics.rms_db(np.zeros(100)) == pytest.approx(-120)
    tones = metrics.drone((0, 4, 7), 2 * RATE)
    assert tones.shape == (2 * RATE,) and tones.dtype == np.float32
    assert set(np.argsort(metrics.chroma(tones).mean(0))[-3:]) == {0, 4, 7}


def test_interval_holds_the_mean_and_shrinks_with_more_values() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(3, 1, 20), rng.normal(3, 1, 2000)
    low, high = metrics.interval(many.tolist())
    assert low < many.mean() < high
    # 95 % of a mean's normal distribution
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(2000), rel=0.15)
    assert np.diff(metrics.interval(few.tolist()))[0] > 5 * (high - low)
    assert metrics.interval([2.0] * 5) == (2.0, 2.0)
    assert metrics.interval(few.tolist()) == metrics.interval(few.tolist())
