"""python -m training.train_harmony: the part of the UNet that decides which pitch classes sound.

It reads and writes twelve latents a stem, which are kept for whole songs, and a window in one key is a window
in all twelve: so it sees ten times as many windows in the time that the UNet takes, which goes on from it
(`training.train_unet --harmony`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.schedule import make_schedule
from export.patch_vae import PatchVAE, tone_latents
from export.stem_unet import Harmony, StemUNetConfig
from training import conditions
from training.dataset import MAGNITUDES, RenderedSong, Windows, load_songs
from training.loop import Logs, add_arguments, fixed_draws, loop_config, means, mixed_precision, train
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES, TONES, WINDOW
from training.stems import STEMS
from training.tasks import draw_tasks, dropped
from training.train_unet import LAST, LAST_SHARE, SCHEDULE, STATISTICS, freeze

SHARES = {"split": 0.2, "fill": 0.55, "generate": 0.25}
SILENT = 0.08  # share of the stems that rest, as in training.dataset
BLOCK = 64 * LATENT_FRAMES  # mel frames encoded at a time


@dataclass(frozen=True)
class Melody:
    """A song, and the tones of its renders (S, renders, T, 12) as probabilities."""

    song: RenderedSong
    tones: NDArray[np.float16]


@torch.no_grad()
def listen(vae: PatchVAE, song: RenderedSong) -> Melody:
    """The tones that the VAE hears in every render of a song."""
    heard = vae.encoder.tones
    if heard is None:
        raise ValueError("this VAE has no tones")
    frames = song.mels.shape[2] // LATENT_FRAMES * LATENT_FRAMES
    rows = []
    for start in range(0, frames, BLOCK):
        stored = song.mels[:, :, start : min(frames, start + BLOCK)]
        mel = torch.from_numpy(MAGNITUDES[stored]).log().clamp_min(FLOOR)
        rows.append(heard(vae.encoder.patches(mel.flatten(0, 1)[:, None])).sigmoid())
    tones = torch.cat(rows, 1).unflatten(0, song.mels.shape[:2])
    return Melody(song, tones.numpy().astype(np.float16))


def transposed(x: torch.Tensor, semitones: NDArray[np.int64]) -> torch.Tensor:
    """(B, ..., 12) with each sample's pitch classes moved up by its semitones."""
    return torch.stack([row.roll(int(by), -1) for row, by in zip(x, semitones, strict=True)])


@dataclass(frozen=True)
class Batch:
    """latents: clean tones (B, S, 12, T), scaled. known: what else the network is told (B, T, n)."""

    latents: torch.Tensor
    known: torch.Tensor
    loss_mask: torch.Tensor  # (B, S, T)
    splits: torch.Tensor  # (B,)


def make_batch(
    melodies: list[Melody], batch: int, scale: float, rng: np.random.Generator, augment: bool = True
) -> Batch:
    """Windows in random keys, with the tasks and conditions of training.train_unet; a mixture's tones are
    those of its loudest stems."""
    chosen = [melodies[int(i)] for i in rng.integers(len(melodies), size=batch)]
    starts = [int(rng.integers(m.tones.shape[2] - WINDOW + 1)) for m in chosen]
    rows = [
        np.stack(
            [
                m.tones[i, int(rng.integers(m.tones.shape[1])), start : start + WINDOW]
                for i in range(len(STEMS))
            ]
        )
        for m, start in zip(chosen, starts, strict=True)
    ]
    heard = torch.from_numpy(np.stack(rows)).float()
    resting = rng.random((batch, len(STEMS))) < (SILENT if augment else 0)
    heard[torch.from_numpy(resting)] = 0
    # only songs and places are read of these windows
    nothing = torch.zeros(0)
    windows = Windows(
        nothing, nothing, [m.song for m in chosen], [s * LATENT_FRAMES for s in starts], np.zeros(0)
    )
    told = torch.from_numpy(rng.random(batch) < 0.3)[:, None, None]
    chords = torch.where(
        told, conditions.chords(windows, WINDOW), conditions.heard_chords(windows, WINDOW, rng)
    )
    keys = rng.integers(0, 12 if augment else 1, batch)
    heard = transposed(heard, keys)
    chords = torch.cat(
        [transposed(chords[..., :12], keys), transposed(chords[..., 12:24], keys), chords[..., 24:]], -1
    )

    tasks = draw_tasks(batch, WINDOW, SHARES, rng)
    context_mask = torch.from_numpy(tasks.context_mask)
    latents = tone_latents(heard) * scale
    anything = torch.from_numpy(tasks.mixed.any(1)).float()[:, None, None]
    mixture = torch.where(torch.from_numpy(tasks.mixed)[:, :, None, None], heard, 0.0).amax(1)
    mixture = tone_latents(mixture) * scale * anything
    flags = anything.expand(-1, WINDOW, 1)
    known = [
        (latents * context_mask[..., None]).transpose(1, 2).flatten(2),
        context_mask.transpose(1, 2),
        mixture,
        flags,
        flags * torch.from_numpy(tasks.named).float()[:, None],
        dropped(conditions.grid(windows, WINDOW), 0.5, rng),
        dropped(chords, 0.3, rng),
    ]
    return Batch(latents.transpose(2, 3), torch.cat(known, -1), tasks.loss_mask(resting), tasks.alone())


