"""python -m training.train_unet: the multi-track latent diffusion UNet, for every task at once.

Each window is given a task at random: generate (nothing known), fill (some stems known, as context or as
their mixture), split (the mixture of all stems known). Time spans of all stems may be known too, so that
windows join. Text or audio embeddings, tempo grid and chords are each dropped at random, which is what makes
them optional.

Several processes: `torchrun --nproc-per-node N -m training.train_unet --loaders 0`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from engine.manifest import NoiseSchedule
from engine.schedule import make_schedule
from export.caption_towers import CaptionTowers, CaptionTowersConfig
from export.patch_vae import Decoder, PatchVAE, PatchVAEConfig
from export.stem_unet import StemUNet, StemUNetConfig
from training import conditions
from training.captions import Thresholds, describe, encode, load_thresholds
from training.dataset import FRAMES, RenderedSong, Windows, draw, load_songs, mix
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
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES, TONES, WINDOW
from training.stems import STEMS
from training.tasks import draw_tasks, dropped

SCHEDULE = NoiseSchedule(start=0.0015, end=0.0195, steps=1000)
LAST = SCHEDULE.steps - 1
SHARES = {"split": 0.4, "fill": 0.45, "generate": 0.15}
FAVOURING = {"split": 0.25, "fill": 0.65, "generate": 0.1}  # with a favoured stem
FAVOUR = 2.0  # a favoured stem's weight in the loss
LAST_SHARE = 0.85  # of the splits train at the last step, the only one that the mask method uses
STATISTICS = "latents.pt"
MASK_WEIGHT = 0.5
MASK_POWER = 1.0  # softer than a Wiener filter: estimates this uncertain are punished for hard masks
SHORT_SHARE = 0.7  # of the steps train on half windows


@dataclass(frozen=True)
class Frozen:
    """The trained networks a UNet step needs."""

    vae: PatchVAE
    towers: CaptionTowers
    tokenizer: Tokenizer
    thresholds: Thresholds
    scale: float  # latents x scale have unit deviation
    metric: torch.Tensor  # (S, Z, Z), the root of how much an error of a stem's latents weighs


@dataclass(frozen=True)
class Batch:
    """One training batch: clean scaled latents, the network's inputs, and which loss each sample gets."""

    latents: torch.Tensor  # (B, S, Z, T, 1)
    inputs: dict[str, torch.Tensor]
    loss_mask: torch.Tensor  # (B, S, T)
    splits: torch.Tensor  # (B,) bool: the whole mixture is known and nothing else
    mels: torch.Tensor  # (B, S, frames, mels)
    mixture: torch.Tensor  # (B, frames, mels)

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        rest = (self.loss_mask, self.splits, self.mels, self.mixture)
        return Batch(self.latents.to(device), inputs, *(value.to(device) for value in rest))


def freeze(vae_run: Path, towers_run: Path, statistics: Path, songs: list[RenderedSong]) -> Frozen:
    """Loads VAE and towers. The latents' statistics are measured on 64 windows once, kept in `statistics`.

    A scale that is there already, of weights from a bundle, stays.
    """
    vae = load_ema(vae_run, PatchVAE(PatchVAEConfig(mels=GEOMETRY.n_mels, tones=TONES)))
    tokenizer = Tokenizer.from_file(str(towers_run / "tokenizer.json"))
    sizes = CaptionTowersConfig(vocabulary=tokenizer.get_vocab_size(), mels=GEOMETRY.n_mels)
    towers = load_ema(towers_run, CaptionTowers(sizes))
    stored = torch.load(statistics, weights_only=True) if statistics.exists() else {}
    if "metric" not in stored:
        stored = measure_latents(vae, songs, stored.get("scale"))
        statistics.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, statistics)
    return Frozen(vae, towers, tokenizer, load_thresholds(towers_run), stored["scale"], stored["metric"])


def unet_config(frozen: Frozen) -> StemUNetConfig:
    """The default's UNet for these latents and embeddings."""
    vae = frozen.vae.config
    return StemUNetConfig(channels=vae.latents, tones=vae.tones, film=frozen.towers.config.embedding)


