"""python -m training.train_decoder: the VAE's decoder, trained on against a critic.

What the sampler ends with is the mean of what may be there, and a decoder that is asked for the nearest mel
makes of it a blur that is too quiet. So it learns from the latents that the UNet's last distilled steps land
on when they start from true ones, with three errors: the distance to the true mel, that of its levels at
several resolutions, and what a critic says that has heard true mels (hinge loss, Lim & Ye 2017, "Geometric
GAN"), weighed as in Esser and others 2021, "Taming transformers", equation 7. Beside these it learns from
true latents, as they are or with a little noise, so that it keeps what it could, from basses once more, and
from sounds that are held: a decoder that writes four frames at a time draws a faint pattern in them, which is
heard as a hum of 21.5 Hz on whatever does not change by itself. Encoder and UNet stay as they are.

With --keep-made nothing new is learned of what the sampler leaves: what the decoder made of it at the start
is its target, and there is no critic (Li & Hoiem 2016, "Learning without forgetting"). So it takes up sounds
that it did not know, and plays what is generated as it did.
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from engine.schedule import make_schedule
from export.patch_vae import Decoder, PatchVAE
from export.stem_unet import StemUNet
from training.dataset import FRAMES, draw, load_songs
from training.distill import HARMONY_GUIDANCE, SHARES, STEPS, distilled, euler, make_table
from training.loop import (
    Logs,
    add_arguments,
    blend,
    fixed_draws,
    join_workers,
    load_ema,
    loop_config,
    means,
    mixed_precision,
    train,
)
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
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
from training.train_vae import PITCHED, how_loud, reconstruction

STARTS = (1, 2, 3)  # places in the distilled steps: from there noisy true latents are sampled to the end
REPEATS = 10  # the UNet's steps cost more than the decoder's: each landing is taken about ten times,
KEPT = 64  # and at random from the last ones,
CROP = 32  # so many latent frames of it each time,
ROWS = 10  # and so many stems that were made;
WINDOWS = 3  # beside those of so many windows, and as many more that are held, as they are known,
BASSES = 12  # and basses of more: their lowest notes differ only in a few bands, and are seldom played;
NOISY = 0.5  # a share of what is known gets noise,
NOISE = 0.8  # of up to this deviation: what many short steps leave is not exact either
SLOWED = 16  # times, to hold what sounds
LEVELS = ((4, 1), (16, 8), (64, GEOMETRY.n_mels))  # frames and bands over which magnitudes are averaged
LEVEL_WEIGHT = 0.5
CRITIC_PACE = 0.05  # of its error, so that its gradients are no larger than the decoder's
CRITIC_SHARE = 2.5  # of a sure critic's pull on a mel, against that of the distance to the true one
# Of each kind, the weight of its distance and of that of its changes: errors of what is known are small, and
# are heard; what was made need not move as the true stem did, but what is kept does as it did.
WEIGHTS = {
    "made": (1.0, 0.0),
    "known": (1.5, 0.3),
    "held": (1.0, 1.0),
    "basses": (2.0, 0.0),
    "kept": (1.5, 0.5),
}
AUDIBLE = 0.3  # above the floor: what the critic hears, as stored mels end at the floor and estimates near it
UNEVEN = 0.1  # deviation of noise on what the critic hears: stored mels have steps
SCALE = 2.0  # log mels are divided by it
WIDTHS = (16, 32, 64, 64)
BASS = STEMS.index("bass")
SOUNDING = -3.0  # a stem whose loudest band is above that plays

Scores = tuple[torch.Tensor, torch.Tensor]  # of patches of mels, fine and coarse ones


class Critic(nn.Module):
    """mel (N, 1, frames, bands), natural log -> scores of patches, fine ones and coarse ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = (self._layers() for _ in range(2))

    @staticmethod
    def _layers() -> nn.ModuleList:
        sizes = (2, *WIDTHS)
        steps = [nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(sizes)]
        return nn.ModuleList(weight_norm(layer) for layer in [*steps, nn.Conv2d(sizes[-1], 1, 3, padding=1)])

    def forward(self, mel: torch.Tensor) -> Scores:
        heard = mel.clamp_min(FLOOR + AUDIBLE) + UNEVEN * torch.randn_like(mel)
        heard = (heard - FLOOR) / SCALE
        place = torch.linspace(-1, 1, mel.shape[-1], device=mel.device).expand_as(heard)
        fine = torch.cat([heard, place], 1).contiguous(memory_format=torch.channels_last)
        return self._scores(self.fine, fine), self._scores(self.coarse, F.avg_pool2d(fine, 2))

    @staticmethod
    def _scores(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for layer in layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return layers[-1](x).float()


class Rivals(nn.Module):
    """A decoder and its critic, which learn side by side."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.critic = Critic()


class Pairs(NamedTuple):
    """Latents (N, Z, T, 1) of single stems and their true mels (N, 1, frames, mels)."""

    latents: torch.Tensor
    mels: torch.Tensor


@dataclass(frozen=True)
class Landing:
    """Latents (N, Z, T, 1) of single stems as the sampler leaves them, and true mels (N, 1, frames, mels).

    made (N,): not among what was known. asked (N, T): 1 where the true mel is what was asked for.
    """

    latents: torch.Tensor
    mels: torch.Tensor
    made: torch.Tensor
    asked: torch.Tensor

    def crop(self, rng: np.random.Generator) -> Pairs:
        """CROP latent frames of up to ROWS stems that were made, of none that rests although it was asked to
        play."""
        start = int(rng.integers(self.latents.shape[2] - CROP + 1))
        span = slice(start, start + CROP)
        frames = slice(start * LATENT_FRAMES, (start + CROP) * LATENT_FRAMES)
        rows = torch.nonzero(self.made & (self.asked[:, span].amin(1) > 0))[:, 0]
        few = rows[rng.permutation(len(rows))[:ROWS]]
        return Pairs(self.latents[few][:, :, span], self.mels[few][:, :, frames])


@torch.no_grad()
def exact(vae: PatchVAE, mels: torch.Tensor) -> Pairs:
    """What the VAE hears in mels (N, 1, frames, mels)."""
    return Pairs(vae.moments(mels)[0], mels)


@torch.no_grad()
def as_before(decoder: Decoder, pairs: Pairs) -> Pairs:
    """The same latents with what that decoder makes of them in place of the true mels."""
    return Pairs(pairs.latents, decoder(pairs.latents))


def noisy(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    """The same with noise on the latents of a share of NOISY, of deviations up to NOISE."""
    count = len(pairs.latents)
    deviation = torch.from_numpy(rng.uniform(0, NOISE, count) * (rng.random(count) < NOISY)).float()
    noise = deviation.to(pairs.latents.device)[:, None, None, None] * torch.randn_like(pairs.latents)
    return Pairs(pairs.latents + noise, pairs.mels)


def held(mels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mels (B, S, frames, mels) of stems -> (N, 1, frames, mels) of the pitched ones, SLOWED times as slow.

    Each window is heard from a random frame on. Stems that rest there are left out.
    """
    frames = mels.shape[2]
    short = frames // SLOWED
    start = int(rng.integers(frames - short + 1))
    part = mels[:, PITCHED, start : start + short].flatten(0, 1)
    slow = F.interpolate(part.transpose(1, 2), frames, mode="linear", align_corners=True).transpose(1, 2)
    return slow[slow.amax((1, 2)) > SOUNDING][:, None]


@torch.no_grad()
def land(unet: StemUNet, batch: Batch, start: int, alphas: torch.Tensor, scale: float) -> Landing:
    """The distilled steps from place `start` of STEPS to the end, of the batch's true latents made noisy."""
    table = make_table(STEPS, batch.latents.device)
    x = table.alpha[start] * batch.latents + table.noise[start] * torch.randn_like(batch.latents)
    clean = euler(distilled(unet, batch, alphas), x, table, start)
    known = batch.inputs["context_mask"].mean(2) > 0.99
    asked = (batch.loss_mask > 0).float()
    return Landing(
        clean.flatten(0, 1) / scale,
        batch.mels.flatten(0, 1)[:, None],
        ~known.flatten(),
        asked.flatten(0, 1),
    )


def level_error(estimate: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
    """L1 of the logarithms of magnitudes averaged over LEVELS: a median guess of bands is too low."""
    errors = []
    for size in LEVELS:
        mine, true = (F.avg_pool2d(x.exp(), size).log() for x in (estimate, mel))
        errors.append((mine - true).abs().mean())
    return torch.stack(errors).mean()


def critic_error(unreal: Scores, real: Scores) -> torch.Tensor:
    """Hinge loss, the mean of both resolutions: 2 where the critic cannot tell, 0 where it surely can."""
    errors = [F.relu(1 - b).mean() + F.relu(1 + a).mean() for a, b in zip(unreal, real, strict=True)]
    return torch.stack(errors).mean()


def change_error(estimate: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
    """L1 of the changes from frame to frame, weighed by loudness."""
    weight = how_loud(mel[:, :, 1:])
    return ((estimate.diff(dim=2) - mel.diff(dim=2)).abs() * weight).sum() / weight.sum().clamp_min(1e-6)


def distance(estimates: dict[str, torch.Tensor], mels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Logs]:
    """What the decoder minimises without a critic: `reconstruction` and changes of each kind, and levels."""
    logs = {"levels": level_error(torch.cat([*estimates.values()]), torch.cat([*mels.values()]))}
    error = LEVEL_WEIGHT * logs["levels"]
    for name in estimates:
        if not len(mels[name]):
            continue
        near, moving = WEIGHTS[name]
        logs[name] = reconstruction(estimates[name], mels[name])
        error = error + near * logs[name]
        if moving:
            logs[f"{name}_changes"] = change_error(estimates[name], mels[name])
            error = error + moving * logs[f"{name}_changes"]
    return error, {name: value.item() for name, value in logs.items()}


def rivals_loss(rivals: Rivals, given: dict[str, Pairs], device: str) -> tuple[torch.Tensor, Logs]:
    """The decoder's errors, which do not move the critic, and the critic's, which do not move the decoder.

    given: pairs of kinds of WEIGHTS. What was made has a critic. Its pull is measured on the mel, so that
    how steep it is does not matter, and counts by how well it can tell.
    """
    mels = {name: pairs.mels for name, pairs in given.items()}
    with mixed_precision(device):
        estimate = rivals.decoder(torch.cat([pairs.latents for pairs in given.values()])).float()
    parts = estimate.split([len(mel) for mel in mels.values()])
    estimates = dict(zip(given, parts, strict=True))
    error, logs = distance(estimates, mels)
    if not len(mels.get("made", ())):
        # every worker of `train` has to have a gradient of each weight
        return error + 0 * sum(weight.sum() for weight in rivals.critic.parameters()), logs
    made, true = estimates["made"], mels["made"]
    shown = made.detach().requires_grad_(True)
    with mixed_precision(device):
        unreal, real = rivals.critic(shown), rivals.critic(true)
    told_apart = critic_error(unreal, real)
    pull = torch.autograd.grad(-(unreal[0].mean() + unreal[1].mean()), shown, retain_graph=True)[0]
    other = torch.autograd.grad(error, made, retain_graph=True)[0]
    skill = (1 - told_apart.detach() / 2).clamp_min(0)
    pull = pull * (CRITIC_SHARE * skill * other.norm() / pull.norm().clamp_min(1e-9))
    logs |= {"critic": told_apart.item(), "skill": skill.item()}
    return error + (made * pull).sum() + CRITIC_PACE * told_apart, logs


def compare(decoder: Decoder, given: Landing) -> Logs:
    """Errors on what was known and on what was made; how much quieter that is than the true stems, in dB, and
    how much rougher its mel: the deviation of its second differences over time, as a ratio."""
    made = given.made & (given.asked.amin(1) > 0)
    logs = {}
    for name, rows in (("known", ~given.made), ("made", made)):
        estimate, mel = decoder(given.latents[rows]), given.mels[rows]
        logs[f"l1_{name}"] = (estimate - mel).abs().mean().item()
        logs[f"levels_{name}"] = level_error(estimate, mel).item()
    sounding = mel.amax((1, 2, 3)) > SOUNDING
    mine, true = estimate[sounding], mel[sounding]
    power = [x.exp().square().mean((1, 2, 3)).log10() * 10 for x in (mine, true)]
    rough = [x.clamp_min(FLOOR + AUDIBLE).diff(n=2, dim=2).std() for x in (mine, true)]
    return logs | {
        "quieter_db": (power[1] - power[0]).median().item(),
        "roughness": (rough[0] / rough[1]).item(),
    }


def compare_held(decoder: Decoder, given: Pairs) -> Logs:
    """Error on what is held, and the deviation of the pattern that each patch repeats in it."""
    error = decoder(given.latents) - given.mels
    repeated = error.unflatten(2, (-1, LATENT_FRAMES)).mean(2)
    pattern = repeated - repeated.mean(2, keepdim=True)
    return {"l1_held": error.abs().mean().item(), "pattern": pattern.square().mean().sqrt().item()}


def with_decoder(vae: PatchVAE, run: Path, share: float = 1.0) -> PatchVAE:
    """The VAE, in place, with that share of a folder's averaged weights in its decoder."""
    trained = load_ema(run, Rivals(copy.deepcopy(vae.decoder))).decoder
    blend(vae.decoder, trained, share)
    return vae


def sampler_of(runs: Path, frozen: Frozen) -> StemUNet:
    """The distilled UNet of a folder of `training.distill`, with its harmony's guidance."""
    sizes = replace(unet_config(frozen), harmony_guidance=HARMONY_GUIDANCE, distilled=SCHEDULE.steps)
    return load_ema(runs / "distilled", StemUNet(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=1e-3)
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder with vae/, towers/, unet/ and distilled/"
    )
    parser.add_argument("--loaders", type=int, default=1, help="processes that draw and encode windows")
    parser.add_argument(
        "--keep-made", action="store_true", help="what is generated stays as runs/vae makes it; no critic"
    )
    args = parser.parse_args()
    worker = join_workers()
    config = loop_config(args)
    rng = np.random.default_rng([args.seed, int(args.minutes * 100), worker])
    torch.manual_seed(args.seed)
    held_out, songs = load_songs(args.data / "val"), load_songs(args.data / "train")
    frozen = freeze(args.runs / "vae", args.runs / "towers", args.runs / "unet" / STATISTICS, songs)
    alphas = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float().to(args.device)
    unet = sampler_of(args.runs, frozen).to(args.device)
    stream = BatchStream(args.data / "train", frozen, args.batch, args.seed + worker, shares=SHARES)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=args.loaders))
    landings: deque[Landing] = deque(maxlen=KEPT)
    began_as = copy.deepcopy(frozen.vae).to(args.device)

    def landing_of(batch: Batch, rng: np.random.Generator) -> Landing:
        start = STARTS[int(rng.integers(len(STARTS)))]
        return land(unet, batch.to(args.device), start, alphas, frozen.scale)

    def loss(network: Rivals, step: int) -> tuple[torch.Tensor, Logs]:
        if step % REPEATS == 0 or not landings:
            landings.append(landing_of(next(batches), rng))
        windows = draw(songs, 2 * WINDOWS + BASSES, rng, frames=CROP * LATENT_FRAMES).mels.to(args.device)
        known = exact(began_as, windows[:WINDOWS].flatten(0, 1)[:, None])
        made = landings[int(rng.integers(len(landings)))].crop(rng)
        given = {
            "known": noisy(known, rng),
            "held": exact(began_as, held(windows[WINDOWS : 2 * WINDOWS], rng)),
            "basses": exact(began_as, windows[-BASSES:, BASS][:, None]),
        }
        if args.keep_made:
            given["kept"] = as_before(began_as.decoder, made)
        else:
            given["made"] = made
        return rivals_loss(network, given, args.device)

    @torch.no_grad()
    def validate(network: Rivals) -> Logs:
        with fixed_draws() as generator:
            rows = []
            for _ in range(3):
                windows = draw(held_out, 8, generator, augment=False, frames=FRAMES // 2)
                batch = make_batch(windows, frozen, generator, shares=SHARES)
                rows.append(compare(network.decoder, landing_of(batch, generator)))
                steady = exact(began_as, held(windows.mels[:, :, : CROP * LATENT_FRAMES], generator))
                rows.append(compare_held(network.decoder, steady))
        return means(rows)

    rivals = Rivals(frozen.vae.decoder.requires_grad_(True)).to(args.device)
    print("before:", {k: round(v, 4) for k, v in validate(rivals).items()}, flush=True)
    train(rivals, loss, config, validate)


if __name__ == "__main__":
    main()
