"""What `backline bench quality` measured, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = ("figure", "value", "95 %", "ceiling", "floor", "bar", "met", "n", "note")
TITLES = {
    "split": "Taking mixes apart",
    "fill": "Filling in one stem",
    "generate": "Whole bands, told a tempo and chords",
    "sound": "Sound",
    "cost": "Cost",
}
FAINT_DB = -60.0
OURS, PEER, INK = "#b5367a", "#5f7f9f", "#1c1c22"


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each part."""
    parts = list(dict.fromkeys(figure["part"] for figure in result["figures"]))
    return [
        (TITLES[part], list(COLUMNS), [_cells(row) for row in result["figures"] if row["part"] == part])
        for part in parts
    ]


def about(result: dict[str, Any]) -> str:
    """One paragraph on what was measured and where."""
    machine = result["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    return (
        f"{result['model']} on {result['windows']} windows of songs from held-out grooves, by TimGM6mb; "
        f"{machine['cpu']}, {machine['cores']} cores, load {load} at the end. Intervals are 95 %, by "
        "bootstrap over windows. Ceilings and floors are the same measure of what is named there."
    )


def markdown(result: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = ["# Quality", "", about(result)]
    for title, columns, rows in tables(result):
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in result["seconds"].items())
    return "\n".join([*lines, "", f"Time taken: {seconds}.", ""])


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """quality.json, quality.md and quality.png in a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"quality.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    paths[1].write_text(markdown(result), "utf-8")
    draw(result, paths[2])
    return paths


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each part and unit: values with their intervals, ceilings, floors and bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result["figures"]:
        # what the stems leave of the mix is so little that the rest would be squeezed
        if row["value"] is not None and row["part"] != "cost" and row["value"] > FAINT_DB:
            groups.setdefault((row["part"], row["unit"]), []).append(row)
    panels = list(groups.items())
    height = 0.6 + sum(0.26 * len(rows) + 0.75 for _, rows in panels)
    figure = Figure(figsize=(10, height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        max(1, len(panels)), 1, squeeze=False, height_ratios=[len(rows) + 2 for _, rows in panels] or [1]
    )[:, 0]
    for axis, ((part, unit), rows) in zip(axes, panels, strict=False):
        _panel(axis, f"{TITLES[part]}{f', {unit}' if unit else ''}", rows)
    marks = "red: bar; green: ceiling; brown: floor; blue: a peer"
    title = f"{result['model']}, {result['windows']} windows\n({marks})"
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axis: Any, title: str, rows: list[Row]) -> None:
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    for y, row in enumerate(rows):
        low, high = row["interval"] or (row["value"], row["value"])
        axis.barh(y, row["value"], 0.6, color=PEER if row["peer"] else OURS, alpha=0.85)
        axis.plot([low, high], [y, y], color=INK, lw=1.5)
        axis.plot(list(row["ceiling"].values()), [y] * len(row["ceiling"]), ">", color="#2a7f4f", ms=5)
        axis.plot(list(row["floor"].values()), [y] * len(row["floor"]), "<", color="#b06000", ms=5)
        if row["bar"] is not None:
            axis.plot([row["bar"]] * 2, [y - 0.4, y + 0.4], color="#d02020", lw=2)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)


def _cells(row: Row) -> list[str]:
    unit = f" {row['unit']}" if row["unit"] not in ("", "r") else ""
    value = "not measured" if row["value"] is None else f"{row['value']:.2f}{unit}"
    interval = "" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"])
    sign = "at most" if row["lower"] else "at least"
    bar = "" if row["bar"] is None else f"{sign} {row['bar']:g}"
    met = {None: "", True: "met", False: "not met"}[row["met"]]
    counted = str(row["n"]) if row["n"] else ""
    return [
        row["name"],
        value,
        interval,
        _beside(row["ceiling"]),
        _beside(row["floor"]),
        bar,
        met,
        counted,
        row["note"],
    ]


def _beside(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())