def hold_harmony(model: StemUNet, harmony: Path, out: Path) -> None:
    """Gives the model, and what `out` holds of it, the trained harmony of a folder; the rest plays by it.

    It is held as it is: the windows that train the rest, fewer and in one key, made its predictions worse.
    """
    if model.harmony is None:
        raise ValueError("the latents of this VAE name no tones, so the UNet has no harmony")
    load_ema(harmony, model.harmony)
    give_weights(out, {f"harmony.{name}": weight for name, weight in model.harmony.state_dict().items()})


@torch.no_grad()
def measure_latents(vae: PatchVAE, songs: list[RenderedSong], scale: float | None = None) -> dict[str, Any]:
    """scale (one over the deviation where none is given) and metric of `Frozen`, from 64 windows."""
    mels = draw(songs, 64, np.random.default_rng(0)).mels
    mean, _ = vae.moments(mels.flatten(0, 1)[:, None])
    deviation = mean.std((0, 2, 3))
    return {"scale": scale or 1 / float(mean.std()), "metric": error_metric(vae.decoder, deviation, mels)}


def error_metric(decoder: Decoder, deviation: torch.Tensor, mels: torch.Tensor) -> torch.Tensor:
    """(S, Z, Z) upper triangular R, so that |R e|^2 / Z is what an error e of a stem's latents weighs.

    deviation (Z,) of the latents, mels (B, S, frames, bands). Half of the weight follows the channels'
    deviation, which is where loud, slow structure is. Half follows what the decoder's linear layer makes of
    the error in the bands in which the stem is heard, by the root of the magnitude: the harmonics of a bass
    lie in few bands and weak channels, and by deviation alone they were the last thing to be learnt.
    """
    loudness = mels.exp().sqrt().mean((0, 2))
    writing = decoder.linear.weight
    bands = loudness.repeat(1, decoder.config.frames)
    heard = torch.einsum("pz,sp,py->szy", writing, bands, writing)
    heard = heard / heard.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    plain = torch.diag(deviation / deviation.mean())
    return torch.linalg.cholesky((heard + plain) / 2).mT.contiguous()


def make_batch(
    windows: Windows,
    frozen: Frozen,
    rng: np.random.Generator,
    favoured: int | None = None,
    shares: dict[str, float] = SHARES,
) -> Batch:
    """Encodes a batch of windows and draws a task, in these shares, and conditions for each.

    favoured: number of a stem that three of four fills ask for, and whose errors weigh FAVOUR times as much.
    """
    batch, stems, frames, _ = windows.mels.shape
    length = frames // LATENT_FRAMES
    tasks = draw_tasks(batch, length, shares, rng, favoured)
    mixture_mel = windows.mixture.clone()
    parts = torch.from_numpy(tasks.mixed.any(1) & ~tasks.mixed.all(1))
    if parts.any():
        present = torch.from_numpy(tasks.mixed)[parts][:, :, None, None]
        mixture_mel[parts] = mix(torch.where(present, windows.mels[parts], torch.tensor(FLOOR)), rng)
    heard = torch.from_numpy(tasks.mixed.any(1))
    with torch.no_grad(), mixed_precision("cpu"):
        every = torch.cat([windows.mels.flatten(0, 1), mixture_mel[heard]])[:, None]
        mean, _ = frozen.vae.moments(every)
    mean = mean.float() * frozen.scale
    latents = mean[: batch * stems].unflatten(0, (batch, stems))
    mixture = torch.zeros_like(latents[:, 0])
    mixture[heard] = mean[batch * stems :]
    known = torch.from_numpy(tasks.context_mask)
    mixture_mask = heard.float()[:, None].repeat(1, length)
    loss_mask = tasks.loss_mask((windows.mels <= FLOOR + 0.1).flatten(2).all(2).numpy())
    if favoured is not None:
        loss_mask[:, favoured] *= FAVOUR
    heard_chords = conditions.heard_chords(windows, length, rng)
    told = torch.from_numpy(rng.random(batch) < 0.3)[:, None, None]
    inputs = {
        "film": _film(windows, frozen, rng),
        "context": latents * known[:, :, None, :, None],
        "context_mask": known,
        "mixture": mixture * mixture_mask[:, None, :, None],
        "mixture_mask": mixture_mask,
        "mixture_stems": torch.from_numpy(tasks.named).float(),
        "grid": dropped(conditions.grid(windows, length), 0.5, rng),
        "chords": dropped(torch.where(told, conditions.chords(windows, length), heard_chords), 0.3, rng),
    }
    return Batch(latents, inputs, loss_mask, tasks.alone(), windows.mels, windows.mixture)


