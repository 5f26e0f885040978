"""One training loop for every network: resumable, timed, logged, with a report and curves."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

Logs = dict[str, float]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast one network is trained, and where it is kept."""

    out: Path
    minutes: float  # training time in all, over every resumption; the rate decays with it
    lr: float = 1e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    validate_every: float = 180.0  # s; checkpoints are written then too
    device: str = "cpu"
    muon: bool = False  # see `make_optimisers`


MUON_DECAY = 0.05  # weight decay of what Muon moves


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 where it is faster: on a GPU, and on processors that multiply it faster than float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu" or _bfloat16_is_faster())


@functools.cache
def _bfloat16_is_faster() -> bool:
    """Measured on one product of the UNet's; some processors have bfloat16 and are slower in it."""
    seconds = {}
    for kind in (torch.float32, torch.bfloat16):
        x, weight = (torch.ones(n, 352, dtype=kind) for n in (1728, 1056))
        nn.functional.linear(x, weight)
        started = time.perf_counter()
        for _ in range(5):
            nn.functional.linear(x, weight)
        seconds[kind] = time.perf_counter() - started
    return seconds[torch.bfloat16] < seconds[torch.float32]


def add_arguments(parser: argparse.ArgumentParser, lr: float) -> None:
    """The options every training command shares."""
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/ and val/ of training.render"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, log and report; resumes"
    )
    parser.add_argument(
        "--minutes", type=float, required=True, help="training time in all; the rate decays with it"
    )
    parser.add_argument("--batch", type=int, default=16, help="windows a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="highest learning rate (%(default)s)")
    parser.add_argument(
        "--ema",
        type=float,
        default=LoopConfig.ema,
        help="of the averaged weights, the share a step keeps; less for a short run (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: all")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (%(default)s)"
    )


def loop_config(args: argparse.Namespace, validate_every: float = LoopConfig.validate_every) -> LoopConfig:
    """The LoopConfig of parsed arguments; also sets the number of threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return LoopConfig(
        args.out, args.minutes, args.lr, ema=args.ema, validate_every=validate_every, device=args.device
    )


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Warm-up by step, constant, then a cosine to 2 % over the last third of the time."""
    warm = min(1.0, (step + 1) / config.warmup)
    tail = max(0.0, (progress - 0.67) / 0.33)
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, tail))))


