"""python -m training.evaluate: what a bundle can do, on the held-out set; one JSON and one Markdown table.

Every figure has what it must be read against beside it: the true stem, a copy of the context and a static
chord drone for `fill`; the ideal mask and a shuffled mixture for `split`; held-out songs for novelty.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.audio import Audio, resample
from engine.features import log_mel
from engine.model import Model
from engine.separation import Method, mask_mix
from engine.take import Settings
from engine.tasks import fill, generate, split
from training import metrics
from training.dataset import MAGNITUDES, RenderedSong, load_songs
from training.held_out import Window, held_out_windows
from training.loop import load_ema
from training.mel import GEOMETRY, LATENT_FRAMES
from training.metrics import Array
from training.sources import training_sources
from training.stems import STEMS
from training.train_classifier import StemClassifier

RATE = GEOMETRY.sample_rate
FILL_SECONDS = 10.0
FAMILIAR_SEED = 2_500_000
PARTS = ("fill", "split", "prompts", "novelty", "speed", "seeds")
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
Separate = Callable[[Window, Audio], Array]  # a window and its mix -> estimated stems (S, samples)


def sounds_like(classifier: StemClassifier, audio: Array) -> str:
    """The stem that a 10 s signal sounds like."""
    mel = torch.from_numpy(log_mel(audio[None].astype(np.float32), GEOMETRY))[:, None]
    with torch.no_grad():
        return STEMS[int(classifier(mel).argmax())]


def _mono(audio: Audio) -> Array:
    return audio.samples.mean(0)


def evaluate_fill(
    model: Model, windows: list[Window], classifier: StemClassifier, seed: int = 0
) -> dict[str, Any]:
    """Each stem generated against the other three, beside the true stem, the context's copy and a drone."""
    result: dict[str, Any] = {}
    for i, stem in enumerate(STEMS):
        made: dict[str, list[Array]] = {"generated": [], "true": [], "copy": [], "drone": []}
        contexts, copies, levels = [], [], []
        for window in tqdm(windows, desc=f"fill {stem}", mininterval=5):
            truth = window.stems[:, : round(FILL_SECONDS * RATE)]
            given = {s: Audio(truth[j][None], RATE) for j, s in enumerate(STEMS) if j != i}
            take = fill(model, given, [stem], settings=Settings(seed=seed + window.seed))
            generated = _mono(take.stems[stem])
            context = truth.sum(0) - truth[i]
            made["generated"].append(generated)
            made["true"].append(truth[i])
            made["copy"].append(context)
            made["drone"].append(metrics.drone(window.song.chords[0].tones, len(context)))
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
                "sounds_like_role": float(np.mean([sounds_like(classifier, s) == stem for s in signals])),
            }
        result[stem] = shares | {
            "own_of_true": shares["generated"]["own"] / max(shares["true"]["own"], 1e-9),
            "aligned_of_true": shares["generated"]["aligned"] / max(shares["true"]["aligned"], 1e-9),
            "worst_si_sdr_to_context": max(copies),
            "level_difference_db": {
                "median": float(np.median(levels)),
                "largest": float(np.abs(levels).max()),
            },
            "level_within_12_db": float(np.mean(np.abs(levels) <= 12)),
        }
    return result


def window_improvements(estimates: Array, window: Window) -> list[tuple[int, float]]:
    """(stem, SI-SDRi) of estimated stems (S, samples) in each scored part of a window."""
    low = [
        resample(Audio(x.astype(np.float32), RATE), metrics.MSDM_RATE).samples
        for x in (estimates, window.stems)
    ]
    return metrics.msdm_improvements(low[0], low[1])


def score_split(separate: Separate, windows: list[Window], name: str) -> dict[str, Any]:
    """SI-SDRi of one method: per stem the mean and its 95 % interval, and the mean over stems."""
    rows: list[tuple[int, float]] = []
    for window in tqdm(windows, desc=f"split {name}", mininterval=5):
        rows += window_improvements(separate(window, Audio(window.mixture[None], RATE)), window)
    per_stem = {s: [v for k, v in rows if k == i] for i, s in enumerate(STEMS)}
    averages = {s: float(np.mean(v)) for s, v in per_stem.items()}
    return {
        "mean": float(np.mean(list(averages.values()))),
        "stems": averages,
        "interval": {s: metrics.interval(v) for s, v in per_stem.items()},
        "scored": len(rows),
    }


