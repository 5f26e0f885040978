"""python -m bench.quality_curve: what fill and split are worth by sampler and steps, and the time they take.

The presets of `--quality` in a bundle's manifest are chosen from what this writes, so its windows are not
those of `training.evaluate`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from bench.quality.pitch import beat_one
from bench.quality.playing import grid_of, heard_f1
from engine.audio import Audio
from engine.features import log_mel
from engine.model import Model
from engine.separation import split
from engine.take import Settings
from engine.tasks import fill
from training import metrics
from training.evaluate import FILL_SECONDS, RATE, score_split
from training.held_out import Window, held_out_windows
from training.stems import STEMS

Array = np.ndarray[Any, Any]
FIRST_SEED = 1_700_000  # validation while training uses those from 1,000,000, the tests those from 2,000,000


def fill_row(model: Model, windows: list[Window], stem: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One stem played against the other three: shares won, seconds a window; `made` holds the signals."""
    i = STEMS.index(stem)
    made, contexts, seconds = [], [], []
    for window in windows:
        truth = window.stems[:, : round(FILL_SECONDS * RATE)]
        given = {name: Audio(truth[j][None], RATE) for j, name in enumerate(STEMS) if j != i}
        started = time.perf_counter()
        take = fill(model, given, [stem], settings=Settings(seed=window.seed, **settings))
        seconds.append(time.perf_counter() - started)
        made.append(take.stems[stem].samples.mean(0))
        contexts.append(metrics.listening_feature(truth.sum(0) - truth[i], stem))
    features = [metrics.listening_feature(signal, stem) for signal in made]
    beats = [window.beat for window in windows]
    return {
        "own": metrics.share_of_own(features, contexts),
        "aligned": metrics.share_of_aligned(features, contexts, beats, stem),
        "seconds": float(np.median(seconds)),
        "made": made,
    }


def distance(model: Model, made: list[Array], reference: list[Array]) -> float:
    """Mean absolute difference of log mels (dB of magnitude) to the reference's."""
    pairs = zip(made, reference, strict=True)
    mels = [[log_mel(x[None].astype(np.float32), model.manifest.mel) for x in pair] for pair in pairs]
    return float(np.mean([np.abs(a - b).mean() for a, b in mels])) * 20 / np.log(10)


def curve(
    model: Model, windows: list[Window], samplers: list[str], steps: list[int], reference: int
) -> list[dict[str, Any]]:
    """A row per sampler and number of steps, means over stems; distance: to `reference` steps of it.

    The distilled steps of a bundle that has them stand last, against the first sampler's `reference`.
    """
    rows = []
    bests = {}
    for sampler in samplers:
        best = bests[sampler] = _filled(model, windows, sampler, reference)
        for count in [*steps, reference]:
            found = best if count == reference else _filled(model, windows, sampler, count)
            rows.append({"sampler": sampler, "steps": count} | _summary(model, windows, found, best))
            print(rows[-1], flush=True)
    if model.manifest.distilled is not None:
        count = model.manifest.distilled.steps
        found = _filled(model, windows, "distilled", count)
        best = bests[samplers[0]]
        rows.append({"sampler": "distilled", "steps": count} | _summary(model, windows, found, best))
        print(rows[-1], flush=True)
    return rows


def _filled(model: Model, windows: list[Window], sampler: str, steps: int) -> dict[str, dict[str, Any]]:
    return {stem: fill_row(model, windows, stem, {"sampler": sampler, "steps": steps}) for stem in STEMS}


def _summary(
    model: Model, windows: list[Window], found: dict[str, dict[str, Any]], best: dict[str, dict[str, Any]]
) -> dict[str, float]:
    row = {k: float(np.mean([found[s][k] for s in STEMS])) for k in ("own", "aligned", "seconds")}
    pairs = list(zip(found["drums"]["made"], windows, strict=True))
    row["beat_f1"] = float(
        np.mean([heard_f1(made, 60 / w.beat, grid_of(w, FILL_SECONDS)) for made, w in pairs])
    )
    pairs = list(zip(found["bass"]["made"], windows, strict=True))
    row["chord_tone"] = float(np.mean([beat_one(made, w.song, w.start)[1] for made, w in pairs]))
    row["distance_db"] = float(np.mean([distance(model, found[s]["made"], best[s]["made"]) for s in STEMS]))
    return row


