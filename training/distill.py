"""python -m training.distill: teaches the UNet to arrive in a few long steps, beside what it can already.

Progressive distillation (Salimans & Ho 2022, section 3) of the trained UNet in one go: each of STEPS long
steps is to land where the UNet itself lands in SUBSTEPS short ones, guided by what it hears and away from a
weakened copy of itself (Meng and others 2023, "On distillation of guided diffusion models"; Karras and
others 2024, "Guiding a diffusion model with a bad version of itself"), so that a step needs one pass.
Timesteps that count on from the schedule's last ask for it (`export.stem_unet.Distilled`); what the UNet does
at the ordinary ones stays as it is.

Several processes: `torchrun --nproc-per-node N -m training.distill --loaders 0`.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine.manifest import Capability, Distilled, Weakened
from engine.schedule import distilled_timesteps, make_schedule
from engine.tasks import HEARD
from export.stem_unet import StemUNet, StemUNetConfig, weakened
from training.dataset import FRAMES, draw, load_songs
from training.loop import (
    Logs,
    add_arguments,
    fixed_draws,
    give_weights,
    join_workers,
    load_ema,
    loop_config,
    means,
    mixed_precision,
    train,
)
from training.stems import STEMS
from training.train_unet import (
    SCHEDULE,
    STATISTICS,
    Batch,
    BatchStream,
    Frozen,
    freeze,
    make_batch,
    unet_config,
)

STEPS = 4
SUBSTEPS = 3
SHARES = {"split": 0.0, "fill": 0.75, "generate": 0.25}
REPEATS = 3  # the teacher's passes cost more than a step, so every lesson is taken about three times,
KEPT = 24  # and at random from the last ones
LISTENING = 1.5  # what fill takes, see `training.bundle --listening`
FIRMER = {"piano": 3.0}  # that of a stem which less leaves vague, and
FREED = ("piano",)  # whose deviation is not brought back: vague latents are the small ones
TAUGHT: dict[Capability, Any] = {  # by capability, what a manifest declares of it
    "distilled": Distilled(steps=STEPS, listening=LISTENING),
    "weakened": Weakened(listening=FIRMER, freed=FREED),
}
HARMONY_GUIDANCE = 3.0  # of the tones, see `training.bundle --harmony-guidance`

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, timesteps (B,)) -> clean latents


@dataclass(frozen=True)
class Table:
    """The noise levels of a sampling path, from noise on: alpha and noise of each (N,), and sigma (N + 1,).

    The last sigma is that of clean latents, 0.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def make_table(steps: int, device: str | torch.device = "cpu") -> Table:
    """`engine.schedule.distilled_timesteps`, from noise on."""
    schedule = make_schedule(SCHEDULE)
    path = distilled_timesteps(schedule, steps)[::-1].copy()
    values = [np.array([f(int(t)) for t in path]) for f in (schedule.alpha, schedule.noise)]
    values.append(np.append(schedule.sigmas[path], 0.0))
    alpha, noise, sigma = (torch.from_numpy(v).float().to(device) for v in values)
    return Table(torch.from_numpy(path).to(device), alpha, noise, sigma)


def wide(x: torch.Tensor) -> torch.Tensor:
    """(B,) against latents (B, S, Z, T, F)."""
    return x[:, None, None, None, None]


def solve(predict: Predict, x: torch.Tensor, table: Table, start: torch.Tensor, count: int) -> torch.Tensor:
    """x / alpha after `count` steps of DPM-Solver++(2M) from each sample's place `start` (B,) in the table.

    As `engine.samplers.sample_dpmpp_2m`, with the first step of first order, and the one to clean.
    """
    scaled = x / wide(table.alpha[start])
    before, step_before = torch.zeros_like(x), torch.ones_like(table.sigma[start])
    for i in range(count):
        place = start + i
        clean = predict(wide(table.alpha[place]) * scaled, table.timesteps[place])
        ratio = table.sigma[place + 1] / table.sigma[place]
        step = -ratio.clamp_min(1e-6).log()
        second = (ratio > 0) & (i > 0)
        ahead = torch.where(second, step / (2 * step_before), 0.0)
        estimate = clean + wide(ahead) * (clean - before)
        scaled = wide(ratio) * scaled + wide(1 - ratio) * estimate
        before, step_before = clean, step
    return scaled


