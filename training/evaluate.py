"""python -m training.evaluate: what a bundle can do, on the held-out set; one JSON and one Markdown table.

Every figure has what it must be read against beside it: the true stem, a copy of the context and a static chord
drone for `fill`; the ideal mask and a shuffled mixture for `split`; held-out songs for novelty.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.audio import Audio, resample
from engine.features import log_mel
from engine.model import Model
from engine.separation import mask_mix
from engine.take import Settings
from engine.tasks import fill, generate, split
from training import metrics
from training.bands import STEMS
from training.dataset import Song, load_songs
from training.held_out import Window, held_out_windows
from training.loop import load_ema
from training.mel import FLOOR, GEOMETRY, QUANTUM
from training.metrics import Array
from training.train_classifier import StemClassifier

RATE = GEOMETRY.sample_rate
FILL_SECONDS = 10.0
PAPER = {"dirac": (3.26, 3.63, 2.79, 2.58), "gaussian": (3.23, 3.07, 1.97, 2.53)}  # arXiv:2409.02845
# Opposed captions, the figure that must rise from the first to the second, and the stem it is measured on.
PROMPTS = (
    ("slow sparse ballad", "fast busy samba", "density", None),
    ("sparse band", "busy band", "density", None),
    ("slow band at 70 bpm", "fast band at 160 bpm", "density", None),
    ("dark band", "bright band", "brightness", None),
    ("dark piano", "bright piano", "brightness", "piano"),
    ("dark guitar", "bright guitar", "brightness", "guitar"),
    ("acoustic bass", "bright electric bass", "brightness", "bass"),
    ("dark drum kit", "bright drum kit", "brightness", "drums"),
)


@dataclass(frozen=True)
class Judge:
    """The stem classifier, from its training folder."""

    network: StemClassifier

    def names(self, audio: Array) -> str:
        """The stem that a 10 s signal sounds like."""
        mel = torch.from_numpy(log_mel(audio[None].astype(np.float32), GEOMETRY))[:, None]
        with torch.no_grad():
            return STEMS[int(self.network(mel).argmax())]


def _mono(audio: Audio) -> Array:
    return audio.samples.mean(0)


def _fill_piece(window: Window) -> Array:
    return window.stems[:, : round(FILL_SECONDS * RATE)]


def evaluate_fill(model: Model, windows: list[Window], judge: Judge, seed: int = 0) -> dict[str, Any]:
    """Each stem generated against the other three; see the module's table for what is compared."""
    result: dict[str, Any] = {}
    for i, stem in enumerate(STEMS):
        made: dict[str, list[Array]] = {"generated": [], "true": [], "copy": [], "drone": []}
        contexts, copies, levels = [], [], []
        for window in tqdm(windows, desc=f"fill {stem}", mininterval=5):
            truth = _fill_piece(window)
            given = {s: Audio(truth[j][None], RATE) for j, s in enumerate(STEMS) if j != i}
            take = fill(model, given, [stem], settings=Settings(seed=seed + window.seed))
            generated = _mono(take.stems[stem])
            context = truth.sum(0) - truth[i]
            tones = window.song.chords[0].tones
            made["generated"].append(generated)
            made["true"].append(truth[i])
            made["copy"].append(context)
            made["drone"].append(metrics.drone(tones, len(context)))
            contexts.append(metrics.listening_feature(context, stem))
            copies.append(max(metrics.si_sdr(generated, truth[j]) for j in range(len(STEMS)) if j != i))
            levels.append(metrics.rms_db(generated) - metrics.rms_db(truth[i]))
        beats = [w.beat for w in windows]
        shares: dict[str, Any] = {}
        for kind, signals in made.items():
            features = [metrics.listening_feature(s, stem) for s in signals]
            shares[kind] = {
                "own": metrics.share_of_own(features, contexts),
                "aligned": metrics.share_of_aligned(features, contexts, beats, stem),
                "sounds_like_role": float(np.mean([judge.names(s) == stem for s in signals])),
            }
        result[stem] = shares | {
            "own_of_true": shares["generated"]["own"] / shares["true"]["own"],
            "aligned_of_true": shares["generated"]["aligned"] / shares["true"]["aligned"],
            "worst_si_sdr_to_context": max(copies),
            "level_difference_db": {
                "median": float(np.median(levels)),
                "largest": float(np.abs(levels).max()),
            },
            "level_within_12_db": float(np.mean(np.abs(levels) <= 12)),
        }
    return result


