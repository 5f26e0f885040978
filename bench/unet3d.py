"""python -m bench.unet3d: one step of the reference's 3-D UNet, torch eager beside its ONNX exports.

Random weights in the released geometry (four stems, z 8, 256 x 16, attention at 2x, 4x and 8x), a third of
the released width unless told otherwise. Four exports run: `plain`, as the exporter writes the module;
`fused`, with attention as one operator; `folded`, with depth folded into 2-D convolutions besides; and
`winograd`, with half of these convolutions' products (`export.conv3d`). All take turns within each round, on
as many threads, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn import functional

from bench.machine import describe_machine
from bench.timing import interleaved
from export import unet3d
from export.onnx_writer import Input, write_graph
from export.unet3d import UNet3d, UNet3dConfig
from export.unet_form import in_form, widest_worth

FREQUENCY, DEPTH = 16, 8
VARIANTS = ("plain", "fused", "folded", "winograd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="model channels; the released UNet has 192")
    parser.add_argument("--time", type=int, default=256, help="latent frames; a released window has 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/unet3d.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measure(args.width, args.time, args.rounds, args.threads, args.variants)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, a row per variant."""
    machine, config = report["machine"], report["config"]
    about = (
        f"One step of the 3-D UNet at width {config['width']} ({config['parameters'] / 1e6:.1f} M "
        f"parameters), {config['frames']} latent frames, {report['threads']} threads of {machine['cpu']}; "
        f"median of {report['rounds']} interleaved rounds, load average {machine['load_average'][0]} as they "
        f"began. ONNX Runtime {machine['onnxruntime']}, torch {machine['torch']}."
    )
    lines = ["| | seconds | times as fast as torch |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['median']:.2f} | {report['times_faster_than_torch'][name]} |"
        for name, row in report["seconds"].items()
    ]
    return "\n".join([about, "", *lines, ""])


def measure(width: int, frames: int, rounds: int, threads: int, variants: list[str]) -> dict[str, Any]:
    """Seconds a step, and how many times faster than torch each export is, by the medians."""
    torch.manual_seed(0)
    config = UNet3dConfig(width=width)
    rng = np.random.default_rng(0)
    feed = {
        "latents": rng.standard_normal((1, config.stems, DEPTH, frames, FREQUENCY), np.float32),
        "timestep": np.array([500]),
        "film": rng.standard_normal((1, config.film_dim or 0), np.float32),
    }
    machine = describe_machine()
    module = UNet3d(config).eval().requires_grad_(False)
    tensors = [torch.from_numpy(value) for value in feed.values()]
    steps: dict[str, Callable[[], object]] = {"torch": lambda: module(*tensors)}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            session = _session(
                export_variant(variant, config, module, Path(folder) / f"{variant}.onnx"), threads
            )
            steps[variant] = lambda session=session: session.run(None, feed)  # type: ignore[misc]
        seconds = interleaved(steps, rounds)
    medians = {name: median(row) for name, row in seconds.items()}
    return {
        "what": "one step of the 3-D UNet",
        "config": {
            "width": width,
            "parameters": sum(p.numel() for p in module.parameters()),
            "frames": frames,
        },
        "threads": threads,
        "rounds": rounds,
        "machine": machine,
        "seconds": {
            name: {"median": medians[name], "all": [round(value, 4) for value in row]}
            for name, row in seconds.items()
        },
        "times_faster_than_torch": {name: round(medians["torch"] / m, 2) for name, m in medians.items()},
    }


def export_variant(variant: str, config: UNet3dConfig, module: UNet3d, path: Path) -> Path:
    """Writes one of VARIANTS of the module; returns its path."""
    inputs = [
        Input("latents", ("batch", config.stems, DEPTH, "time", FREQUENCY)),
        Input("timestep", ("batch",), "int64"),
        Input("film", ("batch", config.film_dim or 0)),
    ]
    outputs = {"prediction": inputs[0].shape}
    written: torch.nn.Module = module
    if variant in ("folded", "winograd"):
        written = UNet3d(config)
        written.load_state_dict(module.state_dict())
        in_form(written, variant, DEPTH, widest_worth(config))
    fused = unet3d.attend
    unet3d.attend = _written_out if variant == "plain" else fused
    try:
        write_graph(written, inputs, outputs, path, sizes=[{"batch": 1, "time": 8}, {"batch": 2, "time": 16}])
    finally:
        unet3d.attend = fused
    return path


def _written_out(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """What the exporter makes of torch's own attention: MatMul, Softmax, MatMul."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _session(path: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