@torch.no_grad()
def _film(windows: Windows, frozen: Frozen, rng: np.random.Generator) -> torch.Tensor:
    """Half captions, a quarter audio embeddings of the mixture, a quarter the empty text's."""
    captions = describe(windows, frozen.thresholds, rng)
    kind = rng.random(len(captions))
    texts = ["" if k < 0.25 else c for c, k in zip(captions, kind, strict=True)]
    ids, mask = encode(frozen.tokenizer, texts)
    film = frozen.towers.text(ids, mask)
    heard = torch.from_numpy(kind > 0.75)
    if heard.any():
        film[heard] = frozen.towers.audio(windows.mixture[heard][:, None])
    return film


def with_splits(shares: dict[str, float], split: float) -> dict[str, float]:
    """The shares with that one of splits, the others in the proportion they had. Raises ValueError outside
    0 to 1."""
    if not 0 <= split <= 1:
        raise ValueError(f"the share of splits is from 0 to 1, not {split}")
    others = {task: share for task, share in shares.items() if task != "split"}
    return {"split": split} | {
        task: share / sum(others.values()) * (1 - split) for task, share in others.items()
    }


def draw_timesteps(batch: Batch, rng: np.random.Generator, device: str) -> torch.Tensor:
    """(B,) uniform; splits mostly at the last step, where the network predicts the stems' posterior mean."""
    t = torch.from_numpy(rng.integers(0, LAST + 1, len(batch.splits)))
    last = batch.splits.cpu() & torch.from_numpy(rng.random(len(t)) < LAST_SHARE)
    return torch.where(last, LAST, t).to(device)


def diffusion_loss(
    model: StemUNet,
    batch: Batch,
    frozen: Frozen,
    decoder: Decoder,
    t: torch.Tensor,
    alphas: torch.Tensor,
    device: str,
) -> tuple[torch.Tensor, Logs]:
    """v-prediction (Salimans & Ho 2022): x = a x0 + s eps, v = a eps - s x0, weighted by `error_metric`.

    Whole mixtures at the last step are asked for their masks too: there the prediction is a split.
    """
    a = alphas[t].sqrt()[:, None, None, None, None]
    s = (1 - alphas[t]).sqrt()[:, None, None, None, None]
    noise = torch.randn_like(batch.latents)
    x = a * batch.latents + s * noise
    with mixed_precision(device):
        v = model(x, t, **batch.inputs).float()
    error = v - (a * noise - s * batch.latents)
    error = (torch.einsum("syz,bsztf->bsytf", frozen.metric.to(device), error) ** 2).mean((2, 4))
    per_sample = (error * batch.loss_mask).sum((1, 2)) / batch.loss_mask.sum((1, 2)).clamp_min(1)
    loss = per_sample.mean()
    logs = {"mse": loss.item()}
    first = batch.splits & (t == LAST)
    if not batch.splits.all():
        logs["mse_made"] = per_sample[~batch.splits].mean().item()
    if first.any():
        estimate = (a * x - s * v)[first] / frozen.scale
        masked = mask_loss(decoder, estimate, batch.mels[first], batch.mixture[first], device)
        loss = loss + MASK_WEIGHT * masked * first.float().mean()
        logs["mask_db"] = masked.item() * 10 / np.log(10)
        logs["mse_split"] = per_sample[first].mean().item()
    return loss, logs


def mask_loss(
    decoder: Decoder, latents: torch.Tensor, mels: torch.Tensor, mixture: torch.Tensor, device: str
) -> torch.Tensor:
    """Log error-to-signal ratio of what power-ratio masks take from the mixture's mel, per sounding stem."""
    batch, stems = latents.shape[:2]
    with mixed_precision(device):
        decoded = decoder(latents.flatten(0, 1)).float()
    return mask_error(decoded.unflatten(0, (batch, stems))[:, :, 0], mels, mixture, MASK_POWER)