def _scores(estimate: Callable[[Window, Audio], Array], windows: list[Window], name: str) -> dict[str, Any]:
    rows: list[tuple[int, float]] = []
    for window in tqdm(windows, desc=f"split {name}", mininterval=5):
        estimates = estimate(window, Audio(window.mixture[None], RATE))
        low = [
            resample(Audio(x.astype(np.float32), RATE), metrics.MSDM_RATE).samples
            for x in (estimates, window.stems)
        ]
        rows += metrics.msdm_improvements(low[0], low[1])
    per_stem = {s: [v for k, v in rows if k == i] for i, s in enumerate(STEMS)}
    means = {s: float(np.mean(v)) for s, v in per_stem.items()}
    intervals = {s: metrics.interval(v) for s, v in per_stem.items()}
    return {
        "mean": float(np.mean(list(means.values()))),
        "stems": means,
        "interval": intervals,
        "scored": len(rows),
    }


def evaluate_split(model: Model, windows: list[Window], slow: int) -> dict[str, Any]:
    """SI-SDRi by method, with the ideal mask and a shuffled mixture; `slow` windows for the sampled posteriors."""
    nulls: list[float] = []

    def by(method: str, steps: int | None, raw: bool = False) -> Callable[[Window, Audio], Array]:
        def estimate(window: Window, mix: Audio) -> Array:
            take = split(model, mix, method=method, raw=raw, settings=Settings(seed=1, steps=steps))  # type: ignore[arg-type]
            parts = np.stack([take.stems[s].samples[0] for s in STEMS])
            if not raw:
                difference = parts.astype(np.float64).sum(0) - mix.samples[0]
                nulls.append(20 * np.log10(np.abs(difference).max() / np.abs(mix.samples).max() + 1e-12))
            return parts

        return estimate

    def ideal(window: Window, mix: Audio) -> Array:
        return mask_mix(mix, log_mel(_padded(window.stems), GEOMETRY), GEOMETRY)[:, 0]

    def shuffled(window: Window, mix: Audio) -> Array:
        other = windows[(windows.index(window) + 1) % len(windows)]
        take = split(model, Audio(other.mixture[None], RATE), method="mask", settings=Settings(seed=1))
        mels = np.stack([log_mel(_padded(take.stems[s].samples), GEOMETRY)[0] for s in STEMS])
        return mask_mix(mix, mels, GEOMETRY)[:, 0]

    few = windows[:slow]
    result = {
        "ideal mask": _scores(ideal, windows, "ideal mask"),
        "mask": _scores(by("mask", None), windows, "mask"),
        "shuffled mixture": _scores(shuffled, windows, "shuffled mixture"),
        "dirac": _scores(by("dirac", None), few, "dirac"),
        "gaussian": _scores(by("gaussian", None), few, "gaussian"),
        "dirac, vocoder's audio": _scores(by("dirac", None, raw=True), few, "dirac raw"),
    }
    return {"methods": result, "worst_null_db": max(nulls), "paper": PAPER}


def _padded(stems: Array) -> Array:
    """To whole latent frames, so that mels cover the end."""
    step = GEOMETRY.hop * 4
    return np.pad(stems, ((0, 0), (0, -stems.shape[1] % step))).astype(np.float32)


def evaluate_prompts(model: Model, seeds: int) -> list[dict[str, Any]]:
    """For each opposed pair, the figure for both captions over the same seeds."""
    rows = []
    for low, high, figure, stem in tqdm(PROMPTS, desc="prompts"):
        values: list[list[float]] = []
        for caption in (low, high):
            takes = [
                generate(model, seconds=FILL_SECONDS, text=caption, settings=Settings(seed=s))
                for s in range(seeds)
            ]
            audio = [_mono(t.mix() if stem is None else t.stems[stem]) for t in takes]
            measure = (
                metrics.brightness
                if figure == "brightness"
                else lambda a: len(metrics.onset_times(a)) / FILL_SECONDS
            )
            values.append([float(measure(a)) for a in audio])
        means = [float(np.mean(v)) for v in values]
        rows.append({
            "low": low, "high": high, "figure": figure, "stem": stem or "mix", "means": means,
            "right_way": means[1] > means[0], "share_of_seeds": float(np.mean(np.array(values[1]) > np.array(values[0]))),
        })  # fmt: skip
    return rows


