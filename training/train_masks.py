"""python -m training.train_masks: the mask refiner, on what the trained UNet makes of mixtures.

The UNet is asked as `split` asks it: pure noise at the last step, the mixture known and nothing else.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.schedule import make_schedule
from export.mask_refiner import MaskRefiner, MaskRefinerConfig
from export.stem_unet import StemUNet
from training.captions import encode
from training.dataset import FRAMES, Windows, draw, load_songs
from training.loop import Logs, add_arguments, load_ema, loop_config, train
from training.mel import GEOMETRY, LATENT_FRAMES
from training.stems import STEMS
from training.train_unet import LAST, SCHEDULE, STATISTICS, Frozen, freeze, mask_error, unet_config

POWER = 0.65  # of the masks, the manifest's mask_power
PARTS = 2  # windows are cut in so many: the network sees a fraction of a second


@dataclass(frozen=True)
class Estimator:
    """The networks whose estimates are refined."""

    frozen: Frozen
    unet: StemUNet

    @torch.no_grad()
    def __call__(self, mixture: torch.Tensor) -> torch.Tensor:
        """Log mels (B, frames, mels) of mixtures -> stems' (B, S, frames, mels), the posterior means."""
        alpha = make_schedule(SCHEDULE).alphas_cumprod[LAST]
        a, s = float(np.sqrt(alpha)), float(np.sqrt(1 - alpha))
        mean, _ = self.frozen.vae.moments(mixture[:, None])
        heard = mean * self.frozen.scale
        batch, channels, length, freq = heard.shape
        stems = len(STEMS)
        x = torch.randn(batch, stems, channels, length, freq, device=mixture.device)
        told = {
            "film": self._film().expand(batch, -1),
            "context": torch.zeros_like(x),
            "context_mask": x.new_zeros(batch, stems, length),
            "mixture": heard,
            "mixture_mask": x.new_ones(batch, length),
            "mixture_stems": x.new_ones(batch, stems),
            "grid": x.new_zeros(batch, length, self.unet.config.grid),
            "chords": x.new_zeros(batch, length, self.unet.config.chords),
        }
        clean = a * x - s * self.unet(x, torch.full((batch,), LAST, device=x.device), **told)
        mels = self.frozen.vae.decoder(clean.flatten(0, 1) / self.frozen.scale)
        return mels.unflatten(0, (batch, stems))[:, :, 0]

    def _film(self) -> torch.Tensor:
        return self.frozen.towers.text(*encode(self.frozen.tokenizer, [""]))


def refine_loss(network: MaskRefiner, estimate: Estimator, windows: Windows) -> tuple[torch.Tensor, Logs]:
    """Error-to-signal ratio of the refined masks; db_before and db: without and with the network."""
    estimates = estimate(windows.mixture)
    refined = network(estimates, windows.mixture)
    before = mask_error(estimates, windows.mels, windows.mixture, POWER)
    after = mask_error(refined, windows.mels, windows.mixture, POWER)
    decibel = 10 / np.log(10)
    return after, {"db": after.item() * decibel, "db_before": before.item() * decibel}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=1.5e-3)
    parser.add_argument("--runs", type=Path, required=True, help="folder with vae/, towers/ and unet/")
    args = parser.parse_args()
    config = loop_config(args, validate_every=240.0)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    songs, held_out = load_songs(args.data / "train"), load_songs(args.data / "val")
    frozen = freeze(args.runs / "vae", args.runs / "towers", args.runs / "unet" / STATISTICS, songs)
    unet = load_ema(args.runs / "unet", StemUNet(unet_config(frozen)))
    for network in (frozen.vae, frozen.towers, unet):
        network.to(args.device)
    estimate = Estimator(frozen, unet)
    fixed = draw(held_out, 24, np.random.default_rng(7), augment=False)

    def loss(network: MaskRefiner, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        windows = draw(
            songs, args.batch * PARTS, rng, frames=FRAMES // PARTS // LATENT_FRAMES * LATENT_FRAMES
        )
        return refine_loss(network, estimate, windows)

    @torch.no_grad()
    def validate(network: MaskRefiner) -> Logs:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return refine_loss(network, estimate, fixed)[1]

    train(MaskRefiner(MaskRefinerConfig(mels=GEOMETRY.n_mels)), loss, config, validate)


if __name__ == "__main__":
    main()
