"""python -m training.train_classifier: which stem is this? Trained on true stems; a judge, never shipped."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from export.caption_towers import AudioTower, CaptionTowersConfig
from training.dataset import RenderedSong, draw, load_songs
from training.loop import Logs, add_arguments, loop_config, train
from training.mel import FLOOR, GEOMETRY
from training.stems import STEMS

CONFIG = CaptionTowersConfig(mels=GEOMETRY.n_mels, audio_width=96, audio_blocks=2)
FRAMES = 432  # mel frames, 5 s


class StemClassifier(nn.Module):
    """mel (B, 1, frames, mels) -> logits (B, stems); levels are removed, so that only the sound decides."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = AudioTower(CONFIG)
        self.outward = nn.Linear(CONFIG.embedding, len(STEMS))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        loudest = mel.amax((2, 3), keepdim=True)
        return self.outward(self.tower((mel - loudest).clamp_min(FLOOR)) * 4)


def _sounding(
    songs: list[RenderedSong], batch: int, rng: np.random.Generator, augment: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mels (n, 1, frames, mels) of the stems that sound in `batch` windows, and their labels (n,)."""
    mels = draw(songs, batch, rng, augment, FRAMES).mels
    label = torch.arange(len(STEMS)).repeat(batch)
    flat = mels.flatten(0, 1)[:, None]
    heard = flat.amax((1, 2, 3)) > FLOOR + 4
    return flat[heard], label[heard]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, lr=1e-3)
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    songs, held_out = load_songs(args.data / "train"), load_songs(args.data / "val")

    def loss(network: StemClassifier, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        mel, label = _sounding(songs, args.batch, rng, True)
        logits = network(mel.to(args.device))
        value = F.cross_entropy(logits, label.to(args.device))
        return value, {"accuracy": (logits.argmax(1).cpu() == label).float().mean().item()}

    mel, label = _sounding(held_out, 32, np.random.default_rng(4), False)

    @torch.no_grad()
    def validate(network: StemClassifier) -> Logs:
        return {"accuracy": (network(mel.to(args.device)).argmax(1).cpu() == label).float().mean().item()}

    train(StemClassifier(), loss, config, validate)


if __name__ == "__main__":
    main()