def evaluate_split(model: Model, windows: list[Window], slow: int) -> dict[str, Any]:
    """SI-SDRi by method, with the ideal mask and a shuffled mixture; `slow` windows for the posteriors."""
    nulls: list[float] = []

    def by(method: Method, raw: bool = False) -> Separate:
        def separate(window: Window, mix: Audio) -> Array:
            take = split(model, mix, method=method, raw=raw, settings=Settings(seed=1))
            parts = np.stack([take.stems[s].samples[0] for s in STEMS])
            if not raw:
                difference = np.abs(parts.astype(np.float64).sum(0) - mix.samples[0]).max()
                nulls.append(20 * np.log10(difference / np.abs(mix.samples).max() + 1e-12))
            return parts

        return separate

    def ideal(window: Window, mix: Audio) -> Array:
        return mask_mix(mix, log_mel(_padded(window.stems), GEOMETRY), GEOMETRY)[:, 0]

    def shuffled(window: Window, mix: Audio) -> Array:
        other = windows[(windows.index(window) + 1) % len(windows)]
        take = split(model, Audio(other.mixture[None], RATE), method="mask", settings=Settings(seed=1))
        mels = np.stack([log_mel(_padded(take.stems[s].samples), GEOMETRY)[0] for s in STEMS])
        return mask_mix(mix, mels, GEOMETRY)[:, 0]

    few = windows[:slow]
    result = {
        "ideal mask": score_split(ideal, windows, "ideal mask"),
        "mask": score_split(by("mask"), windows, "mask"),
        "shuffled mixture": score_split(shuffled, windows, "shuffled mixture"),
        "dirac": score_split(by("dirac"), few, "dirac"),
        "gaussian": score_split(by("gaussian"), few, "gaussian"),
        "dirac, vocoder's audio": score_split(by("dirac", raw=True), few, "dirac raw"),
    }
    return {"methods": result, "worst_null_db": max(nulls), "paper": PAPER}


def _padded(stems: Array) -> Array:
    """To whole latent frames, so that mels cover the end."""
    step = GEOMETRY.hop * LATENT_FRAMES
    return np.pad(stems, ((0, 0), (0, -stems.shape[1] % step))).astype(np.float32)


def evaluate_prompts(model: Model, seeds: int) -> list[dict[str, Any]]:
    """For each opposed pair, the figure for both captions over the same seeds."""
    rows = []
    for low, high, figure, stem in tqdm(PROMPTS, desc="prompts"):
        measure = metrics.brightness if figure == "brightness" else metrics.onsets_per_second
        values: list[list[float]] = []
        for caption in (low, high):
            takes = [
                generate(model, seconds=FILL_SECONDS, text=caption, settings=Settings(seed=s))
                for s in range(seeds)
            ]
            values.append([measure(_mono(t.mix() if stem is None else t.stems[stem])) for t in takes])
        averages = [float(np.mean(v)) for v in values]
        rows.append(
            {
                "low": low,
                "high": high,
                "figure": figure,
                "stem": stem or "mix",
                "means": averages,
                "right_way": averages[1] > averages[0],
                "share_of_seeds": float(np.mean(np.array(values[1]) > np.array(values[0]))),
            }
        )
    return rows