def harmony_loss(
    network: Harmony, batch: Batch, alphas: torch.Tensor, rng: np.random.Generator, device: str
) -> tuple[torch.Tensor, Logs]:
    """v-prediction of the tones, as in training.train_unet."""
    t = torch.from_numpy(rng.integers(0, LAST + 1, len(batch.splits)))
    last = batch.splits & torch.from_numpy(rng.random(len(t)) < LAST_SHARE)
    t = torch.where(last, LAST, t).to(device)
    a, s = (x[t].sqrt()[:, None, None, None] for x in (alphas, 1 - alphas))
    clean, mask = batch.latents.to(device), batch.loss_mask.to(device)[:, :, None]
    noise = torch.randn_like(clean)
    noisy = (a * clean + s * noise).permute(0, 3, 1, 2).flatten(2)
    with mixed_precision(device):
        _, v = network(torch.cat([noisy, batch.known.to(device)], -1), t)
    v = v.float().unflatten(2, clean.shape[1:3]).permute(0, 2, 3, 1)
    error = (v - (a * noise - s * clean)).square() * mask
    loss = error.sum() / (mask.sum() * clean.shape[2]).clamp_min(1)
    return loss, {"mse": loss.item()}


@torch.no_grad()
def explained(network: Harmony, melodies: list[Melody], scale: float, device: str) -> Logs:
    """Share of the variance of one stem's tones that is predicted from noise and the other three stems."""
    rng = np.random.default_rng(11)
    batch = make_batch(melodies, 48, scale, rng, augment=False)
    logs = Logs()
    for i, stem in enumerate(STEMS):
        if stem == "drums":
            continue
        known = told_the_others(batch, i).to(device)
        clean = batch.latents[:, i].to(device)
        noise = torch.randn(
            len(known), WINDOW, len(STEMS) * TONES, generator=torch.Generator().manual_seed(i)
        )
        t = torch.full((len(known),), LAST, device=device)
        _, v = network(torch.cat([noise.to(device), known], -1), t)
        found = -v.unflatten(2, (len(STEMS), TONES))[:, :, i].transpose(1, 2)
        spread = (clean - clean.mean((0, 2), keepdim=True)).square().mean()
        logs[f"explained_{stem}"] = 1 - float((found - clean).square().mean() / spread)
    return logs


def told_the_others(batch: Batch, stem: int) -> torch.Tensor:
    """What the network is told where all stems but one are known."""
    mask = torch.ones(len(batch.latents), len(STEMS), WINDOW)
    mask[:, stem] = 0
    context = (batch.latents * mask[:, :, None]).permute(0, 3, 1, 2).flatten(2)
    nothing = torch.zeros(len(mask), WINDOW, TONES + 1 + len(STEMS))
    return torch.cat([context, mask.transpose(1, 2), nothing, batch.known[..., -31:]], -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=1.5e-3)
    parser.add_argument("--runs", type=Path, required=True, help="folder with vae/ and towers/")
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    songs = load_songs(args.data / "train")
    frozen = freeze(args.runs / "vae", args.runs / "towers", args.runs / "unet" / STATISTICS, songs)
    melodies = [listen(frozen.vae, song) for song in songs]
    held_out = [listen(frozen.vae, song) for song in load_songs(args.data / "val")]
    alphas = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float().to(args.device)

    def loss(network: Harmony, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        return harmony_loss(
            network, make_batch(melodies, args.batch, frozen.scale, rng), alphas, rng, args.device
        )

    @torch.no_grad()
    def validate(network: Harmony) -> Logs:
        with fixed_draws() as generator:
            batches = [make_batch(held_out, 64, frozen.scale, generator, False) for _ in range(2)]
            rows = [harmony_loss(network, batch, alphas, generator, args.device)[1] for batch in batches]
        return means(rows) | explained(network, held_out, frozen.scale, args.device)

    sizes = StemUNetConfig(channels=frozen.vae.config.latents, tones=TONES)
    print(f"{len(melodies)} songs, windows of {WINDOW} latent frames, {GEOMETRY.sample_rate} Hz", flush=True)
    train(Harmony(sizes), loss, config, validate)


if __name__ == "__main__":
    main()
