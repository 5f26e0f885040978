"""python -m training.train_vae: the KL-VAE on mels of single stems and of mixtures."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from engine.features import mel_edges
from export.patch_vae import PatchVAE, PatchVAEConfig
from training.dataset import RenderedSong, draw, load_songs
from training.loop import Logs, add_arguments, loop_config, mixed_precision, train
from training.mel import GEOMETRY, LATENT_FRAMES

FRAMES = 64 * LATENT_FRAMES  # 3 s is plenty for a network that sees half a second
KL_WEIGHT = 5e-5
LOW_BANDS = int((mel_edges(GEOMETRY)[1:-1] < 1400).sum())  # where the pitch is


def batch_of_mels(
    songs: list[RenderedSong], batch: int, rng: np.random.Generator, augment: bool = True
) -> torch.Tensor:
    """(5 B, 1, frames, mels): the four stems and the mixture of each window."""
    windows = draw(songs, batch, rng, augment, FRAMES)
    return torch.cat([windows.mels, windows.mixture[:, None]], 1).flatten(0, 1)[:, None]


def reconstruction(estimate: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
    """L1 of log mels. Loud bands weigh up to six times as much as those near the floor.

    The bands up to 1.4 kHz weigh three times as much as the rest: a bass line's pitch is nowhere else.
    """
    weight = 1 + 5 * torch.sigmoid(mel + 4)
    weight = weight * (1 + 2 * (torch.arange(mel.shape[-1], device=mel.device) < LOW_BANDS))
    return ((estimate - mel).abs() * weight).mean() / weight.mean()


def losses(model: PatchVAE, mel: torch.Tensor, device: str, noise: float = 0.0) -> tuple[torch.Tensor, Logs]:
    """Reconstruction + KL to a standard normal (Kingma & Welling 2014, eq. 10).

    noise: the latents get up to this deviation more, another one for each window, because those that the UNet
    writes are not exact either: a decoder that has heard only exact ones makes speckles of the difference.
    """
    with mixed_precision(device):
        mean, log_variance = model.moments(mel)
        mean, log_variance = mean.float(), log_variance.float()
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        latents = latents + noise * torch.rand(len(mean), 1, 1, 1, device=device) * torch.randn_like(mean)
        estimate = model.decoder(latents).float()
    error = reconstruction(estimate, mel)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return error + KL_WEIGHT * kl, {"weighted_l1": error.item(), "kl": kl.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, lr=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.0, help="most deviation added to the latents")
    parser.add_argument("--decoder-only", action="store_true", help="the encoder stays, and the UNet with it")
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    songs, held_out = load_songs(args.data / "train"), load_songs(args.data / "val")
    model = PatchVAE(PatchVAEConfig(mels=GEOMETRY.n_mels))
    patches = batch_of_mels(songs, 128, rng).reshape(-1, LATENT_FRAMES * model.config.mels)
    model.set_principal_components(patches)
    fixed = batch_of_mels(held_out, 24, np.random.default_rng(1), augment=False).to(args.device)

    def loss(network: PatchVAE, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        network.encoder.requires_grad_(not args.decoder_only)
        return losses(network, batch_of_mels(songs, args.batch, rng).to(args.device), args.device, args.noise)

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
        }

    start = validate(model.to(args.device).eval())
    print("principal components alone:", {k: round(v, 4) for k, v in start.items()}, flush=True)
    train(model, loss, config, validate)


if __name__ == "__main__":
    main()