def by_unet(model: Model) -> Model:
    """The same model without its separator, so that it splits by the UNet's masks."""
    other = copy.copy(model)
    other.manifest = model.manifest.model_copy(update={"separator": None})
    return other


def split_curve(model: Model, windows: list[Window], steps: list[int]) -> list[dict[str, Any]]:
    """SI-SDRi of the UNet's masks by the number of steps; one step is the posterior mean."""
    model = by_unet(model)
    rows = []
    for count in steps:
        seconds: list[float] = []

        def separate(window: Window, mix: Audio, count: int = count, times: list[float] = seconds) -> Array:
            started = time.perf_counter()
            take = split(model, mix, settings=Settings(seed=1, steps=count))
            times.append(time.perf_counter() - started)
            return np.stack([take.stems[stem].samples[0] for stem in STEMS])

        score = score_split(separate, windows, f"{count} steps")
        rows.append({"steps": count, "si_sdri": score["mean"], "seconds": float(np.median(seconds))})
        print(rows[-1], flush=True)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Two tables."""
    machine = report["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, load average {machine['load_average'][0]}"
    lines = [f"# Quality against steps: {report['model']}", ""]
    lines += [
        f"{report['windows']} windows of held-out songs that no test uses; {where}.",
        "",
        "## fill, means over stems",
        "",
    ]
    lines += ["| sampler | steps | own | aligned | beat F1, drums | chord tone on beat 1, bass "]
    lines[-1] += "| distance to most steps, dB | s a window |"
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['sampler']} | {r['steps']} | {r['own']:.3f} | {r['aligned']:.3f} | {r['beat_f1']:.3f} "
        f"| {r['chord_tone']:.3f} | {r['distance_db']:.2f} | {r['seconds']:.2f} |"
        for r in report["fill"]
    ]
    lines += ["", "## split by the UNet's masks, without a separator", ""]
    lines += ["| steps | SI-SDRi, dB | s a window |", "|---|---|---|"]
    lines += [f"| {r['steps']} | {r['si_sdri']:.2f} | {r['seconds']:.2f} |" for r in report["split"]]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Both curves, steps on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sampler in dict.fromkeys(row["sampler"] for row in report["fill"]):
        rows = [row for row in report["fill"] if row["sampler"] == sampler]
        left.plot([r["steps"] for r in rows], [r["distance_db"] for r in rows], marker="o", label=sampler)
    left.set(xscale="log", xlabel="steps", ylabel="fill: distance to most steps, dB")
    left.legend()
    rows = report["split"]
    right.plot([r["steps"] for r in rows], [r["si_sdri"] for r in rows], marker="o")
    right.set(xscale="log", xlabel="steps", ylabel="split: SI-SDRi, dB")
    for axes, rows in ((left, report["fill"]), (right, report["split"])):
        steps = sorted({row["steps"] for row in rows})
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("engine/default_bundle"))
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m", "ddim", "euler"])
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 4, 6, 8, 12, 20, 32])
    parser.add_argument("--split-steps", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--reference", type=int, default=64, help="steps that count as many")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    model = Model.open(args.bundle, "cpu")
    windows = held_out_windows(args.windows, args.grooves, FIRST_SEED)
    report = {
        "model": f"{model.manifest.name} {model.manifest.version}",
        "windows": len(windows),
        "machine": describe_machine(),
        "split": split_curve(model, windows, args.split_steps),
        "fill": curve(model, windows, args.samplers, args.steps, args.reference),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_curve.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "quality_curve.md").write_text(markdown(report))
    draw(report, args.out / "quality_curve.png")


if __name__ == "__main__":
    main()
