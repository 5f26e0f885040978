"""python -m bench.feature_reuse: is a step that keeps the last one's attention worth what it saves?

In every second step the default UNet takes the level below from the step before (as DeepCache does, Ma and
others 2024), in torch. Fills of held-out windows are compared, as log mels, with those of many whole steps;
the cost is counted in whole steps, by FLOPs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.quality_curve import FIRST_SEED
from engine.features import log_mel
from engine.model import Model
from engine.samplers import SAMPLERS
from export.stem_unet import StemUNet
from training.from_bundle import read_unet
from training.held_out import Window, held_out_windows

Array = np.ndarray[Any, Any]


class Reusing(StemUNet):
    """Its level below is computed in every `every`-th call only."""

    every, calls = 1, 0
    kept: torch.Tensor

    def attended(
        self, h: torch.Tensor, cond: torch.Tensor, far: torch.Tensor, weak: torch.Tensor | None
    ) -> torch.Tensor:
        if self.calls % self.every == 0:
            self.kept = super().attended(h, cond, far, weak)
        self.calls += 1
        return self.kept


def fill_latents(model: Model, unet: Reusing, window: Window, armed: int, steps: int, every: int) -> Array:
    """(Z, T, F) of one armed stem, the others' latents given; from the same noise whatever the steps."""
    manifest = model.manifest
    stems, channels, length, freq = manifest.latent_shape
    size = manifest.window_samples
    latents = model.encode(log_mel(window.stems[:, :size].astype(np.float32), manifest.mel))
    mask = np.ones((1, stems, length), np.float32)
    mask[:, armed] = 0
    conditions = {"context": latents[None] * mask[..., None, :, None], "context_mask": mask}
    shape = (1, stems, channels, length, freq)
    told = {k: torch.from_numpy(np.array(v)) for k, v in model.condition_inputs(conditions, shape).items()}
    unet.every, unet.calls = every, 0

    def denoise(x: Array, t: int) -> Array:
        with torch.no_grad():
            v = unet(torch.from_numpy(x), torch.tensor([t]), **told).numpy()
        alpha, noise = model.schedule.alpha(t), model.schedule.noise(t)
        return np.asarray(alpha * x - noise * v, np.float32)

    start = np.random.default_rng(window.seed).standard_normal(shape, np.float32)
    return SAMPLERS["dpmpp_2m"](denoise, start, model.schedule, steps=steps)[0, armed]


def step_flops(unet: Reusing, model: Model) -> tuple[float, float]:
    """Of a whole step and of one that keeps the level below."""
    shape = (1, *model.manifest.latent_shape)
    told = {k: torch.from_numpy(np.array(v)) for k, v in model.condition_inputs({}, shape).items()}
    counts = []
    unet.every, unet.calls = 2, 0
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.zeros(shape), torch.tensor([500]), **told)
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


def measure(model: Model, windows: list[Window], counts: list[int], reference: int) -> list[dict[str, float]]:
    """A row per number of steps, whole and with every second one kept: cost and distance to `reference`."""
    plain = read_unet(model.bundle)
    unet = Reusing(plain.config)
    unet.load_state_dict(plain.state_dict())
    unet.eval()
    whole, kept = step_flops(unet, model)
    jobs = [(window, armed) for window in windows for armed in range(len(model.manifest.stems))]

    def played(steps: int, every: int) -> Array:
        return model.decode(np.stack([fill_latents(model, unet, w, s, steps, every) for w, s in jobs]))

    best = played(reference, 1)
    rows = []
    for steps in counts:
        for every in (1, 2):
            cost = steps if every == 1 else -(-steps // 2) + steps // 2 * kept / whole
            apart = float(np.abs(played(steps, every) - best).mean() * 20 / np.log(10))
            rows.append({"steps": steps, "every": every, "cost": cost, "distance_db": apart})
            print(rows[-1], flush=True)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """One table, cheapest first."""
    lines = [
        f"# Keeping features between steps: {report['model']}",
        "",
        f"Each stem filled in, in {report['windows']} held-out windows. `python -m bench.feature_reuse`.",
        "",
        f"| cost, whole steps | steps | attention | distance to {report['reference']} whole steps, dB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['cost']:.1f} | {row['steps']} | {'in every second' if row['every'] == 2 else 'in each'} "
        f"| {row['distance_db']:.2f} |"
        for row in sorted(report["rows"], key=lambda row: row["cost"])
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("engine/default_bundle"))
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--steps", nargs="+", type=int, default=[6, 8, 12, 16, 24])
    parser.add_argument("--reference", type=int, default=64, help="whole steps that are compared with")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    model = Model.open(args.bundle, "cpu")
    windows = held_out_windows(args.windows, args.grooves, FIRST_SEED)
    rows = measure(model, windows, args.steps, args.reference)
    manifest = model.manifest
    report = {
        "model": f"{manifest.name} {manifest.version}",
        "windows": len(windows),
        "reference": args.reference,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "feature_reuse.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "feature_reuse.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
