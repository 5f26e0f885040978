"""What `backline bench speed` measured, as tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[list[str]]
BUSY = 0.5  # load average a core, above which figures mislead


def stage_table(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Columns and rows of the stages."""
    columns = ["stage", "ms", "GFLOP", "MB", "floor, ms", "bound by", "times the floor"]
    rows = [
        [
            row["stage"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['gflop']:.2f}",
            f"{row['megabytes']:.1f}",
            f"{1000 * row['floor_seconds']:.1f}",
            row["bound"],
            f"{row['times_floor']:.1f}",
        ]
        for row in result["stages"]
    ]
    return columns, rows


def peer_table(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Columns and rows of one UNet step, the engine beside its peers."""
    rows: Rows = []
    for contest in result["unet"]:
        for name, seconds in contest.get("seconds", {}).items():
            ratio = contest["engine_over"].get(name)
            cell = "" if ratio is None else f"{ratio:.2f}"
            floor = f"{contest['times_floor'][name]:.1f}"
            rows.append([contest["network"], name, f"{1000 * seconds:.1f}", floor, cell])
        rows += [[contest["network"], name, "", "", why] for name, why in contest["missing"].items()]
    rows += _diffusers_row(result.get("diffusers"))
    return ["network", "by", "ms", "times the floor", "engine / this"], rows


def _diffusers_row(found: dict[str, Any] | None) -> Rows:
    if found is None:
        return []
    if "missing" in found:
        return [["UNet of diffusers", "diffusers", "", "", found["missing"]]]
    what = f"{found['gflop']:.1f} GFLOP at {found['gflop_per_second']:.0f} GFLOP/s"
    return [["UNet of diffusers", "diffusers", f"{1000 * found['seconds']:.1f}", "", what]]


def remarks(result: dict[str, Any]) -> list[str]:
    """Sentences below the tables."""
    found = []
    if result["machine"]["busy_cores"] > BUSY:
        found.append(
            "The cores were not free as this began: torch's threads wait for each other in a spin, so "
            "its rows are far too slow, and nothing here is comparable. Run it again on a quiet machine."
        )
    for contest in result["unet"]:
        if "seconds" in contest and "torch" in contest["seconds"]:
            found.append(
                f"{contest['network']}: torch runs {contest['weights_in_torch']} in "
                f"{contest['precision_of_torch']}, {contest['gflop']:.1f} GFLOP a step."
            )
        if contest.get("why_slower"):
            found.append(f"{contest['network']}: {contest['why_slower']}")
    copies = result.get("copies")
    if copies and "missing" in copies:
        found.append(f"Copies in the sampling loop: not counted, {copies['missing']}.")
    elif copies:
        found.append(
            f"Copies in the sampling loop, a step: {copies['to_device_per_step']:g} to the device, "
            f"{copies['to_host_per_step']:g} to the host."
        )
    return found


def batch_table(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Columns and rows of the throughput."""
    rows = [
        [
            str(row["batch"]),
            f"{1000 * row['seconds']:.1f}",
            f"{row['windows_per_second']:.1f}",
            f"{100 * row['of_ceiling']:.0f} %",
        ]
        for row in result.get("batches", [])
    ]
    return ["windows together", "ms a step", "windows a second", "of the ceiling"], rows


def about(result: dict[str, Any]) -> list[str]:
    """Sentences above the tables."""
    machine, ceilings, whole = result["machine"], result["ceilings"], result["end_to_end"]
    return [
        f"{result['model']} by {result['provider']}, {result['threads']} threads of {machine['cpu']}; load "
        f"average {machine['load_average'][0]}, onnxruntime {machine['onnxruntime']}, "
        f"torch {machine['torch']}.",
        f"Ceilings: {ceilings['flops'] / 1e9:.0f} GFLOP/s ({ceilings['precision']}, {ceilings['by']}), "
        f"{ceilings['bytes'] / 1e9:.1f} GB/s. Loaded in {result['load_seconds']:.2f} s.",
        f"{whole['window_seconds']:.2f} s of all stems, {whole['steps']} steps: {whole['seconds']:.2f} s, "
        f"real-time factor {whole['real_time_factor']:.2f}.",
    ]


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """Every table with its title."""
    found = [
        ("One window, stage by stage", *stage_table(result)),
        ("One UNet step, in turns", *peer_table(result)),
    ]
    if result.get("batches"):
        found.append(("UNet steps of several windows", *batch_table(result)))
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# Speed", "", f"{result['date']}.", *about(result)]
    for title, columns, rows in tables(result):
        lines += ["", f"## {title}", "", _line(columns), "|" + "---|" * len(columns)]
        lines += [_line(row) for row in rows]
    lines += ["", *[f"- {sentence}" for sentence in remarks(result)]]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """speed.json, speed.md and speed.png in `folder`, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"speed.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(as_markdown(result), encoding="utf-8")
    draw(result, paths[2])
    return paths


def draw(result: dict[str, Any], path: Path) -> None:
    """On the left where the time of a window goes, on the right how far each stage is from the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=[1, 1.4])
    _draw_window(left, result)
    _draw_roofline(right, result)
    machine = result["machine"]
    figure.suptitle(f"{result['model']}, {result['threads']} threads of {machine['cpu']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_window(axes: Any, result: dict[str, Any]) -> None:
    steps = result["end_to_end"]["steps"]
    parts = {row["stage"]: row["seconds"] for row in result["stages"]}
    floors = {row["stage"]: row["floor_seconds"] for row in result["stages"]}
    parts, floors = ({**p, "step": p["step"] * steps} for p in (parts, floors))
    bottom = [0.0, 0.0]
    for stage, label in (("step", f"{steps} steps"), ("decode", "decode"), ("vocode", "vocode")):
        heights = [parts[stage], floors[stage]]
        axes.bar(["engine", "floor"], heights, bottom=bottom, width=0.6, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_ylabel(f"seconds for {result['end_to_end']['window_seconds']:.1f} s of all stems")
    axes.legend(frameon=False)
    axes.set_title("Where the time goes", fontsize=10)


def _draw_roofline(axes: Any, result: dict[str, Any]) -> None:
    import numpy as np

    peak, rate = result["ceilings"]["flops"], result["ceilings"]["bytes"]
    intensity = np.logspace(0, 5, 200)
    axes.loglog(intensity, np.minimum(peak, intensity * rate) / 1e9, color="black", linewidth=1.2)
    for row in result["stages"]:
        x = row["gflop"] * 1e9 / (row["megabytes"] * 1e6)
        y = row["gflop"] / row["seconds"]
        axes.plot(x, y, "o", markersize=8, label=f"{row['stage']}: {row['times_floor']:.1f} times its floor")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("FLOPs per byte that has to be moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.set_title("Against the roofline", fontsize=10)
