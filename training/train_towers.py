"""python -m training.train_towers: the joint text and audio embedding, contrastively on captions."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from export.caption_towers import CaptionTowers, CaptionTowersConfig
from training.captions import describe, encode, make_tokenizer, measure_thresholds
from training.dataset import Windows, draw, load_songs
from training.loop import Logs, add_arguments, loop_config, mixed_precision, train
from training.mel import GEOMETRY

FRAMES = 432  # mel frames, 5 s
CAPTIONS_PER_DRAW = 4  # drawing windows costs more than a step


def contrastive(
    model: CaptionTowers, mel: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Symmetric InfoNCE (Radford et al. 2021) and the share of windows whose own caption is the nearest."""
    similarity = model.audio(mel).float() @ model.text(ids, mask).float().T
    logits = similarity * model.log_temperature.exp().clamp(max=50)
    target = torch.arange(len(mel), device=mel.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return loss, (similarity.argmax(1) == target).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, lr=1e-3)
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    songs, held_out = load_songs(args.data / "train"), load_songs(args.data / "val")
    config.out.mkdir(parents=True, exist_ok=True)
    if not (config.out / "tokenizer.json").exists():
        make_tokenizer(songs).save(str(config.out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(config.out / "tokenizer.json"))
    thresholds = measure_thresholds(songs)
    (config.out / "thresholds.json").write_text(json.dumps(asdict(thresholds)))
    model = CaptionTowers(CaptionTowersConfig(vocabulary=tokenizer.get_vocab_size(), mels=GEOMETRY.n_mels))

    def batch(windows: Windows, generator: np.random.Generator) -> tuple[torch.Tensor, ...]:
        ids, mask = encode(tokenizer, describe(windows, thresholds, generator))
        return windows.mixture[:, None].to(args.device), ids.to(args.device), mask.to(args.device)

    drawn = {"windows": draw(songs, args.batch, rng, True, FRAMES)}

    def loss(network: CaptionTowers, step: int) -> tuple[torch.Tensor, Logs]:
        if step % CAPTIONS_PER_DRAW == 0:
            drawn["windows"] = draw(songs, args.batch, rng, True, FRAMES)
        with mixed_precision(args.device):
            value, nearest = contrastive(network, *batch(drawn["windows"], rng))
        return value, {"nearest": nearest}

    fixed = batch(draw(held_out, 64, np.random.default_rng(3), False, FRAMES), np.random.default_rng(3))

    @torch.no_grad()
    def validate(network: CaptionTowers) -> Logs:
        value, nearest = contrastive(network, *fixed)
        return {"loss": value.item(), "nearest": nearest}

    train(model, loss, config, validate)


if __name__ == "__main__":
    main()
