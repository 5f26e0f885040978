"""python -m bench.precision: one UNet in every precision that `import` writes, its step's time and its worth.

All variants come from the same weights in torch: those of a training folder, not rounded, or of the
bundle, which are rounded to float16 already. bf16 is float32 arithmetic with weights rounded to bfloat16,
what storing them so would cost. Everything but the UNet is the bundle's, and splits are by the UNet's masks,
without a separator. Windows are those of bench.quality_curve.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

from bench.machine import describe_machine
from bench.quality_curve import FIRST_SEED, by_unet, distance, fill_row
from bench.speed.peers import session_call
from bench.speed.stages import stage_feeds
from bench.timing import interleaved
from engine.audio import Audio
from engine.bundle import load_bundle
from engine.model import Model
from engine.separation import split
from engine.take import Settings
from export.bundle_writer import graph_inputs, graph_outputs, hash_files
from export.onnx_writer import Precision, write_graph
from export.stem_unet import StemUNet
from training.evaluate import score_split
from training.from_bundle import read_unet
from training.held_out import Window, held_out_windows
from training.loop import load_ema
from training.stems import STEMS

VARIANTS = (*get_args(Precision), "bf16")
ROUNDS = 40


def rounded(unet: StemUNet) -> StemUNet:
    """Matrices and kernels to the nearest bfloat16, in place."""
    for weight in unet.parameters():
        if weight.dim() > 1:
            weight.data = weight.data.bfloat16().float()
    return unet


def write_variant(bundle: Path, unet: StemUNet, variant: str, out: Path) -> float:
    """The bundle with `unet` in this precision; returns the graph's worst relative error against torch."""
    shutil.copytree(bundle, out)
    manifest = load_bundle(bundle).manifest
    precision: Precision = "fp32" if variant == "bf16" else variant  # type: ignore[assignment]
    error = write_graph(
        unet,
        graph_inputs(manifest, "unet"),
        graph_outputs(manifest, "unet"),
        out / "unet.onnx",
        sizes=[{"batch": 1, "time": 16}, {"batch": 2, "time": 24}],
        precision=precision,
    )
    manifest = manifest.model_copy(update={"files": hash_files(out)})
    (out / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    return error


def worth(model: Model, windows: list[Window]) -> dict[str, Any]:
    """Shares that `fill` wins and SI-SDRi of `split` by the UNet's masks, means over stems; `made` holds the
    signals."""
    rows = {stem: fill_row(model, windows, stem, {}) for stem in STEMS}

    splitting = by_unet(model)

    def separate(window: Window, mix: Audio) -> Any:
        take = split(splitting, mix, settings=Settings(seed=1))
        return np.stack([take.stems[stem].samples[0] for stem in STEMS])

    return {
        "own": float(np.mean([row["own"] for row in rows.values()])),
        "aligned": float(np.mean([row["aligned"] for row in rows.values()])),
        "split_db": score_split(separate, windows, "split")["mean"],
        "made": {stem: row["made"] for stem, row in rows.items()},
    }


def measure(bundle: Path, run: Path | None, windows: list[Window], folder: Path) -> dict[str, Any]:
    """A row per variant: size, error, seconds a step (in turns), worth; distance_db: of fills to fp32's."""
    unet = read_unet(load_bundle(bundle), distilled=True)
    if run is not None:
        unet = load_ema(run, unet)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, Model] = {}
    for variant in VARIANTS:  # bf16 is the last, for it changes the weights
        out = folder / variant
        error = write_variant(bundle, rounded(unet) if variant == "bf16" else unet, variant, out)
        rows[variant] = {"megabytes": (out / "unet.onnx").stat().st_size / 1e6, "error": error}
        models[variant] = Model.open(out, "cpu")
    machine = describe_machine()
    calls = {
        variant: session_call(model, "unet", stage_feeds(model)["step"][1], "cpu")
        for variant, model in models.items()
    }
    seconds = interleaved(calls, ROUNDS)
    base: dict[str, Any] = {}
    for variant, model in models.items():
        found = worth(model, windows)
        base = base or found["made"]
        made = found.pop("made")
        apart = [distance(model, made[stem], base[stem]) for stem in STEMS]
        rows[variant] |= {"step": median(seconds[variant]), **found, "distance_db": float(np.mean(apart))}
        print(variant, rows[variant], flush=True)
    name = f"{load_bundle(bundle).manifest.name} {load_bundle(bundle).manifest.version}"
    return {
        "model": name,
        "unrounded": run is not None,
        "windows": len(windows),
        "machine": machine,
        "variants": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """One table; changes against fp32."""
    machine, rows = report["machine"], report["variants"]
    base = rows["fp32"]
    lines = [
        f"# Precision of the UNet: {report['model']}",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, load average {machine['load_average'][0]}; "
        f"{report['windows']} windows of held-out songs that no test uses. `python -m bench.precision`.",
        "",
        "| precision | MB | error of a step | step, ms | of fp32 | fill, own | fill, aligned | split, dB "
        "| fills apart, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        changes = [
            f"{row[key]:.3f} ({row[key] / base[key] - 1:+.1%})" for key in ("own", "aligned", "split_db")
        ]
        lines.append(
            f"| {name} | {row['megabytes']:.1f} | {row['error']:.1e} | {row['step'] * 1000:.1f} "
            f"| {row['step'] / base['step']:.2f} | {' | '.join(changes)} | {row['distance_db']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("engine/default_bundle"))
    parser.add_argument(
        "--run", type=Path, help="training folder of the UNet, for weights that are not rounded"
    )
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    torch.manual_seed(0)
    windows = held_out_windows(args.windows, args.grooves, FIRST_SEED)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.bundle, args.run, windows, Path(folder))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "precision.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "precision.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
