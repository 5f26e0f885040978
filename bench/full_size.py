"""python -m bench.full_size: a stand-in of the released checkpoint, imported, and one step of it run.

Builds a Lightning checkpoint with the released model's every key and shape from random numbers
(`full_size.json` of the reference vectors; 2.8 GB of UNet twice, raw and EMA), imports it with the command in
float32 and in float16, opens each bundle with the engine and runs one UNet step. Each part is a process of
its own, whose peak memory is reported. All files are removed afterwards unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import describe_machine

PRECISIONS = ("fp32", "fp16", "fp16-compute")
PARITY = Path(os.environ.get("BACKLINE_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", type=Path, default=PARITY / "full_size.json")
    parser.add_argument("--folder", type=Path, help="for 20 GB of files; default: a temporary one")
    parser.add_argument("--frames", type=int, default=256, help="latent frames of the step; a window has 256")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16"], choices=PRECISIONS)
    parser.add_argument("--torch", action="store_true", help="time the same step in torch, too")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results/full_size.json"))
    parser.add_argument("--part", choices=["build", "step", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "build":
        build_checkpoint(args.layout, args.path)
    elif args.part == "step":
        print(json.dumps(run_step(args.path, args.frames)))
    elif args.part == "torch":
        print(json.dumps(run_torch_step(args.path, args.layout, args.frames)))
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="backline-full-size.", dir=args.folder))
    report: dict[str, Any] = {"what": "the released size, random weights", "machine": describe_machine()}
    try:
        checkpoint = folder / "last.ckpt"
        report["build"] = _child(_self("build", checkpoint, args))
        del report["build"]["output"]
        report["build"]["gigabytes"] = round(checkpoint.stat().st_size / 1e9, 2)
        for precision in args.precisions:
            bundle = folder / precision
            command = ["import", str(checkpoint), "--config", str(args.layout), "--out", str(bundle)]
            row = _child([sys.executable, "-m", "bridge.cli", *command, "--precision", precision, "--json"])
            answer = json.loads(row.pop("output"))
            assert answer["status"] == "done", answer
            row["gigabytes"] = {p.name: round(p.stat().st_size / 1e9, 3) for p in sorted(bundle.iterdir())}
            expected = {checkpoint.name, *args.precisions}
            row["left_behind"] = sorted(p.name for p in folder.iterdir() if p.name not in expected)
            manifest = json.loads((bundle / "manifest.json").read_text())
            row["relative_error"] = manifest["provenance"]["export"]["relative_error"]
            step = _child(_self("step", bundle, args))
            row["step"] = json.loads(step.pop("output")) | step
            report[precision] = row
            if not args.keep:
                shutil.rmtree(bundle)
        if args.torch:
            step = _child(_self("torch", checkpoint, args))
            report["torch_step"] = json.loads(step.pop("output")) | step
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, a column per precision."""
    precisions = [name for name in PRECISIONS if name in report]
    parts = [report[name] for name in precisions]
    machine = report["machine"]
    rows = [
        ("bundle on disk", [f"{sum(part['gigabytes'].values()):.1f} GB" for part in parts]),
        ("import: peak memory", [f"{part['peak_gib']} GiB" for part in parts]),
        ("import: time", [f"{part['seconds']:.0f} s" for part in parts]),
        ("left behind by the import", [", ".join(part["left_behind"]) or "nothing" for part in parts]),
        ("UNet against torch", [f"{part['relative_error']['unet']:.1e}" for part in parts]),
        ("opening the bundle", [f"{part['step']['open_seconds']} s" for part in parts]),
        ("one UNet step", [" and ".join(f"{s} s" for s in part["step"]["step_seconds"]) for part in parts]),
        ("running: peak memory", [f"{part['step']['peak_gib']} GiB" for part in parts]),
    ]
    lines = ["| | " + " | ".join(precisions) + " |", "|---|" + "---|" * len(precisions)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    about = (
        f"A checkpoint of the released size with random weights ({report['build']['gigabytes']} GB: raw and "
        f"EMA UNet, VAE, vocoder), on {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB; load average {machine['load_average'][0]} as it began. "
        f"ONNX Runtime {machine['onnxruntime']}, torch {machine['torch']}."
    )
    if "torch_step" in report:
        steps = " and ".join(f"{s} s" for s in report["torch_step"]["step_seconds"])
        lines += ["", f"The same step in torch, float32: {steps}."]
    return "\n".join([about, "", *lines, ""])


def build_checkpoint(layout: Path, path: Path) -> None:
    """Every key of the layout, filled so that activations neither vanish nor explode."""
    import torch

    torch.manual_seed(0)
    described = json.loads(layout.read_text())
    state: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in described["state_dict"].items():
        kind = getattr(torch, dtype)
        tensor = torch.empty(shape, dtype=kind)
        if not kind.is_floating_point:
            tensor.zero_()
        elif len(shape) > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.fill_(1.0 if name.endswith(("weight", "scale_factor")) else 0.0)
        state[name] = tensor
    config = described["config"]
    line = torch.linspace(
        config["linear_start"] ** 0.5, config["linear_end"] ** 0.5, config["timesteps"]
    ).double()
    state["alphas_cumprod"] = torch.cumprod(1 - line**2, 0).float()
    torch.save({"epoch": 0, "global_step": 0, "state_dict": state}, path)


def run_step(bundle: Path, frames: int) -> dict[str, Any]:
    """Open the bundle with the engine and predict twice; the first time settles memory."""
    import numpy as np

    from engine.model import Model

    started = time.perf_counter()
    model = Model.open(bundle, "cpu")
    opened = time.perf_counter() - started
    stems, z, _, f = model.manifest.latent_shape
    x = np.random.default_rng(0).standard_normal((1, stems, z, frames, f), np.float32)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        prediction = model.predict(x, 500, {})
        seconds.append(round(time.perf_counter() - started, 1))
    assert prediction.shape == x.shape and np.isfinite(prediction).all()
    return {
        "frames": frames,
        "provider": model.provider,
        "open_seconds": round(opened, 1),
        "step_seconds": seconds,
    }


def run_torch_step(checkpoint: Path, layout: Path, frames: int) -> dict[str, Any]:
    import torch

    from engine.model import available_cores
    from export.checkpoint import open_checkpoint
    from export.import_checkpoint import read_unet
    from export.reference_config import read_config
    from export.tensor_source import Source

    torch.set_num_threads(available_cores())
    config = read_config(layout)
    with open_checkpoint(checkpoint) as opened:
        unet = read_unet(Source(opened, opened.tensors("state_dict")), config, "ema")
    x = torch.randn(1, config.unet.stems, config.vae.latent_channels, frames, config.frequency)
    film = torch.zeros(1, config.unet.film_dim or 0)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            unet(x, torch.tensor([500]), film)
        seconds.append(round(time.perf_counter() - started, 1))
    return {"frames": frames, "step_seconds": seconds}


def _self(part: str, path: Path, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "bench.full_size", "--part", part, "--path", str(path)]
    return [*command, "--layout", str(args.layout), "--frames", str(args.frames)]


def _child(command: list[str]) -> dict[str, Any]:
    """Run a command; its output, seconds and peak memory in GiB. It must succeed."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return {
        "output": output,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