def _fingerprints(mels: Array) -> Array:
    """(n, frames, mels) -> (n, features): mean log mels over eighths of the window, level removed."""
    n, frames, bands = mels.shape
    cut = mels[:, : frames // 8 * 8].reshape(n, 8, -1, bands).mean(2)
    return (cut - cut.mean((1, 2), keepdims=True)).reshape(n, -1)


def evaluate_novelty(
    model: Model,
    windows: list[Window],
    songs: list[RenderedSong],
    count: int,
    seeds: int,
    familiar: Sequence[Window] = (),
) -> dict[str, float]:
    """Distance to the nearest training window: generated bands against held-out songs (medians).

    familiar: held-out songs with the sounds of training. A band of known sounds is nearer to the training
    windows than one of strange sounds, whoever wrote the notes.
    """
    known = training_bank(songs, count)
    takes = [generate(model, seconds=FILL_SECONDS, settings=Settings(seed=500 + s)) for s in range(seeds)]
    found = {
        "generated": float(np.median(nearest(known, [_mono(t.mix()) for t in takes]))),
        "held_out": float(np.median(nearest(known, [w.mixture for w in windows]))),
        "training_windows": float(count),
    }
    if familiar:
        found["held_out_familiar"] = float(np.median(nearest(known, [w.mixture for w in familiar])))
    return found


def training_bank(songs: list[RenderedSong], count: int) -> Array:
    """(count, features) of random windows of training songs, their sounds drawn anew."""
    frames = round(FILL_SECONDS * metrics.FRAME_RATE)
    rng = np.random.default_rng(0)
    bank = []
    for _ in range(count):
        song = songs[int(rng.integers(len(songs)))]
        start = int(rng.integers(song.mels.shape[2] - frames))
        renders = rng.integers(song.mels.shape[1], size=len(STEMS))
        stored = np.stack([song.mels[i, r, start : start + frames] for i, r in enumerate(renders)])
        power = (MAGNITUDES[stored] ** 2).sum(0)
        bank.append(0.5 * np.log(np.maximum(power, GEOMETRY.floor**2)))
    return _fingerprints(np.stack(bank))


def nearest(known: Array, signals: Sequence[Array]) -> list[float]:
    """Distance of the first FILL_SECONDS of each signal to the nearest row of a bank."""
    samples = round(FILL_SECONDS * metrics.FRAME_RATE) * GEOMETRY.hop
    marks = _fingerprints(
        np.stack([log_mel(s[None, :samples].astype(np.float32), GEOMETRY)[0] for s in signals])
    )
    return [float(np.sqrt(((known - m) ** 2).mean(1).min())) for m in marks]


# VmHWM is this process's own; ru_maxrss would be that of the process that started it, where that is larger.
_SPEED = """
import json, re, time
from engine.model import Model
from engine.tasks import generate
model = Model.open({bundle!r}, "cpu")
generate(model, seconds=1.0)
times = []
for seed in range(3):
    begin = time.perf_counter()
    generate(model, seconds=10.0)
    times.append(time.perf_counter() - begin)
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({{
    "load_s": model.seconds_loading, "ten_seconds_s": times, "threads": model.threads,
    "provider": model.provider, "peak_mb": int(peak[1]) / 1024,
}}))
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
    """The report as tables a person can read; what was not measured is left out."""
    about = f"{report['windows']} windows of held-out grooves, rendered with TimGM6mb."
    lines = [f"# {report['model']}", "", about]
    if "fill" in report:
        lines += _fill_tables(report["fill"])
    if "split" in report:
        lines += _split_table(report["split"])
    if "prompts" in report:
        lines += _prompt_table(report["prompts"])
    if "novelty" in report:
        n = report["novelty"]
        found = f"generated {n['generated']:.3f}, held-out songs {n['held_out']:.3f} (medians)"
        lines += ["", "## novelty", ""]
        if "held_out_familiar" in n:
            found += f", held-out songs played with the sounds of training {n['held_out_familiar']:.3f}"
        lines += [f"Distance to the nearest of {n['training_windows']:.0f} training windows: {found}."]
    if "speed" in report:
        s = report["speed"]
        machine = f"{s['threads']} threads ({report['machine']})"
        lines += ["", "## speed", ""]
        lines += [
            f"10 s of four stems: real-time factor {s['real_time_factor']:.2f} on {machine}; "
            f"load {s['load_s']:.2f} s; peak memory {s['peak_mb']:.0f} MB."
        ]
    if "seeds" in report:
        same, other = report["seeds"]["same_seed_same_bytes"], report["seeds"]["other_seed_differs"]
        lines += ["", f"Same seed, same bytes: {same}; another seed differs: {other}."]
    return "\n".join(lines) + "\n"


def _fill_tables(fill: dict[str, Any]) -> list[str]:
    lines = ["", "## fill: the other three stems given", ""]
    lines += ["| stem | | own context | aligned | sounds like its role |", "|---|---|---|---|---|"]
    for stem, row in fill.items():
        for kind in ("true", "generated", "copy", "drone"):
            v = row[kind]
            cells = f"{v['own']:.2f} | {v['aligned']:.2f} | {v['sounds_like_role']:.2f}"
            lines.append(f"| {stem} | {kind} | {cells} |")
    bars = "own / true (0.85) | aligned / true (0.75) | role (0.80) | worst SI-SDR to context (-10)"
    lines += ["", f"| stem | {bars} | within 12 dB |", "|---|---|---|---|---|---|"]
    for stem, row in fill.items():
        shares = f"{row['own_of_true']:.2f} | {row['aligned_of_true']:.2f}"
        role, level = row["generated"]["sounds_like_role"], row["level_within_12_db"]
        copied = f"{row['worst_si_sdr_to_context']:.1f} dB"
        lines.append(f"| {stem} | {shares} | {role:.2f} | {copied} | {level:.2f} |")
    return lines


def _split_table(split: dict[str, Any]) -> list[str]:
    lines = ["", "## split: SI-SDRi in dB, MSDM's protocol (bar: mean +5, each stem +2)", ""]
    lines += [f"| method | mean | {' | '.join(STEMS)} | windows scored |", "|---|---|---|---|---|---|---|"]
    for method, row in split["methods"].items():
        spans = {s: "{:.1f}..{:.1f}".format(*row["interval"][s]) for s in STEMS}
        cells = " | ".join(f"{row['stems'][s]:.2f} ({spans[s]})" for s in STEMS)
        lines.append(f"| {method} | {row['mean']:.2f} | {cells} | {row['scored']} |")
    for method, values in PAPER.items():
        cells = " | ".join(f"{v:.2f}" for v in values)
        lines.append(f"| paper, {method} (other data) | {np.mean(values):.2f} | {cells} | |")
    return [*lines, "", f"Stems against the mix: {split['worst_null_db']:.0f} dB at worst."]


def _prompt_table(prompts: list[dict[str, Any]]) -> list[str]:
    right = sum(r["right_way"] for r in prompts)
    lines = ["", f"## prompts: {right} of {len(prompts)} move the right way (bar: 6)", ""]
    lines += [
        "| from | to | figure | of | means | right way | share of seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in prompts:
        values = " -> ".join(f"{m:.3g}" for m in r["means"])
        verdict = "yes" if r["right_way"] else "no"
        what = f"{r['low']} | {r['high']} | {r['figure']} | {r['stem']}"
        lines.append(f"| {what} | {values} | {verdict} | {r['share_of_seeds']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundle", type=Path, default=Path("engine/default_bundle"), help="what to measure (%(default)s)"
    )
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--classifier", type=Path, help="training folder of the stem classifier, for fill")
    parser.add_argument("--data", type=Path, help="folder with train/ of training.render, for novelty")
    parser.add_argument(
        "--samples", type=Path, help="folder of training sounds: held-out songs with those, too, for novelty"
    )
    parser.add_argument("--windows", type=int, default=24, help="one of each held-out song (%(default)s)")
    parser.add_argument("--slow-windows", type=int, default=12, help="windows for the sampled posteriors")
    parser.add_argument("--seeds", type=int, default=6, help="takes per caption")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the two files (%(default)s)"
    )
    parser.add_argument("--name", default="default_bundle", help="of the two files (%(default)s)")
    args = parser.parse_args()
    if "fill" in args.only and args.classifier is None:
        parser.error("fill needs --classifier")
    if "novelty" in args.only and args.data is None:
        parser.error("novelty needs --data")
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = Model.open(args.bundle, "cpu")
    windows = held_out_windows(args.windows, args.grooves)
    report: dict[str, Any] = {
        "model": f"{model.manifest.name} {model.manifest.version}",
        "windows": len(windows),
        "seeds_of_windows": [w.seed for w in windows],
        "machine": f"{platform.machine()}, {model.threads} cores",
        "training": model.manifest.provenance.get("training", {}),
    }
    if "speed" in args.only:
        report["speed"] = evaluate_speed(args.bundle)
    if "split" in args.only:
        report["split"] = evaluate_split(model, windows, args.slow_windows)
    if "fill" in args.only:
        report["fill"] = evaluate_fill(model, windows, load_ema(args.classifier, StemClassifier()))
    if "prompts" in args.only:
        report["prompts"] = evaluate_prompts(model, args.seeds)
    if "novelty" in args.only:
        familiar: list[Window] = []
        if args.samples is not None:
            sources = training_sources(args.samples)
            familiar = held_out_windows(args.windows, args.grooves, FAMILIAR_SEED, sources)
        songs = load_songs(args.data / "train")
        report["novelty"] = evaluate_novelty(model, windows, songs, 2000, 16, familiar)
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