def clean_from(
    model: StemUNet,
    x: torch.Tensor,
    t: torch.Tensor,
    alphas: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    *,
    distilled: bool = False,
) -> torch.Tensor:
    """The clean latents behind v at step t, the ordinary or the distilled one."""
    a, s = wide(alphas[t].sqrt()), wide((1 - alphas[t]).sqrt())
    with mixed_precision(x.device.type):
        return a * x - s * model(x, t + SCHEDULE.steps * distilled, **inputs).float()


def keeping(batch: Batch, clean: torch.Tensor) -> torch.Tensor:
    """Clean latents in which what is known stays."""
    known = batch.inputs["context_mask"][:, :, None, :, None]
    return known * batch.inputs["context"] + (1 - known) * clean


def guided(model: StemUNet, weak: StemUNet, batch: Batch, alphas: torch.Tensor) -> Predict:
    """The UNet, its fills guided as `engine.denoisers.guided` against what `weak` makes of nothing heard.

    weak: `export.stem_unet.weakened` of the model. By LISTENING with the whole rescale, but for the stems
    that FIRMER and FREED name. What is known stays; a band from nothing is as the UNet has it.
    """
    nothing = {k: torch.zeros_like(v) if k in HEARD else v for k, v in batch.inputs.items()}
    fills = (batch.inputs["context_mask"].amax((1, 2)) + batch.inputs["mixture_mask"].amax(1)) > 0
    scales = torch.tensor([FIRMER.get(stem, LISTENING) for stem in STEMS], device=fills.device)
    weight = torch.where(fills[:, None], scales, 1.0)[:, :, None, None, None]
    freed = torch.tensor([stem in FREED for stem in STEMS], device=fills.device)[:, None, None, None]

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told = clean_from(model, x, t, alphas, batch.inputs)
        untold = clean_from(weak, x, t, alphas, nothing)
        pushed = untold + weight * (told - untold)
        deviation, mean = torch.std_mean(pushed, (3, 4), keepdim=True, correction=0)
        kept, at = torch.std_mean(told, (3, 4), keepdim=True, correction=0)
        like = at + (kept / deviation.clamp_min(1e-6)).clamp_max(1.0) * (pushed - mean)
        return keeping(batch, torch.where(freed, pushed, like))

    return predict


def distilled(model: StemUNet, batch: Batch, alphas: torch.Tensor) -> Predict:
    """The UNet at its distilled timesteps; what is known stays."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return keeping(batch, clean_from(model, x, t, alphas, batch.inputs, distilled=True))

    return predict


def euler(predict: Predict, x: torch.Tensor, table: Table, start: int = 0) -> torch.Tensor:
    """Clean latents by Euler's steps from place `start` of the table to its end, as in `engine.samplers`."""
    rows = torch.ones(len(x), dtype=torch.int64, device=x.device)
    for i in range(start, table.steps):
        x = solve(predict, x, table, i * rows, 1)
        x = x * table.alpha[i + 1] if i + 1 < table.steps else x
    return x


@dataclass(frozen=True)
class Lesson:
    """Noisy latents x (B, S, Z, T, F) at timesteps t (B,), and the v by which one long step arrives."""

    batch: Batch
    x: torch.Tensor
    t: torch.Tensor
    v: torch.Tensor


@torch.no_grad()
def make_lesson(
    teacher: StemUNet,
    weak: StemUNet,
    batch: Batch,
    start: torch.Tensor,
    alphas: torch.Tensor,
) -> Lesson:
    """What the teacher's SUBSTEPS steps from place `start` (B,) of STEPS come to, as one step."""
    table = make_table(STEPS * SUBSTEPS, batch.latents.device)
    place = (start * SUBSTEPS).to(batch.latents.device)
    a, s = wide(table.alpha[place]), wide(table.noise[place])
    x = a * batch.latents + s * torch.randn_like(batch.latents)
    arrived = solve(guided(teacher, weak, batch, alphas), x, table, place, SUBSTEPS)
    ratio = wide(table.sigma[place + SUBSTEPS] / table.sigma[place])
    clean = (arrived - ratio * x / a) / (1 - ratio)
    return Lesson(batch, x, table.timesteps[place], (a * x - clean) / s)


def distillation_loss(student: StemUNet, lesson: Lesson, metric: torch.Tensor) -> torch.Tensor:
    """The error of v, weighted as in `train_unet.diffusion_loss`, of what is not known.

    Not of the tones, which the harmony makes.
    """
    batch = lesson.batch
    with mixed_precision(lesson.x.device.type):
        v = student(lesson.x, lesson.t + SCHEDULE.steps, **batch.inputs).float()
    error = v - lesson.v
    error[:, :, error.shape[2] - student.config.tones :] = 0
    error = (torch.einsum("syz,bsztf->bsytf", metric, error) ** 2).mean((2, 4))
    mask = batch.loss_mask * (1 - batch.inputs["context_mask"])
    return ((error * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)).mean()


