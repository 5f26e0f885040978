"""python -m training.train_vae: the KL-VAE on mels of single stems and of mixtures."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn

from engine.features import mel_edges
from engine.harmony import UNPITCHED
from export.patch_vae import Encoder, PatchVAE, PatchVAEConfig
from training import conditions
from training.dataset import RenderedSong, Windows, draw, load_songs
from training.loop import Logs, add_arguments, loop_config, mixed_precision, train
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES, TONES
from training.stems import STEMS

FRAMES = 64 * LATENT_FRAMES  # 3 s is plenty for a network that sees half a second
KL_WEIGHT = 5e-5
TONE_WEIGHT = 1.0
PITCHED = [i for i, stem in enumerate(STEMS) if stem not in UNPITCHED]
OTHER_TIMES = (1, 2, 5)  # how many a murmur mixes; of one it is a wrong pitch and no murmur
LOW_BANDS = int((mel_edges(GEOMETRY)[1:-1] < 1400).sum())  # where the pitch is


def batch_of_mels(
    songs: list[RenderedSong], batch: int, rng: np.random.Generator, augment: bool = True
) -> torch.Tensor:
    """(5 B, 1, frames, mels): the four stems and the mixture of each window."""
    return with_mixtures(draw(songs, batch, rng, augment, FRAMES))


def with_mixtures(windows: Windows) -> torch.Tensor:
    """(5 B, 1, frames, mels): the four stems and the mixture of each window."""
    return torch.cat([windows.mels, windows.mixture[:, None]], 1).flatten(0, 1)[:, None]


def sounding(windows: Windows) -> torch.Tensor:
    """(5 B, T, 12): the pitch classes that the four stems and the mixture of each window play."""
    stems = conditions.tones(windows, windows.mels.shape[2] // LATENT_FRAMES)
    return torch.cat([stems, stems.amax(1, keepdim=True)], 1).flatten(0, 1)


def how_loud(mel: torch.Tensor) -> torch.Tensor:
    """From 0, near the floor, to 1, how loud bands of log mels are."""
    return torch.sigmoid(mel + 4)


def reconstruction(estimate: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
    """L1 of log mels. Loud bands weigh up to six times as much as those near the floor.

    The bands up to 1.4 kHz weigh three times as much as the rest: a bass line's pitch is nowhere else.
    """
    weight = 1 + 5 * how_loud(mel)
    weight = weight * (1 + 2 * (torch.arange(mel.shape[-1], device=mel.device) < LOW_BANDS))
    return ((estimate - mel).abs() * weight).mean() / weight.mean()


def murmured(mel: torch.Tensor) -> torch.Tensor:
    """(N, 1, frames, mels), log: pitched stems as loud in each frame, but playing a mixture of other times.

    To a random extent, more often a great one. N counts the four stems and the mixture of each window. That
    is what a UNet writes that is unsure of the notes: rhythm and timbre without a pitch, or with a wrong one.
    """
    x = mel.unflatten(0, (-1, len(STEMS) + 1))[:, PITCHED]
    level = x.mean(-1, keepdim=True)
    loudness = (level - FLOOR).clamp_min(1e-3).square()
    count = OTHER_TIMES[int(torch.randint(len(OTHER_TIMES), ()))]
    shifts = torch.randint(x.shape[3], (count,)).tolist()
    total = sum(torch.roll((x - level) * loudness, by, 3) for by in shifts)
    weight = sum(torch.roll(loudness, by, 3) for by in shifts)
    extent = torch.rand(*x.shape[:2], 1, 1, 1, device=mel.device).sqrt()
    blurred = level + (1 - extent) * (x - level) + extent * total / weight
    out = mel.unflatten(0, (-1, len(STEMS) + 1)).clone()
    sounding = x.amax(-1, keepdim=True) > FLOOR + 0.1
    out[:, PITCHED] = torch.where(sounding, blurred, x).clamp_min(FLOOR)
    return out.flatten(0, 1)


def losses(
    model: PatchVAE, mel: torch.Tensor, device: str, noise: float = 0.0, murmur: bool = False
) -> tuple[torch.Tensor, Logs]:
    """Reconstruction + KL to a standard normal (Kingma & Welling 2014, eq. 10).

    noise: the latents get up to this deviation more, another one for each window, because those that the UNet
    writes are not exact either: a decoder that has heard only exact ones makes speckles of the difference.
    murmur: all latents but the tones are those of `murmured`, so that the decoder takes the pitch from the
    tones.
    """
    plain = model.config.channels
    with mixed_precision(device):
        mean, log_variance = model.moments(mel)
        if murmur:
            mean = torch.cat([model.moments(murmured(mel))[0][:, :plain], mean[:, plain:]], 1)
        mean, log_variance = mean.float(), log_variance.float()
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        latents = latents + noise * torch.rand(len(mean), 1, 1, 1, device=device) * torch.randn_like(mean)
        estimate = model.decoder(latents).float()
    error = reconstruction(estimate, mel)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)[:, :plain].sum(1).mean()
    return error + KL_WEIGHT * kl, {"weighted_l1": error.item(), "kl": kl.item()}


def tone_loss(
    encoder: Encoder, mel: torch.Tensor, played: torch.Tensor, device: str
) -> tuple[torch.Tensor, Logs]:
    """Cross-entropy of the pitch classes heard in mel (N, 1, frames, mels) and those played (N, T, 12)."""
    if encoder.tones is None:
        raise ValueError("this encoder has no tones")
    with mixed_precision(device):
        logits = encoder.tones(encoder.patches(mel)).float()
    error = nn.functional.binary_cross_entropy_with_logits(logits, played)
    hits = ((logits > 0) * played).sum()
    f1 = 2 * hits / ((logits > 0).sum() + played.sum()).clamp_min(1)
    return error, {"tones": error.item(), "tones_f1": f1.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, lr=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.0, help="most deviation added to the latents")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--decoder-only", action="store_true", help="the encoder stays, and the UNet with it")
    part.add_argument("--tones-only", action="store_true", help="what hears pitch classes, and nothing else")
    parser.add_argument("--murmur", action="store_true", help="pitch in the tones alone, --decoder-only")
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    songs, held_out = load_songs(args.data / "train"), load_songs(args.data / "val")
    model = PatchVAE(PatchVAEConfig(mels=GEOMETRY.n_mels, tones=TONES))
    patches = batch_of_mels(songs, 128, rng).reshape(-1, LATENT_FRAMES * model.config.mels)
    model.set_principal_components(patches)
    known = draw(held_out, 24, np.random.default_rng(1), False, FRAMES)
    fixed, played = with_mixtures(known).to(args.device), sounding(known).to(args.device)

    def loss(network: PatchVAE, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        network.requires_grad_(not args.tones_only)
        network.encoder.requires_grad_(not args.decoder_only and not args.tones_only)
        if network.encoder.tones is not None:
            network.encoder.tones.requires_grad_(not args.decoder_only)
        windows = draw(songs, args.batch, rng, frames=FRAMES)
        mel = with_mixtures(windows).to(args.device)
        value, logs = torch.zeros((), device=args.device), Logs()
        if not args.tones_only:
            value, logs = losses(network, mel, args.device, args.noise, args.murmur)
        if not args.decoder_only:
            error, heard = tone_loss(network.encoder, mel, sounding(windows).to(args.device), args.device)
            value, logs = value + TONE_WEIGHT * error, logs | heard
        return value, logs

    @torch.no_grad()
    def validate(network: PatchVAE) -> Logs:
        mean, _ = network.moments(fixed)
        estimate = network.decoder(mean)
        loud = fixed > -5
        low = loud[..., :LOW_BANDS]
        return {
            "l1": (estimate - fixed).abs().mean().item(),
            "l1_loud": (estimate - fixed).abs()[loud].mean().item(),
            "l1_loud_low": (estimate - fixed)[..., :LOW_BANDS].abs()[low].mean().item(),
            "latent_std": mean.std().item(),
        } | tone_loss(network.encoder, fixed, played, args.device)[1]

    start = validate(model.to(args.device).eval())
    print("principal components alone:", {k: round(v, 4) for k, v in start.items()}, flush=True)
    train(model, loss, config, validate)


if __name__ == "__main__":
    main()
