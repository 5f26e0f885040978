"""The session host end to end with the default model, and every VST3 of this machine in its process.

    python -m bench.session_host [--out bench/results/session_host] [--seconds 10]

The story: bass, drums and guitar of the demo's song; piano is armed and filled, undone and redone; bass and
drums are armed and filled; the bounce is split and its five tracks bounced again, which must null.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from bridge.filling import fill_armed, listen, local_engine, split_to_tracks
from bridge.loudness import loudness
from engine.audio import Audio, read, resample, write
from engine.model import Model
from plugin_host.host import Span, bounce
from plugin_host.plugins import PluginFailed, describe, installed, run_plugin
from plugin_host.session import SessionHost
from plugin_host.session_file import PluginState

SONG = Path(__file__).parents[1] / "bridge" / "demo_song"
RATES, CHANNELS = (44100, 48000, 96000), (1, 2)
PLUGIN_SECONDS = 30.0


def story(model: Model, folder: Path, rate: int, channels: int, seconds: float) -> dict[str, Any]:
    """The figures of one story at this rate and with this many channels."""
    host = SessionHost.create(folder, sample_rate=rate, tempo=100)
    for name in ("bass", "drums", "guitar"):
        part = resample(read(SONG / f"{name}.flac"), rate)
        samples = np.broadcast_to(
            part.samples[:1, : round(seconds * rate)], (channels, round(seconds * rate))
        )
        write(folder / "part.wav", Audio(samples, rate))
        host.place(host.create_track(name).id, folder / "part.wav", 0)
    piano = host.create_track("Klavier").id
    engine = local_engine(model)
    start = rate // 2 + 1
    host.arm(piano)
    heard = listen(host, engine.stems, Span(start, host.length))
    around = float(np.mean([loudness(part) for part in heard.context.values()]))
    began, worked = time.perf_counter(), time.process_time()
    (placed,) = fill_armed(host, engine, span=heard.span, seed=1)
    fill_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    filled = read(host.export([piano], heard.span)[piano])
    host.undo()
    undone = not host.state.tracks[3].regions
    host.redo()
    for track in host.state.tracks[:2]:
        host.arm(track.id)
    both = fill_armed(host, engine, seed=2)
    mix = bounce(host)
    for track in host.state.tracks:
        host.set_track(track.id, muted=True)
    write(folder / "mix.wav", mix)
    split_to_tracks(host, engine, folder / "mix.wav")
    rest = np.abs(bounce(host).samples - mix.samples).max() / np.abs(mix.samples).max()
    return {
        "rate": rate,
        "channels": channels,
        "starts_at_the_sample": placed.position == start,
        "fill_seconds": round(fill_seconds, 2),
        "fill_cpu_seconds": round(cpu_seconds, 2),
        "audio_seconds": round(heard.span.length / rate, 2),
        "loudness_above_context_lu": round(loudness(filled) - around, 2),
        "undone_and_redone": undone and len(host.state.tracks[3].regions) == 1,
        "both_are_second_takes": [len(track.regions[0].takes) for track in host.state.tracks[:2]] == [2, 2],
        "filled_together": [part.role for part in both],
        "split_null_db": round(float(20 * np.log10(max(rest, 1e-12))), 1),
    }


def plugin_report(path: Path, folder: Path) -> dict[str, Any]:
    """What a VST3 does with one and with two channels of noise."""
    plugin = PluginState(name=path.stem, path=str(path))
    began = time.perf_counter()
    row: dict[str, Any] = {"plugin": path.stem}
    try:
        row["latency"] = describe(plugin, presets=folder, seconds=PLUGIN_SECONDS)[0].latency
        for channels in CHANNELS:
            noise = 0.1 * np.random.default_rng(0).standard_normal((channels, 44100)).astype(np.float32)
            result = run_plugin(plugin, Audio(noise, 44100), presets=folder, seconds=PLUGIN_SECONDS)
            row[f"channels_from_{channels}"] = result.channels
        row["outcome"] = "ok"
    except PluginFailed as failed:
        row["outcome"] = failed.bypassed.sentence
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# The session host",
        "",
        f"{report['machine']['cpu']}, {report['machine']['cores']} cores, load averages "
        f"{report['machine']['load_average']}: other work ran beside it, so the seconds are too many.",
        "",
        "The story of bench/session_host.py with the default model. Loudness: the piano's, less the mean of",
        "what it plays with. Null: the peak of what the split leaves of the mix, to the peak of the mix.",
        "",
        "| Hz | channels | fill, s | its CPU, s | of s | loudness, LU | undo, redo | takes | null, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["stories"]:
        marks = ["yes" if row[key] else "NO" for key in ("undone_and_redone", "both_are_second_takes")]
        cells = [
            row[key] for key in ("rate", "channels", "fill_seconds", "fill_cpu_seconds", "audio_seconds")
        ]
        cells += [row["loudness_above_context_lu"], *marks, row["split_null_db"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        f"VST3s of this machine, each with {PLUGIN_SECONDS:g} s a run. Seconds: described once, run twice.",
        "",
        "| plugin | latency, samples | mono becomes | stereo becomes | seconds | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["plugins"]:
        cells = [str(row.get(key, "")) for key in ("latency", "channels_from_1", "channels_from_2")]
        lines.append(f"| {row['plugin']} | {' | '.join(cells)} | {row['seconds']} | {row['outcome']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the session host.")
    parser.add_argument("--out", type=Path, default=Path("bench/results/session_host"))
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    model = Model.open(None, "cpu")
    report: dict[str, Any] = {"machine": describe_machine(), "stories": [], "plugins": []}
    with tempfile.TemporaryDirectory() as name:
        for rate in RATES:
            for channels in CHANNELS:
                folder = Path(name) / f"{rate}-{channels}"
                report["stories"].append(story(model, folder, rate, channels, arguments.seconds))
        report["plugins"] = [plugin_report(path, Path(name)) for path in installed()]
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    arguments.out.with_suffix(".md").write_text(_markdown(report), "utf-8")
    print(arguments.out.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()