@torch.no_grad()
def compare(student: StemUNet, teacher: StemUNet, weak: StemUNet, batch: Batch, alphas: torch.Tensor) -> Logs:
    """Relative error of the latents made in STEPS steps, to those of SUBSTEPS times as many guided ones of
    the teacher's from the same noise: distilled, and by the teacher's own STEPS."""
    device = batch.latents.device
    fine, few = (make_table(steps, device) for steps in (SUBSTEPS * STEPS, STEPS))
    noise = torch.randn_like(batch.latents)
    here = torch.zeros(len(noise), dtype=torch.int64, device=device)
    taught = guided(teacher, weak, batch, alphas)

    best = solve(taught, noise, fine, here, fine.steps)
    plain = solve(taught, noise, few, here, few.steps)
    learnt = distilled(student, batch, alphas)
    made = {"distilled": euler(learnt, noise, few), "euler": euler(taught, noise, few), "plain": plain}
    free = 1 - batch.inputs["context_mask"][:, :, None, :, None]
    size = (free * (best - best.mean(3, keepdim=True))).square().sum()
    return {f"apart_{name}": float((free * (x - best)).square().sum() / size) for name, x in made.items()}


def start_from(run: Path, frozen: Frozen) -> tuple[StemUNet, StemUNet]:
    """(student, teacher) with the averaged weights of a UNet's training folder; only the new part learns."""
    sizes = unet_config(frozen)
    teacher = load_ema(run, StemUNet(replace(sizes, harmony_guidance=HARMONY_GUIDANCE)))
    student = StemUNet(replace(sizes, distilled=SCHEDULE.steps))
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.requires_grad_(False)
    assert student.distilled is not None
    student.distilled.requires_grad_(True)
    return student, teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=2e-3)
    parser.add_argument("--runs", type=Path, required=True, help="folder with vae/, towers/ and unet/")
    parser.add_argument("--loaders", type=int, default=1, help="processes that draw and encode windows")
    args = parser.parse_args()
    config = loop_config(args, validate_every=300.0)
    worker = join_workers()
    rng = np.random.default_rng([args.seed, worker])
    torch.manual_seed(args.seed)
    held_out = load_songs(args.data / "val")
    songs = load_songs(args.data / "train")
    frozen = freeze(args.runs / "vae", args.runs / "towers", args.runs / "unet" / STATISTICS, songs)
    alphas = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float().to(args.device)
    student, teacher = start_from(args.runs / "unet", frozen)
    give_weights(args.out, teacher.state_dict())  # it may have been trained on since
    teacher.to(args.device)
    weak = weakened(teacher)
    stream = BatchStream(args.data / "train", frozen, args.batch, args.seed + worker, shares=SHARES)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=args.loaders))

    metric = frozen.metric.to(args.device)
    lessons: deque[Lesson] = deque(maxlen=KEPT)

    def lesson_of(batch: Batch, rng: np.random.Generator) -> Lesson:
        start = torch.from_numpy(rng.integers(0, STEPS, len(batch.splits)))
        return make_lesson(teacher, weak, batch.to(args.device), start, alphas)

    def loss(network: StemUNet, step: int) -> tuple[torch.Tensor, Logs]:
        if step % REPEATS == 0 or not lessons:
            lessons.append(lesson_of(next(batches), rng))
        value = distillation_loss(network, lessons[int(rng.integers(len(lessons)))], metric)
        return value, {"mse": value.item()}

    @torch.no_grad()
    def validate(network: StemUNet) -> Logs:
        with fixed_draws() as generator:
            rows = []
            for _ in range(4):
                windows = draw(held_out, 8, generator, augment=False, frames=FRAMES // 2)
                batch = make_batch(windows, frozen, generator, shares=SHARES)
                error = distillation_loss(network, lesson_of(batch, generator), metric)
                rows.append({"mse": error.item()})
            rows.append(compare(network, teacher, weak, batch.to(args.device), alphas))
        return means(rows)

    sizes: StemUNetConfig = student.config
    print(f"{STEPS} steps of {SUBSTEPS}, width {sizes.width}, {len(songs)} songs", flush=True)
    train(student, loss, config, validate)


if __name__ == "__main__":
    main()
