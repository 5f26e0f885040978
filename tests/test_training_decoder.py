"""The decoder's training against a critic: it learns from latents as the sampler leaves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.samplers import sample_distilled
from engine.schedule import make_schedule
from export.patch_vae import PatchVAE, PatchVAEConfig
from export.stem_unet import StemUNet, StemUNetConfig
from training import loop
from training.distill import STEPS, clean_from, keeping
from training.loop import write_checkpoint
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
from training.stems import STEMS
from training.train_decoder import (
    CRITIC_PACE,
    CROP,
    NOISE,
    ROWS,
    Landing,
    Rivals,
    compare,
    critic_error,
    distance,
    land,
    level_error,
    rivals_loss,
    with_decoder,
)
from training.train_unet import SCHEDULE, Batch

S, Z, T, TONES = len(STEMS), 5 + 12, CROP + 4, 12
SIZES = StemUNetConfig(
    channels=Z, film=8, width=16, inner=16, blocks_down=1, blocks_up=1, layers=1, heads=2, cond=16,
    tones=TONES, harmony=16, harmony_blocks=1, adapter=8, distilled=SCHEDULE.steps,
)  # fmt: skip
VAE = PatchVAEConfig(mels=GEOMETRY.n_mels, channels=5, width=16, decoder_blocks=1, tones=TONES)
ALPHAS = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float()


@pytest.fixture
def batch() -> Batch:
    """A fill of the bass, and a band made up from nothing in which the drums rest unasked."""
    torch.manual_seed(1)
    latents, mask = torch.randn(2, S, Z, T, 1), torch.zeros(2, S, T)
    mask[0, 1:] = 1
    inputs = {
        "film": torch.randn(2, 8),
        "context": latents * mask[:, :, None, :, None],
        "context_mask": mask,
        "mixture": torch.zeros(2, Z, T, 1),
        "mixture_mask": torch.zeros(2, T),
        "mixture_stems": torch.zeros(2, S),
        "grid": torch.randn(2, T, 6),
        "chords": torch.randn(2, T, 25),
    }
    weight = torch.ones(2, S, T)
    weight[1, 1] = 0
    mels = FLOOR + 6 * torch.rand(2, S, T * LATENT_FRAMES, GEOMETRY.n_mels)
    silent = torch.zeros(2, dtype=torch.bool)
    return Batch(latents, inputs, weight, silent, mels, torch.zeros(0))


@pytest.fixture
def unet() -> StemUNet:
    torch.manual_seed(0)
    unet = StemUNet(SIZES)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return unet.eval().requires_grad_(False)


@pytest.fixture
def rivals() -> Rivals:
    torch.manual_seed(2)
    return Rivals(PatchVAE(VAE).decoder)


def test_it_lands_where_the_engines_sampler_does(batch: Batch, unet: StemUNet) -> None:
    torch.manual_seed(3)
    landing = land(unet, batch, 0, ALPHAS, scale=0.5)
    torch.manual_seed(3)
    first = make_schedule(SCHEDULE)
    noise = torch.randn_like(batch.latents)
    x = first.alpha(SCHEDULE.steps - 1) * batch.latents + first.noise(SCHEDULE.steps - 1) * noise

    def predict(x: np.ndarray, t: int) -> np.ndarray:
        steps = torch.full((2,), t)
        clean = clean_from(unet, torch.from_numpy(x).float(), steps, ALPHAS, batch.inputs, distilled=True)
        return keeping(batch, clean).numpy()

    found = sample_distilled(predict, x.numpy(), first, steps=STEPS)
    assert np.allclose(landing.latents.numpy(), found.reshape(2 * S, Z, T, 1) / 0.5, atol=1e-4)
    assert landing.made.tolist() == [True, False, False, False] + [True] * 4
    known = batch.latents.flatten(0, 1)[1:4] / 0.5
    assert torch.allclose(landing.latents[1:4], known), "what is known is the true latent"


def frames(start: int) -> slice:
    return slice(start * LATENT_FRAMES, (start + CROP) * LATENT_FRAMES)


def test_what_is_cropped_stays_together_and_was_asked_for(batch: Batch, unet: StemUNet) -> None:
    whole = land(unet, batch, 3, ALPHAS, scale=1.0)
    noise = {True: [], False: []}
    for seed in range(10):
        part = whole.crop(np.random.default_rng(seed))
        assert part.latents.shape[2] == CROP
        rows = []
        for latents, mel, made in zip(part.latents, part.mels, part.made, strict=True):
            row, start = next(
                (row, start)
                for row in range(2 * S)
                for start in range(T - CROP + 1)
                if torch.equal(mel, whole.mels[row][:, frames(start)])
            )
            rows.append(row)
            assert made == whole.made[row]
            noise[bool(made)].append((latents - whole.latents[row, :, start : start + CROP]).std().item())
        assert sorted(rows) == [0, 1, 2, 3, 4, 6, 7], (
            "not the drums that rest although they were asked to play"
        )
    assert not any(noise[True]) and max(noise[False]) < 1.1 * NOISE
    assert 0.2 < np.mean(np.array(noise[False]) == 0) < 0.8, "what is known gets noise, but not always"
    many = replace(whole, asked=torch.ones_like(whole.asked), made=torch.ones_like(whole.made))
    assert len(many.crop(np.random.default_rng(5)).latents) == 2 * S
    many = replace(many, made=~many.made)
    assert len(many.crop(np.random.default_rng(5)).latents) == ROWS[False]


def learn_to_tell(rivals: Rivals, given: Landing) -> None:
    optimiser = torch.optim.Adam(rivals.critic.parameters(), lr=5e-3)
    estimate = rivals.decoder(given.latents).detach()
    for _ in range(20):
        error = critic_error(*(rivals.critic(x[given.made]) for x in (estimate, given.mels)))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    assert error < 1.8


def test_each_rival_is_moved_by_its_own_error_alone(
    batch: Batch, unet: StemUNet, rivals: Rivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gradients are compared to a thousandth, which bfloat16 does not have
    monkeypatch.setattr(loop, "_bfloat16_is_faster", lambda: False)
    given = land(unet, batch, 2, ALPHAS, scale=1.0).crop(np.random.default_rng(0))
    learn_to_tell(rivals, given)
    torch.manual_seed(4)
    rivals_loss(rivals, given, "cpu")[0].backward()
    moved = {name: weight.grad.clone() for name, weight in rivals.named_parameters()}
    torch.manual_seed(4)
    estimate = rivals.decoder(given.latents).detach()
    judged = (rivals.critic(x[given.made]) for x in (estimate, given.mels))
    error = critic_error(*judged) * CRITIC_PACE
    for (name, _), wanted in zip(
        rivals.critic.named_parameters(),
        torch.autograd.grad(error, list(rivals.critic.parameters())),
        strict=True,
    ):
        assert torch.allclose(moved[f"critic.{name}"], wanted, rtol=1e-3, atol=1e-7), name
    # a critic with nothing to say leaves the decoder with its own errors, and one that has moves it otherwise
    for layers in (rivals.critic.fine, rivals.critic.coarse):
        torch.nn.init.zeros_(layers[-1].parametrizations.weight.original0)
    rivals.zero_grad()
    rivals_loss(rivals, given, "cpu")[0].backward()
    estimate = rivals.decoder(given.latents)
    own = distance(estimate, given)[0]
    for (name, weight), wanted in zip(
        rivals.decoder.named_parameters(),
        torch.autograd.grad(own, list(rivals.decoder.parameters())),
        strict=True,
    ):
        assert torch.allclose(weight.grad, wanted, rtol=1e-3, atol=1e-6), name
    assert not torch.allclose(moved["decoder.linear.weight"], rivals.decoder.linear.weight.grad, rtol=1e-2)


def test_beside_its_critic_the_decoder_nears_the_truth(batch: Batch, unet: StemUNet, rivals: Rivals) -> None:
    given = land(unet, batch, 3, ALPHAS, scale=1.0).crop(np.random.default_rng(0))
    optimiser = torch.optim.Adam(rivals.parameters(), lr=2e-3)
    rows = []
    for _ in range(25):
        loss, logs = rivals_loss(rivals, given, "cpu")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rows.append(logs)
    assert rows[-1]["made"] < 0.9 * rows[0]["made"]


def test_levels_are_those_of_magnitudes() -> None:
    mel = FLOOR + 4 + torch.rand(2, 1, 128, GEOMETRY.n_mels)
    assert level_error(mel, mel) == 0
    assert level_error(mel - 0.7, mel).item() == pytest.approx(0.7, abs=1e-4)
    blurred = mel.mean(2, keepdim=True).expand_as(mel)  # the mean of logarithms is below that of magnitudes
    assert level_error(blurred, mel) > 0.02


def test_the_report_says_how_much_quieter_and_rougher(batch: Batch, unet: StemUNet, rivals: Rivals) -> None:
    given = land(unet, batch, 3, ALPHAS, scale=1.0)
    with torch.no_grad():
        rivals.decoder.linear.bias.add_(4.0)  # loud enough to be heard
        estimate = rivals.decoder(given.latents)
        logs = compare(rivals.decoder, replace(given, mels=estimate + 1))
    assert logs["quieter_db"] == pytest.approx(20 / np.log(10), abs=0.01)
    assert logs["l1_made"] == pytest.approx(1, abs=1e-4)


def test_a_vae_takes_the_averaged_decoder(tmp_path: Path, rivals: Rivals) -> None:
    vae = PatchVAE(VAE)
    write_checkpoint({"ema": rivals.state_dict()}, tmp_path)
    before = vae.encoder.linear.weight.clone()
    with_decoder(vae, tmp_path)
    for mine, theirs in zip(vae.decoder.parameters(), rivals.decoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(vae.encoder.linear.weight, before)


def test_a_vae_takes_a_share_of_the_averaged_decoder(tmp_path: Path, rivals: Rivals) -> None:
    write_checkpoint({"ema": rivals.state_dict()}, tmp_path)
    vae = PatchVAE(VAE)
    before = [weights.clone() for weights in vae.decoder.parameters()]
    with_decoder(vae, tmp_path, 0.5)
    trained = rivals.decoder.parameters()
    for mine, old, new in zip(vae.decoder.parameters(), before, trained, strict=True):
        assert torch.allclose(mine, (old + new) / 2, atol=1e-6)