def join_workers() -> int:
    """Which of torchrun's processes this is, 0 where it was not used; `train` then takes its steps with all.

    Each draws a batch of its own, so seed its draws with the number, but torch alike, for the new weights.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def train(
    model: Network,
    loss: Callable[[Network, int], tuple[torch.Tensor, Logs]],
    config: LoopConfig,
    validate: Callable[[Network], Logs],
) -> Network:
    """Trains `model` until the time is up and returns its EMA; `checkpoint.pt` in `config.out` resumes.

    `loss(model, step)` returns the scalar to minimise and what to log, `validate(ema)` what the report shows.
    Every `config.validate_every` seconds and at the end the checkpoint is written, a line is added to
    `log.jsonl` and `curves.png` is drawn. The random state is not kept: a resumed run starts the seed's draws
    again. After `join_workers` all move by the mean of their gradients; the first keeps the time, and writes
    and logs for itself. Raises RuntimeError where the loss is not finite, or workers were not joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise RuntimeError("this network is trained by one process; start it without torchrun")
    if dist.is_initialized():
        torch.manual_seed(torch.initial_seed() + dist.get_rank())  # the same new weights, noise of their own
    config.out.mkdir(parents=True, exist_ok=True)
    model.to(config.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimisers = make_optimisers(model, config)
    step, spent = _resume(config, model, ema, optimisers)
    first = 0 if optimisers[0].state else step  # weights without their optimiser's state are warmed up again
    begun = round(spent / 60, 2)
    first_worker = _is_first()
    bar = tqdm(
        total=config.minutes,
        initial=begun,
        unit="min",
        desc=config.out.name,
        mininterval=5,
        disable=not first_worker,
    )
    window: list[Logs] = []
    last = time.monotonic()
    next_validation = spent + config.validate_every
    while spent < config.minutes * 60:
        rate = learning_rate(config, step - first, spent / (config.minutes * 60))
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = rate
        value, logs = loss(model, step)
        if not torch.isfinite(value):
            raise RuntimeError(f"the loss is {value.item()} at step {step}; lower --lr or start again")
        model.zero_grad(set_to_none=True)
        value.backward()
        _share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimiser in optimisers:
            optimiser.step()
        _average(ema, model, min(config.ema, (1 + step) / (10 + step)))
        step += 1
        window.append({"loss": value.item(), **logs})
        now = time.monotonic()
        spent, last = _of_the_first(spent + now - last), now
        bar.n = round(min(spent / 60, config.minutes), 2)
        bar.update(0)
        if spent >= next_validation or spent >= config.minutes * 60:
            if first_worker:
                _report(config, step, spent, window, validate(ema), bar)
                _save(config, model, ema, optimisers, step, spent)
            window, next_validation, last = [], spent + config.validate_every, time.monotonic()
    bar.close()
    return ema


def make_optimisers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything; with config.muon only for what is not the matrix of a linear layer.

    Those take Muon's steps then (Jordan and others 2024, "Muon: an optimizer for hidden layers in neural
    networks"), as large as AdamW's, so one rate serves both (Liu and others 2025, arXiv:2502.16982).
    """
    matrices: list[torch.Tensor] = []
    if config.muon:
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=MUON_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def _share_gradients(model: nn.Module) -> None:
    """Gives every worker the mean of all their gradients."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    shared = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(shared, gradients, strict=True)])


def _of_the_first(seconds: float) -> float:
    """The first worker's: all stop, and lower their rates, at the same step."""
    if not dist.is_initialized():
        return seconds
    told = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(told, 0)
    return told.item()


def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def _resume(
    config: LoopConfig, model: nn.Module, ema: nn.Module, optimisers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    path = config.out / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=config.device, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    if "optimisers" in state:  # training.from_bundle has none
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
    return state["step"], state["spent"]


def _save(
    config: LoopConfig,
    model: nn.Module,
    ema: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "spent": spent,
    }
    write_checkpoint(state, config.out)


def write_checkpoint(state: dict[str, Any], out: Path) -> None:
    """checkpoint.pt of a training folder; the one before is there until this one is whole."""
    temporary = out / "checkpoint.tmp"
    torch.save(state, temporary)
    temporary.replace(out / "checkpoint.pt")


def give_weights(out: Path, weights: dict[str, torch.Tensor]) -> None:
    """Puts these weights over those of the same names in a training folder, if it has a checkpoint.

    After `join_workers` the first one does, and the others wait for it.
    """
    path = out / "checkpoint.pt"
    if path.exists() and _is_first():
        state = torch.load(path, map_location="cpu", weights_only=True)
        for kind in ("model", "ema"):
            state[kind].update(weights)
        write_checkpoint(state, out)
    if dist.is_initialized():
        dist.barrier()


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _report(
    config: LoopConfig, step: int, spent: float, window: list[Logs], validation: Logs, bar: tqdm
) -> None:
    row = means(window)
    row |= {f"val_{k}": v for k, v in validation.items()}
    row |= {"step": step, "minutes": spent / 60}
    with (config.out / "log.jsonl").open("a") as log:
        log.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")
    bar.write(" ".join(f"{k}={v:.4g}" for k, v in sorted(row.items())))
    draw_curves(config.out)


def means(rows: list[Logs]) -> Logs:
    """The mean of each figure over the rows that have it."""
    values = {k: [row[k] for row in rows if k in row] for k in sorted({k for row in rows for k in row})}
    return {k: sum(v) / len(v) for k, v in values.items()}


def draw_curves(out: Path) -> None:
    """curves.png: every logged figure against training time, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = sorted({k for row in rows for k in row} - {"step", "minutes"})
    figure, axes = plt.subplots(-(-len(keys) // 3), 3, figsize=(12, 2.6 * -(-len(keys) // 3)), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        points = [(row["minutes"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), marker=".", linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("minutes", fontsize=8)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    figure.suptitle(out.name)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


@contextlib.contextmanager
def fixed_draws() -> Iterator[np.random.Generator]:
    """A generator for what validation draws, and torch's own set, so that each draws the same noise."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield np.random.default_rng(7)


def load_ema(out: Path, model: Network) -> Network:
    """`model` with the averaged weights of a training folder, frozen. Raises FileNotFoundError."""
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["ema"])
    return model.eval().requires_grad_(False)


def blend(network: Network, other: Network, share: float) -> Network:
    """`network` with that share of `other`'s weights, in place.

    Between weights and what a training made of them lie such that forget less of what the first could do and
    keep most of what was learnt (Wortsman and others, 2022, "Robust fine-tuning of zero-shot models").
    """
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, share)
    return network
