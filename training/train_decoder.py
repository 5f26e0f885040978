"""python -m training.train_decoder: the VAE's decoder, trained on against a critic.

What the sampler ends with is the mean of what may be there, and a decoder that is asked for the nearest mel
makes of it a blur that is too quiet. So it learns from the latents that the UNet's last distilled steps land
on when they start from true ones, with three errors: the distance to the true mel, that of its levels at
several resolutions, and what a critic says that has heard true mels (hinge loss, Lim & Ye 2017, "Geometric
GAN"), weighed as in Esser and others 2021, "Taming transformers", equation 7. What is known in a window stays
exact, or gets a little noise, so the decoder keeps what it could. Encoder and UNet stay as they are.
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

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
    load_ema,
    loop_config,
    means,
    mixed_precision,
    train,
)
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
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
from training.train_vae import reconstruction

STARTS = (1, 2, 3)  # places in the distilled steps: from there noisy true latents are sampled to the end
REPEATS = 10  # the UNet's steps cost more than the decoder's: each landing is taken about ten times,
KEPT = 64  # and at random from the last ones,
CROP = 32  # so many latent frames of it each time,
ROWS = {True: 10, False: 6}  # and so many stems that were made, and that were known,
NOISY = 0.5  # of which a share gets noise,
NOISE = 0.8  # of up to this deviation: what many short steps leave is not exact either
LEVELS = ((4, 1), (16, 8), (64, GEOMETRY.n_mels))  # frames and bands over which magnitudes are averaged
LEVEL_WEIGHT = 0.5
CRITIC_PACE = 0.05  # of its error, so that its gradients are no larger than the decoder's
CRITIC_SHARE = 2.5  # of a sure critic's pull on a mel, against that of the distance to the true one
KNOWN_WEIGHT = 1.5  # of the distance of what was known: its errors are small, and are heard
AUDIBLE = 0.3  # above the floor: what the critic hears, as stored mels end at the floor and estimates near it
UNEVEN = 0.1  # deviation of noise on what the critic hears: stored mels have steps
SCALE = 2.0  # log mels are divided by it
WIDTHS = (16, 32, 64, 64)

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


@dataclass(frozen=True)
class Landing:
    """Latents (N, Z, T, 1) of single stems as the sampler leaves them, and true mels (N, 1, frames, mels).

    made (N,): not among what was known. asked (N, T): 1 where the true mel is what was asked for.
    """

    latents: torch.Tensor
    mels: torch.Tensor
    made: torch.Tensor
    asked: torch.Tensor

    def crop(self, rng: np.random.Generator) -> Landing:
        """CROP latent frames of up to ROWS stems, but of none that rests although it was asked to play."""
        start = int(rng.integers(self.latents.shape[2] - CROP + 1))
        span = slice(start, start + CROP)
        frames = slice(start * LATENT_FRAMES, (start + CROP) * LATENT_FRAMES)
        asked = self.asked[:, span].amin(1) > 0
        rows = [torch.nonzero(asked & (self.made == made))[:, 0] for made in ROWS]
        few = torch.cat([r[rng.permutation(len(r))[:n]] for r, n in zip(rows, ROWS.values(), strict=True)])
        latents, made = self.latents[few][:, :, span], self.made[few]
        deviation = rng.uniform(0, NOISE, len(few)) * (rng.random(len(few)) < NOISY)
        noise = torch.from_numpy(deviation).float().to(latents.device) * ~made
        latents = latents + noise[:, None, None, None] * torch.randn_like(latents)
        return Landing(latents, self.mels[few][:, :, frames], made, self.asked[few][:, span])


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


def distance(estimate: torch.Tensor, given: Landing) -> tuple[torch.Tensor, Logs]:
    """What the decoder minimises without a critic: `reconstruction` of both kinds of rows, and levels."""
    logs = {"levels": level_error(estimate, given.mels)}
    error = LEVEL_WEIGHT * logs["levels"]
    for name, rows, weight in (("known", ~given.made, KNOWN_WEIGHT), ("made", given.made, 1.0)):
        if rows.any():
            logs[name] = reconstruction(estimate[rows], given.mels[rows])
            error = error + weight * logs[name]
    return error, {name: value.item() for name, value in logs.items()}


def rivals_loss(rivals: Rivals, given: Landing, device: str) -> tuple[torch.Tensor, Logs]:
    """The decoder's errors, which do not move the critic, and the critic's, which do not move the decoder.

    What was made has a critic. Its pull is measured on the mel, so that how steep it is does not matter, and
    counts by how well it can tell.
    """
    with mixed_precision(device):
        estimate = rivals.decoder(given.latents).float()
    error, logs = distance(estimate, given)
    if not given.made.any():
        return error, logs
    shown = estimate[given.made].detach().requires_grad_(True)
    with mixed_precision(device):
        unreal, real = rivals.critic(shown), rivals.critic(given.mels[given.made])
    told_apart = critic_error(unreal, real)
    pull = torch.autograd.grad(-(unreal[0].mean() + unreal[1].mean()), shown, retain_graph=True)[0]
    other = torch.autograd.grad(error, estimate, retain_graph=True)[0][given.made]
    skill = (1 - told_apart.detach() / 2).clamp_min(0)
    pull = pull * (CRITIC_SHARE * skill * other.norm() / pull.norm().clamp_min(1e-9))
    logs |= {"critic": told_apart.item(), "skill": skill.item()}
    return error + (estimate[given.made] * pull).sum() + CRITIC_PACE * told_apart, logs


def compare(decoder: Decoder, given: Landing) -> Logs:
    """Errors on what was known and on what was made; how much quieter that is than the true stems, in dB, and
    how much rougher its mel: the deviation of its second differences over time, as a ratio."""
    made = given.made & (given.asked.amin(1) > 0)
    logs = {}
    for name, rows in (("known", ~given.made), ("made", made)):
        estimate, mel = decoder(given.latents[rows]), given.mels[rows]
        logs[f"l1_{name}"] = (estimate - mel).abs().mean().item()
        logs[f"levels_{name}"] = level_error(estimate, mel).item()
    sounding = mel.amax((1, 2, 3)) > -3
    mine, true = estimate[sounding], mel[sounding]
    power = [x.exp().square().mean((1, 2, 3)).log10() * 10 for x in (mine, true)]
    rough = [x.clamp_min(FLOOR + AUDIBLE).diff(n=2, dim=2).std() for x in (mine, true)]
    return logs | {
        "quieter_db": (power[1] - power[0]).median().item(),
        "roughness": (rough[0] / rough[1]).item(),
    }


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
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng([args.seed, int(args.minutes * 100)])
    torch.manual_seed(args.seed)
    held_out, songs = load_songs(args.data / "val"), load_songs(args.data / "train")
    frozen = freeze(args.runs / "vae", args.runs / "towers", args.runs / "unet" / STATISTICS, songs)
    alphas = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float().to(args.device)
    unet = sampler_of(args.runs, frozen).to(args.device)
    stream = BatchStream(args.data / "train", frozen, args.batch, args.seed, shares=SHARES)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=args.loaders))
    landings: deque[Landing] = deque(maxlen=KEPT)

    def landing_of(batch: Batch, rng: np.random.Generator) -> Landing:
        start = STARTS[int(rng.integers(len(STARTS)))]
        return land(unet, batch.to(args.device), start, alphas, frozen.scale)

    def loss(network: Rivals, step: int) -> tuple[torch.Tensor, Logs]:
        if step % REPEATS == 0 or not landings:
            landings.append(landing_of(next(batches), rng))
        given = landings[int(rng.integers(len(landings)))].crop(rng)
        return rivals_loss(network, given, args.device)

    @torch.no_grad()
    def validate(network: Rivals) -> Logs:
        with fixed_draws() as generator:
            rows = []
            for _ in range(3):
                windows = draw(held_out, 8, generator, augment=False, frames=FRAMES // 2)
                batch = make_batch(windows, frozen, generator, shares=SHARES)
                rows.append(compare(network.decoder, landing_of(batch, generator)))
        return means(rows)

    rivals = Rivals(frozen.vae.decoder.requires_grad_(True)).to(args.device)
    print("before:", {k: round(v, 4) for k, v in validate(rivals).items()}, flush=True)
    train(rivals, loss, config, validate)


if __name__ == "__main__":
    main()