def mask_error(
    estimates: torch.Tensor, mels: torch.Tensor, mixture: torch.Tensor, power: float
) -> torch.Tensor:
    """The same of estimated log mels (B, S, frames, mels), whose magnitudes to `power` make the masks."""
    mask = (estimates * power).softmax(1)
    estimate, truth = mask * mixture[:, None].exp(), mels.exp()
    error = ((estimate - truth) ** 2).sum((2, 3))
    energy = (truth**2).sum((2, 3))
    sounding = (energy > 1e-3 * (mixture.exp() ** 2).sum((1, 2))[:, None]).float()
    ratio = torch.log((error + 1e-6) / (energy + 1e-6)).clamp_min(-4.5)
    return (ratio * sounding).sum() / sounding.sum().clamp_min(1)


class BatchStream(IterableDataset[Batch]):
    """Endless training batches, for loader processes beside the training one."""

    def __init__(
        self,
        data: Path,
        frozen: Frozen,
        batch: int,
        seed: int,
        favoured: int | None = None,
        shares: dict[str, float] = SHARES,
    ) -> None:
        self.data, self.frozen, self.batch, self.seed = data, frozen, batch, seed
        self.favoured, self.shares = favoured, shares

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
        # a resumed run sees other data, and so does every loader
        rng = np.random.default_rng([self.seed, int(time.time()), worker.id if worker else 0])
        while True:
            songs = load_songs(self.data)  # rendering may still be adding songs
            for _ in range(300):
                # half windows cost half, so most steps see twice as many songs
                parts = 2 if rng.random() < SHORT_SHARE else 1
                windows = draw(songs, self.batch * parts, rng, frames=FRAMES // parts)
                yield make_batch(windows, self.frozen, rng, self.favoured, self.shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=6e-4)
    parser.add_argument("--vae", type=Path, required=True, help="training folder of the VAE")
    parser.add_argument("--towers", type=Path, required=True, help="training folder of the towers")
    parser.add_argument("--loaders", type=int, default=1, help="processes that draw and encode windows")
    parser.add_argument("--harmony", type=Path, help="training folder of the tones' part, held as it is")
    parser.add_argument("--favour", choices=STEMS, help="a stem to train more than the others")
    parser.add_argument(
        "--split-share", type=float, help=f"of the tasks; less where a separator splits ({SHARES['split']})"
    )
    args = parser.parse_args()
    shares = FAVOURING if args.favour else SHARES
    if args.split_share is not None:
        try:
            shares = with_splits(shares, args.split_share)
        except ValueError as error:
            parser.error(str(error))
    config = loop_config(args, validate_every=300.0)
    worker = join_workers()
    rng = np.random.default_rng([args.seed, worker])
    torch.manual_seed(args.seed)
    held_out = load_songs(args.data / "val")
    frozen = freeze(args.vae, args.towers, config.out / STATISTICS, load_songs(args.data / "train"))
    alphas = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float().to(args.device)
    model = StemUNet(unet_config(frozen))
    if args.harmony:
        hold_harmony(model, args.harmony, config.out)
    decoder = copy.deepcopy(frozen.vae.decoder).to(args.device)
    favoured = STEMS.index(args.favour) if args.favour else None
    stream = BatchStream(args.data / "train", frozen, args.batch, args.seed + worker, favoured, shares)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=args.loaders))

    def loss_of(network: StemUNet, batch: Batch, rng: np.random.Generator) -> tuple[torch.Tensor, Logs]:
        t = draw_timesteps(batch, rng, args.device)
        return diffusion_loss(network, batch.to(args.device), frozen, decoder, t, alphas, args.device)

    def loss(network: StemUNet, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        return loss_of(network, next(batches), rng)

    @torch.no_grad()
    def validate(network: StemUNet) -> Logs:
        with fixed_draws() as generator:
            rows = []
            for _ in range(3):
                windows = draw(held_out, 16, generator, augment=False)
                rows.append(loss_of(network, make_batch(windows, frozen, generator), generator)[1])
        return means(rows)

    print(f"{len(STEMS)} stems, windows of {WINDOW} latent frames, scale {frozen.scale:.4f}", flush=True)
    train(model, loss, config, validate)


if __name__ == "__main__":
    main()
