"""How well single stems are filled in: each of the four against the other three."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.figures import Chosen, Figure, Tick, bootstrap, missing, of_means
from bench.quality.pitch import beat_one
from bench.quality.rhythm import beat_f1, fitted_tempo, nearest_octave, tracked_beats
from engine.audio import Audio
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill
from training import metrics
from training.evaluate import FILL_SECONDS, sounds_like
from training.held_out import RATE, Window
from training.metrics import Array
from training.stems import STEMS

PART = "fill"
PEER_WINDOWS, PEER_STEPS = 8, 50
SAMPLES = round(FILL_SECONDS * RATE)
KINDS = ("true", "copy", "drone")
OWN_BAR, ALIGNED_BAR, ROLE_BAR, COPY_BAR = 0.95, 0.9, 0.9, -10.0
BEAT_BAR, BASS_BAR = 0.85, 0.75


@dataclass(frozen=True)
class Part:
    """One stem over all windows: signals by kind (generated, true, copy, drone) and their features."""

    stem: str
    signals: dict[str, list[Array]]
    features: dict[str, list[Array]]
    contexts: list[Array]  # features of the other three
    copied: list[float]  # highest SI-SDR against any context stem, dB


def measure(model: Model, windows: list[Window], classifier: Path | None, tick: Tick) -> list[Figure]:
    """All that is known of fills, ours and, on fewer windows, by inpainting alone."""
    few = windows[:PEER_WINDOWS]
    total = len(STEMS) * (len(windows) + 2 * len(few))
    ours = play(model, windows, Settings(), tick, 0, total)
    settings = Settings(sampler="ddim", steps=PEER_STEPS)
    peers = play(inpainting(model), few, settings, tick, len(STEMS) * len(windows), total)
    figures = _shares(ours, windows)
    figures += _roles(ours, classifier)
    figures += _copies(ours)
    figures += _chroma(ours)
    figures += [_beats(ours[1], windows), *_bass(ours[0], windows)]
    return figures + _peer_rows(ours, peers, few)


def inpainting(model: Model) -> Model:
    """The same weights, told of their context only as the reference is: by inpainting."""
    peer = copy.copy(model)
    kept = [name for name in model.manifest.capabilities if name in ("text", "audio")]
    peer.manifest = model.manifest.model_copy(update={"capabilities": tuple(kept)})
    return peer


def play(
    model: Model, windows: list[Window], settings: Settings, tick: Tick, done: int, total: int
) -> list[Part]:
    """Every stem of every window filled in. done, total: fills before these, and of all."""
    parts = []
    for i, stem in enumerate(STEMS):
        signals: dict[str, list[Array]] = {kind: [] for kind in ("generated", *KINDS)}
        copied = []
        for number, window in enumerate(windows):
            tick((done + i * len(windows) + number) / total)
            truth = window.stems[:, :SAMPLES]
            made = filled(model, window, stem, settings)
            context = truth.sum(0) - truth[i]
            for kind, signal in zip(
                ("generated", *KINDS), (made, truth[i], context, _drone(window)), strict=True
            ):
                signals[kind].append(signal)
            copied.append(max(metrics.si_sdr(made, truth[j]) for j in range(len(STEMS)) if j != i))
        contexts = [metrics.listening_feature(signal, stem) for signal in signals["copy"]]
        features = {
            kind: [metrics.listening_feature(s, stem) for s in rows] for kind, rows in signals.items()
        }
        parts.append(Part(stem, signals, features, contexts, copied))
    return parts


def filled(model: Model, window: Window, stem: str, settings: Settings) -> Array:
    """(samples,) of this stem, made for the other three."""
    truth = window.stems[:, :SAMPLES]
    given = {name: Audio(truth[j][None], RATE) for j, name in enumerate(STEMS) if name != stem}
    seeded = Settings(seed=window.seed, steps=settings.steps, sampler=settings.sampler)
    return fill(model, given, [stem], settings=seeded).stems[stem].samples[0]


def _drone(window: Window) -> Array:
    return metrics.drone(window.song.chords[0].tones, SAMPLES)


def _shares(parts: list[Part], windows: list[Window]) -> list[Figure]:
    """Own-context and beat-shifted shares relative to the true stem's, per stem and their means."""
    own = {p.stem: {k: metrics.wins_of_own(f, p.contexts) for k, f in p.features.items()} for p in parts}
    beats = [window.beat for window in windows]
    aligned = {
        p.stem: {k: metrics.wins_of_aligned(f, p.contexts, beats, p.stem) for k, f in p.features.items()}
        for p in parts
    }
    figures = _relative("own context, of the true stem's", own, _off_diagonal, OWN_BAR)
    return figures + _relative("not beat-shifted, of the true stem's", aligned, _rows_of, ALIGNED_BAR)