def _fingerprints(mels: Array) -> Array:
    """(n, frames, mels) -> (n, features): mean log mels over eighths of the window, the pattern in time and tone."""
    n, frames, bands = mels.shape
    cut = mels[:, : frames // 8 * 8].reshape(n, 8, -1, bands).mean(2)
    return (cut - cut.mean((1, 2), keepdims=True)).reshape(n, -1)


def evaluate_novelty(
    model: Model, windows: list[Window], songs: list[Song], count: int, seeds: int
) -> dict[str, float]:
    """Distance to the nearest training window: generated bands against held-out songs (medians)."""
    frames = round(FILL_SECONDS * metrics.FRAME_RATE)
    rng = np.random.default_rng(0)
    bank = []
    for _ in range(count):
        song = songs[int(rng.integers(len(songs)))]
        start = int(rng.integers(song.mels.shape[2] - frames))
        renders = rng.integers(song.mels.shape[1], size=len(STEMS))
        parts = (
            np.stack([song.mels[i, r, start : start + frames] for i, r in enumerate(renders)]) * QUANTUM
            + FLOOR
        )
        bank.append(0.5 * np.log((np.exp(2 * parts)).sum(0)))
    known = _fingerprints(np.stack(bank))

    def nearest(signals: list[Array]) -> list[float]:
        mels = np.stack(
            [log_mel(s[None, : frames * GEOMETRY.hop].astype(np.float32), GEOMETRY)[0] for s in signals]
        )
        marks = _fingerprints(np.maximum(mels, FLOOR))
        return [float(np.sqrt(((known - m) ** 2).mean(1).min())) for m in marks]

    true = nearest([w.mixture[: frames * GEOMETRY.hop] for w in windows])
    made = nearest(
        [
            _mono(generate(model, seconds=FILL_SECONDS, settings=Settings(seed=500 + s)).mix())
            for s in range(seeds)
        ]
    )
    return {
        "generated": float(np.median(made)),
        "held_out": float(np.median(true)),
        "training_windows": count,
    }


_SPEED = """
import json, resource, time
start = time.perf_counter()
from engine.model import Model
from engine.tasks import generate
model = Model.open({bundle!r}, "cpu")
generate(model, seconds=1.0)
loaded = model.seconds_loading
times = []
for seed in range(3):
    begin = time.perf_counter(); generate(model, seconds=10.0); times.append(time.perf_counter() - begin)
print(json.dumps({{"load_s": loaded, "ten_seconds_s": times, "threads": model.threads, "provider": model.provider,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}))
"""


def evaluate_speed(bundle: Path) -> dict[str, Any]:
    """Load time, time for 10 s of four stems, and peak memory, in a process of its own."""
    code = _SPEED.format(bundle=str(bundle))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return row | {"real_time_factor": float(np.median(row["ten_seconds_s"])) / 10}


def evaluate_seeds(model: Model) -> dict[str, bool]:
    """The same seed twice, and another one."""
    a, b, c = (generate(model, seconds=3.0, settings=Settings(seed=s)).mix().samples for s in (1, 1, 2))
    return {
        "same_seed_same_bytes": bool(np.array_equal(a, b)),
        "other_seed_differs": not np.array_equal(a, c),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables a person can read."""
    lines = [
        f"# {report['model']}",
        "",
        f"{report['windows']} windows of held-out grooves, rendered with TimGM6mb.",
        "",
    ]
    if "fill" in report:
        lines += ["## fill: the other three stems given", ""]
        lines += ["| stem | | own context | aligned | sounds like its role |", "|---|---|---|---|---|"]
        for stem, row in report["fill"].items():
            for kind in ("true", "generated", "copy", "drone"):
                v = row[kind]
                lines.append(
                    f"| {stem} | {kind} | {v['own']:.2f} | {v['aligned']:.2f} | {v['sounds_like_role']:.2f} |"
                )
        lines += [
            "",
            "| stem | own / true (0.85) | aligned / true (0.75) | role (0.80) | worst SI-SDR to context (-10) | within 12 dB |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for stem, row in report["fill"].items():
            lines.append(
                f"| {stem} | {row['own_of_true']:.2f} | {row['aligned_of_true']:.2f} | {row['generated']['sounds_like_role']:.2f} "
                f"| {row['worst_si_sdr_to_context']:.1f} dB | {row['level_within_12_db']:.2f} |"
            )
    if "split" in report:
        lines += ["", "## split: SI-SDRi in dB, MSDM's protocol (bar: mean +5, each stem +2)", ""]
        lines += [
            f"| method | mean | {' | '.join(STEMS)} | windows scored |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, row in report["split"]["methods"].items():
            cells = [
                f"{row['stems'][s]:.2f} ({row['interval'][s][0]:.1f}..{row['interval'][s][1]:.1f})"
                for s in STEMS
            ]
            lines.append(f"| {method} | {row['mean']:.2f} | {' | '.join(cells)} | {row['scored']} |")
        for method, values in PAPER.items():
            lines.append(
                f"| paper, {method} (other data) | {np.mean(values):.2f} | {' | '.join(f'{v:.2f}' for v in values)} | |"
            )
        lines.append(f"\nStems against the mix: {report['split']['worst_null_db']:.0f} dB at worst.")
    if "prompts" in report:
        right = sum(r["right_way"] for r in report["prompts"])
        lines += ["", f"## prompts: {right} of {len(report['prompts'])} move the right way (bar: 6)", ""]
        lines += [
            "| from | to | figure | of | means | right way | share of seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in report["prompts"]:
            means = " -> ".join(f"{m:.3g}" for m in r["means"])
            lines.append(
                f"| {r['low']} | {r['high']} | {r['figure']} | {r['stem']} | {means} "
                f"| {'yes' if r['right_way'] else 'no'} | {r['share_of_seeds']:.2f} |"
            )
    if "novelty" in report:
        n = report["novelty"]
        lines += [
            "",
            "## novelty",
            "",
            f"Distance to the nearest of {n['training_windows']} training windows: generated ",
        ]
        lines[-1] += f"{n['generated']:.3f}, held-out songs {n['held_out']:.3f} (medians)."
    if "speed" in report:
        s = report["speed"]
        lines += [
            "",
            "## speed",
            "",
            f"10 s of four stems: real-time factor {s['real_time_factor']:.2f} on {s['threads']} threads ",
        ]
        lines[-1] += f"({report['machine']}); load {s['load_s']:.2f} s; peak memory {s['peak_mb']:.0f} MB."
    if "seeds" in report:
        lines += [
            "",
            f"Same seed, same bytes: {report['seeds']['same_seed_same_bytes']}; another seed differs: {report['seeds']['other_seed_differs']}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("engine/default_bundle"))
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--classifier", type=Path, help="training folder of the stem classifier, for fill")
    parser.add_argument("--data", type=Path, help="rendered training songs, for novelty")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--slow-windows", type=int, default=12, help="windows for the sampled posteriors")
    parser.add_argument("--seeds", type=int, default=6, help="takes per caption")
    parser.add_argument(
        "--only", nargs="+", default=["fill", "split", "prompts", "novelty", "speed", "seeds"]
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--name", default="default_bundle")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = Model.open(args.bundle, "cpu")
    windows = held_out_windows(args.windows, args.grooves)
    report: dict[str, Any] = {
        "model": f"{model.manifest.name} {model.manifest.version}", "windows": len(windows),
        "seeds_of_windows": [w.seed for w in windows], "machine": f"{platform.machine()}, {model.threads} cores",
        "training": model.manifest.provenance.get("training", {}),
    }  # fmt: skip
    if "speed" in args.only:
        report["speed"] = evaluate_speed(args.bundle)
    if "split" in args.only:
        report["split"] = evaluate_split(model, windows, args.slow_windows)
    if "fill" in args.only:
        judge = Judge(load_ema(args.classifier, StemClassifier()))  # type: ignore[arg-type]
        report["fill"] = evaluate_fill(model, windows, judge)
    if "prompts" in args.only:
        report["prompts"] = evaluate_prompts(model, args.seeds)
    if "novelty" in args.only:
        report["novelty"] = evaluate_novelty(model, windows, load_songs(args.data / "train"), 2000, 16)
    if "seeds" in args.only:
        report["seeds"] = evaluate_seeds(model)
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    report["peak_mb_of_evaluation"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{args.name}.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
