"""What the harmony network is trained on: tones of whole songs, in every key, with the UNet's tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from training_songs import song

from engine.schedule import make_schedule
from export.patch_vae import TONE_LEVEL, TONE_SCALE, PatchVAE, PatchVAEConfig
from export.stem_unet import Harmony, StemUNetConfig
from training.mel import GEOMETRY, LATENT_FRAMES, TONES, WINDOW
from training.stems import STEMS
from training.tasks import KNOWN_WEIGHT
from training.train_harmony import (
    Melody,
    explained,
    harmony_loss,
    listen,
    make_batch,
    told_the_others,
    transposed,
)
from training.train_unet import SCHEDULE

SCALE = 0.5
S = len(STEMS)
ALPHAS = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float()
SIZES = StemUNetConfig(channels=TONES + 4, tones=TONES, harmony=16, harmony_blocks=1)


@pytest.fixture(scope="module")
def melodies() -> list[Melody]:
    """Every stem but the drums plays its chord's root."""
    made = []
    for seed in range(2):
        music = song(seed, frames=WINDOW * LATENT_FRAMES + 40)
        length = music.mels.shape[2] // LATENT_FRAMES
        frame = LATENT_FRAMES * GEOMETRY.hop / GEOMETRY.sample_rate
        beats = (np.arange(length) + 0.5) * frame * music.labels["bpm"] / 60
        chords = music.labels["chords"]
        number = np.searchsorted([chord["beat"] for chord in chords], beats, side="right") - 1
        roots = np.array([chords[i]["root"] for i in number])
        tones = np.zeros((S, 2, length, TONES), np.float16)
        tones[[0, 2, 3]] = np.eye(TONES)[roots]
        made.append(Melody(music, tones))
    return made


def test_what_the_vae_hears_is_kept_for_whole_songs() -> None:
    torch.manual_seed(0)
    sizes = PatchVAEConfig(GEOMETRY.n_mels, channels=4, width=8, tones=TONES, tones_width=8)
    vae, music = PatchVAE(sizes).eval(), song(0)
    melody = listen(vae, music)
    assert melody.tones.shape == (S, 2, music.mels.shape[2] // LATENT_FRAMES, TONES)
    assert melody.tones.min() >= 0 and melody.tones.max() <= 1
    with pytest.raises(ValueError, match="no tones"):
        listen(PatchVAE(PatchVAEConfig(GEOMETRY.n_mels, channels=4, width=8)), music)


def test_a_key_moves_every_pitch_class() -> None:
    x = torch.eye(12).expand(2, 12, 12)
    moved = transposed(x, np.array([0, 3]))
    assert torch.equal(moved[0], x[0]) and moved[1, 0].argmax() == 3 and moved[1, 10].argmax() == 1


def test_chords_and_tones_are_in_one_key(melodies: list[Melody]) -> None:
    batch = make_batch(melodies, 64, SCALE, np.random.default_rng(0))
    assert batch.latents.shape == (64, S, TONES, WINDOW)
    chords = batch.known[..., -25:]
    told = chords[..., 24] > 0
    root = chords[..., :12]
    sure = told & (root.amax(-1) > 0.99)
    bass = batch.latents[:, 0]
    playing = (bass.amax((1, 2)) > 0)[:, None] & sure
    agree = (bass.argmax(1) == root.argmax(-1))[playing].float().mean()
    assert playing.float().mean() > 0.2 and agree > 0.8, "the rest is late or mistaken on purpose"
    keys = {int(k) for k in root.argmax(-1)[sure]}
    assert keys == set(range(12))


def test_what_is_known_is_the_tones_themselves(melodies: list[Melody]) -> None:
    batch = make_batch(melodies, 64, SCALE, np.random.default_rng(1))
    context, mask, mixture, heard, named = torch.split(
        batch.known[..., :-31], [S * TONES, S, TONES, 1, S], dim=-1
    )
    clean = batch.latents.permute(0, 3, 1, 2)
    assert torch.equal(context.unflatten(2, (S, TONES)), clean * mask[..., None])
    assert (batch.loss_mask.transpose(1, 2)[mask > 0] == KNOWN_WEIGHT).all()
    assert (mixture[heard[..., 0] == 0] == 0).all() and (named <= heard).all()
    whole = batch.splits
    assert whole.any() and (named[whole] == 1).all() and (mask[whole] == 0).all()
    assert torch.allclose(mixture[whole], clean[whole].amax(2), atol=1e-5)
    assert set(batch.latents.unique().round(decimals=3).tolist()) <= {
        round((p - TONE_LEVEL) * TONE_SCALE * SCALE, 3) for p in (0, 1)
    }


class Oracle(nn.Module):
    """Predicts v of clean tones."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean.permute(0, 3, 1, 2).flatten(2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, s = ALPHAS[t].sqrt()[:, None, None], (1 - ALPHAS[t]).sqrt()[:, None, None]
        return x, (a * x[..., : S * TONES] - self.clean) / s


def test_the_truth_costs_nothing_and_explains_all(melodies: list[Melody]) -> None:
    batch = make_batch(melodies, 8, SCALE, np.random.default_rng(0))
    value, _ = harmony_loss(Oracle(batch.latents), batch, ALPHAS, np.random.default_rng(0), "cpu")
    assert float(value) < 1e-3
    drawn = make_batch(melodies, 48, SCALE, np.random.default_rng(11), augment=False)
    found = explained(Oracle(drawn.latents), melodies, SCALE, "cpu")
    assert set(found) == {"explained_bass", "explained_guitar", "explained_piano"}
    assert min(found.values()) > 0.99
    told = told_the_others(drawn, 0)
    assert told.shape == (48, WINDOW, drawn.known.shape[2]) and (told[..., :TONES] == 0).all()


def test_it_learns_what_the_other_stems_play(melodies: list[Melody]) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = Harmony(SIZES)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        batch = make_batch(melodies, 8, SCALE, rng)
        loss, _ = harmony_loss(network, batch, ALPHAS, rng, "cpu")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert min(explained(network.eval(), melodies, SCALE, "cpu").values()) > 0.3