def _off_diagonal(wins: Array, chosen: Chosen) -> float:
    """Share of won pairs among the chosen windows; a window is not compared with itself."""
    apart = chosen[:, None] != chosen[None, :]
    return float(wins[np.ix_(chosen, chosen)][apart].mean()) if apart.any() else np.nan


def _rows_of(wins: Array, chosen: Chosen) -> float:
    return float(wins[chosen].mean())


def _relative(name: str, wins: dict[str, dict[str, Array]], share: Any, bar: float) -> list[Figure]:
    n = len(next(iter(wins.values()))["true"])
    everyone = np.arange(n)

    def ratio(kind: str, stems: tuple[str, ...], chosen: Chosen) -> float:
        return float(
            np.mean([share(wins[s][kind], chosen) / max(share(wins[s]["true"], chosen), 1e-9) for s in stems])
        )

    figures = []
    for label, stems in {"mean": STEMS, **{stem: (stem,) for stem in STEMS}}.items():
        interval = bootstrap(partial(ratio, "generated", stems), n)
        true = float(np.mean([share(wins[s]["true"], everyone) for s in stems]))
        figures.append(
            Figure(
                PART,
                f"{name}, {label}",
                ratio("generated", stems, everyone),
                interval,
                n,
                ceiling={"true stem": 1.0},
                floor={kind: ratio(kind, stems, everyone) for kind in ("drone", "copy")},
                bar=bar,
                note=f"the true stem's share is {true:.2f}",
            )
        )
    return figures


def _roles(parts: list[Part], classifier: Path | None) -> list[Figure]:
    names = {part.stem: f"classifier agrees, {part.stem}" for part in parts}
    if classifier is None:
        why = "no --classifier DIR was given (training.train_classifier)"
        return [missing(PART, name, why, bar=ROLE_BAR) for name in names.values()]
    from training.loop import load_ema
    from training.train_classifier import StemClassifier

    judge = load_ema(classifier, StemClassifier())
    figures = []
    for part in parts:
        agrees = {
            kind: np.array([float(sounds_like(judge, s) == part.stem) for s in part.signals[kind]])
            for kind in ("generated", "true", "copy")
        }
        about: dict[str, Any] = {"ceiling": {"true stem": float(agrees["true"].mean())}}
        about |= {"floor": {"copy": float(agrees["copy"].mean())}, "bar": ROLE_BAR}
        figures.append(of_means(PART, names[part.stem], agrees["generated"], **about))
    return figures


def _copies(parts: list[Part]) -> list[Figure]:
    worst = np.array([part.copied for part in parts]).max(0)
    interval = bootstrap(lambda chosen: float(worst[chosen].max()), len(worst))
    name = "SI-SDR against any context stem, largest"
    note = f"mean of the windows' largest {worst.mean():.1f}"
    about: dict[str, Any] = {"unit": "dB", "bar": COPY_BAR, "lower": True, "note": note}
    return [Figure(PART, name, float(worst.max()), interval, len(worst), **about)]


