"""python -m training.train_vocoder: mel to audio, by multi-resolution STFT losses (Yamamoto et al. 2020)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from export.vocos import Vocos, VocosConfig
from training.loop import Logs, add_arguments, loop_config, train
from training.mel import GEOMETRY, log_mel

SEGMENT = 64  # mel frames
RESOLUTIONS = (256, 512, 1024, 2048)


def load_audio(folder: Path) -> list[np.ndarray]:
    """The kept audio of rendered songs: int16 (stems, samples) at 44.1 kHz. Raises FileNotFoundError."""
    audio = [np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.audio.npy"))]
    if not audio:
        raise FileNotFoundError(f"{folder} holds no audio; run python -m training.render first")
    return audio


def segments(audio: list[np.ndarray], batch: int, rng: np.random.Generator) -> torch.Tensor:
    """(batch, samples): random stems, one in five a mixture, at scattered levels."""
    length = SEGMENT * GEOMETRY.hop
    rows: list[np.ndarray] = []
    while len(rows) < batch:
        song = audio[int(rng.integers(len(audio)))]
        start = int(rng.integers(song.shape[1] - length))
        part = song[:, start : start + length].astype(np.float32) / 32768
        row = part.sum(0) if rng.random() < 0.2 else part[int(rng.integers(len(part)))]
        if np.abs(row).max() > 0.003:
            rows.append(row * 10 ** (rng.normal(0, 5) / 20))
    return torch.from_numpy(np.stack(rows))


def spectral_loss(estimate: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Logs]:
    """Spectral convergence and log magnitude over several windows, and L1 of the model's own log mels."""
    total = torch.zeros((), device=estimate.device)
    for n_fft in RESOLUTIONS:
        window = torch.hann_window(n_fft, device=estimate.device)
        a, b = (
            torch.stft(x, n_fft, n_fft // 4, window=window, return_complex=True).abs()
            for x in (estimate, target)
        )
        difference = torch.linalg.vector_norm(a - b, dim=(1, 2))
        convergence = difference / torch.linalg.vector_norm(b, dim=(1, 2)).clamp_min(1e-3)
        logarithm = (a.clamp_min(1e-3).log() - b.clamp_min(1e-3).log()).abs().mean()
        total = total + convergence.mean() + logarithm
    mel = (log_mel(estimate) - log_mel(target)).abs().mean()
    return total / len(RESOLUTIONS) + 2 * mel, {"mel_l1": mel.item(), "stft": total.item() / len(RESOLUTIONS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, lr=1e-3)
    args = parser.parse_args()
    config = loop_config(args)
    rng = np.random.default_rng(args.seed)
    audio, held_out = load_audio(args.data / "train"), load_audio(args.data / "val")
    fixed = segments(held_out, 24, np.random.default_rng(2)).to(args.device)

    def synthesised(network: Vocos, target: torch.Tensor) -> torch.Tensor:
        return network(log_mel(target).transpose(1, 2))[:, 0]

    def loss(network: Vocos, step: int) -> tuple[torch.Tensor, Logs]:
        del step
        target = segments(audio, args.batch, rng).to(args.device)
        return spectral_loss(synthesised(network, target), target)

    @torch.no_grad()
    def validate(network: Vocos) -> Logs:
        estimate = synthesised(network, fixed)
        pairs = torch.cat([fixed[:6], estimate[:6]], 1).flatten().cpu().numpy()
        sf.write(config.out / "held_out.wav", pairs, GEOMETRY.sample_rate)
        return spectral_loss(estimate, fixed)[1]

    train(Vocos(VocosConfig(mels=GEOMETRY.n_mels)), loss, config, validate)


if __name__ == "__main__":
    main()