def _chroma(parts: list[Part]) -> list[Figure]:
    """How the pitched stems' chroma correlates with their context's."""
    figures = []
    for part in (p for p in parts if p.stem != "drums"):
        fits = {
            kind: np.array([metrics.correlation(f, c) for f, c in zip(features, part.contexts, strict=True)])
            for kind, features in part.features.items()
        }
        turned = part.contexts[1:] + part.contexts[:1]
        other = [metrics.correlation(f, c) for f, c in zip(part.features["generated"], turned, strict=True)]
        figures.append(
            of_means(
                PART,
                f"chroma agrees with the context's, {part.stem}",
                fits["generated"],
                unit="r",
                ceiling={"true stem": float(fits["true"].mean())},
                floor={"another's context": float(np.mean(other)), "drone": float(fits["drone"].mean())},
            )
        )
    return figures


def grid_of(window: Window, seconds: float) -> Array:
    """Times of the beats in a window of this length."""
    beat = window.beat
    return np.arange(-window.start % beat, seconds, beat)


def heard_f1(drums: Array, bpm: float, grid: Array) -> float:
    """F1 of the beats tracked in drums, whose tempo is heard and moved by octaves to the grid's."""
    tempo = nearest_octave(fitted_tempo(drums), bpm)
    return beat_f1(tracked_beats(drums, tempo), grid, len(drums) / RATE)


def _beats(part: Part, windows: list[Window]) -> Figure:
    turned = windows[1:] + windows[:1]
    scores = {
        kind: np.array(
            [
                heard_f1(signal, 60 / window.beat, grid_of(window, FILL_SECONDS))
                for signal, window in zip(part.signals[source], against, strict=True)
            ]
        )
        for kind, source, against in (
            ("generated", "generated", windows),
            ("true", "true", windows),
            ("shuffled", "generated", turned),
        )
    }
    return of_means(
        PART,
        "beat F1 of filled drums, 70 ms",
        scores["generated"],
        ceiling={"true drums": mean_of(scores["true"])},
        floor={"another's grid": mean_of(scores["shuffled"])},
        bar=BEAT_BAR,
        note="tempo heard in the drums, octave folded",
    )


def mean_of(values: Array) -> float:
    return float(np.mean(values))


def _bass(part: Part, windows: list[Window]) -> list[Figure]:
    turned = windows[1:] + windows[:1]
    found = {
        kind: np.array(
            [
                beat_one(signal, w.song, w.start, other.song if kind == "shuffled" else None)
                for signal, w, other in zip(part.signals[source], windows, turned, strict=True)
            ]
        )
        for kind, source in (("generated", "generated"), ("true", "true"), ("shuffled", "generated"))
    }
    names = ("bass on beat 1 plays the chord's root, fill", "bass on beat 1 plays a chord tone, fill")
    return [
        of_means(
            PART,
            name,
            found["generated"][:, i],
            ceiling={"true bass": mean_of(found["true"][:, i])},
            floor={"another's chords": mean_of(found["shuffled"][:, i])},
            bar=BASS_BAR if i else None,
        )
        for i, name in enumerate(names)
    ]


def _peer_rows(ours: list[Part], peers: list[Part], windows: list[Window]) -> list[Figure]:
    """Inpainting alone, and ours on the same windows in the note."""
    n = len(windows)
    same = [
        Part(
            p.stem,
            {kind: rows[:n] for kind, rows in p.signals.items()},
            {kind: rows[:n] for kind, rows in p.features.items()},
            p.contexts[:n],
            p.copied[:n],
        )
        for p in ours
    ]
    rows = []
    about = f"the reference's way on the same weights: DDIM, {PEER_STEPS} steps"
    pairs = [*zip(_shares(peers, windows), _shares(same, windows), strict=True)]
    pairs += [(_beats(peers[1], windows), _beats(same[1], windows))]
    pairs += [*zip(_bass(peers[0], windows), _bass(same[0], windows), strict=True)]
    for theirs, own in pairs:
        if theirs.name.endswith(STEMS) and "," in theirs.name:
            continue  # the means are enough
        note = f"{about}; ours on the same windows {own.value:.2f}"
        rows.append(
            Figure(
                PART,
                f"inpainting only: {theirs.name}",
                theirs.value,
                theirs.interval,
                theirs.n,
                theirs.unit,
                theirs.ceiling,
                theirs.floor,
                peer=True,
                note=note,
            )
        )
    return rows
