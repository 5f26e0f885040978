"""What each network is trained on: batches that say what they should, losses that fall for the truth."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_songs import save, song

from engine.schedule import make_schedule
from export.caption_towers import CaptionTowers, CaptionTowersConfig
from export.patch_vae import PatchVAE, PatchVAEConfig
from export.stem_unet import StemUNet, StemUNetConfig
from training import train_classifier, train_towers, train_unet, train_vae, train_vocoder
from training.captions import Thresholds, make_tokenizer
from training.dataset import draw, mix
from training.loop import mixed_precision
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
from training.stems import STEMS
from training.tasks import KNOWN_WEIGHT
from training.train_unet import (
    LAST,
    LAST_SHARE,
    SCHEDULE,
    SHARES,
    Batch,
    BatchStream,
    Frozen,
    diffusion_loss,
    draw_timesteps,
    make_batch,
    mask_loss,
    with_splits,
)

LENGTH = 16  # latent frames
FILM = 8
Z = 6 + 12  # channels and tones
BANDS = GEOMETRY.n_mels
PATCH = LATENT_FRAMES * BANDS
SMALL = {"mels": BANDS, "channels": 6, "width": 16, "encoder_blocks": 1, "decoder_blocks": 1}
ALPHAS = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float()


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    torch.manual_seed(0)
    songs = [song(seed) for seed in range(2)]
    vae = PatchVAE(PatchVAEConfig(**SMALL, tones=12, tones_width=8))
    vae.set_principal_components(
        train_vae.batch_of_mels(songs, 4, np.random.default_rng(0)).reshape(-1, PATCH)
    )
    tokenizer = make_tokenizer(songs)
    sizes = CaptionTowersConfig(
        tokenizer.get_vocab_size(), FILM, text_width=8, mels=BANDS, audio_width=8, audio_blocks=1
    )
    thresholds = Thresholds(((20.0, 60.0),) * 5, (2.0, 6.0))
    towers = CaptionTowers(sizes)
    return Frozen(
        vae.eval().requires_grad_(False),
        towers.eval().requires_grad_(False),
        tokenizer,
        thresholds,
        scale=0.5,
        metric=torch.linspace(0.5, 1.5, Z).sqrt().diag().repeat(len(STEMS), 1, 1),
    )


@pytest.fixture(scope="module")
def batch(frozen: Frozen) -> Batch:
    """Enough samples to hold every task."""
    rng = np.random.default_rng(0)
    windows = draw([song(seed) for seed in range(2)], 96, rng, frames=LENGTH * LATENT_FRAMES)
    return make_batch(windows, frozen, rng)


def kinds(batch: Batch) -> dict[str, torch.Tensor]:
    """Which samples are what, (B,) each."""
    heard = batch.inputs["mixture_mask"].amax(1) > 0
    named = batch.inputs["mixture_stems"].sum(1)
    known = batch.inputs["context_mask"].amin(2).sum(1)  # stems known all the time
    return {
        "split": heard & (named == len(STEMS)),
        "named": heard & (named > 0) & (named < len(STEMS)),
        "unnamed": heard & (named == 0),
        "context": ~heard & (known > 0),
        "generate": ~heard & (known == 0),
    }


def test_shapes(batch: Batch) -> None:
    stems, z = len(STEMS), Z
    shapes = {name: tuple(value.shape[1:]) for name, value in batch.inputs.items()}
    assert shapes == {
        "film": (FILM,),
        "context": (stems, z, LENGTH, 1),
        "context_mask": (stems, LENGTH),
        "mixture": (z, LENGTH, 1),
        "mixture_mask": (LENGTH,),
        "mixture_stems": (stems,),
        "grid": (LENGTH, 6),
        "chords": (LENGTH, 25),
    }
    assert batch.latents.shape[1:] == (stems, z, LENGTH, 1)
    assert batch.loss_mask.shape[1:] == (stems, LENGTH)


def test_tasks_come_in_their_shares(batch: Batch) -> None:
    found = {name: float(mask.float().mean()) for name, mask in kinds(batch).items()}
    assert sum(found.values()) == pytest.approx(1)
    assert found["split"] == pytest.approx(SHARES["split"], abs=0.15)
    assert found["generate"] == pytest.approx(SHARES["generate"], abs=0.12)
    assert found["context"] == pytest.approx(0.75 * SHARES["fill"], abs=0.15)
    assert found["named"] > 0 and found["unnamed"] > 0


def test_context_is_the_latents_where_known_and_nothing_elsewhere(batch: Batch) -> None:
    mask = batch.inputs["context_mask"]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    wide = mask[:, :, None, :, None].expand_as(batch.latents) > 0
    assert torch.equal(batch.inputs["context"][wide], batch.latents[wide])
    assert (batch.inputs["context"][~wide] == 0).all()
    assert not mask.flatten(1).all(1).any(), "something is always asked for"


def test_splits_have_a_mixture_and_no_context(batch: Batch) -> None:
    found = kinds(batch)
    assert (batch.splits <= found["split"]).all() and batch.splits.sum() > 0.5 * found["split"].sum()
    inputs = {name: value[batch.splits] for name, value in batch.inputs.items()}
    assert (inputs["mixture_mask"] == 1).all() and (inputs["mixture_stems"] == 1).all()
    assert (inputs["context_mask"] == 0).all() and (inputs["context"] == 0).all()
    assert (batch.loss_mask[batch.splits] == 1).all()


def test_a_mixture_never_comes_with_its_parts(batch: Batch) -> None:
    found = kinds(batch)
    parts = found["named"] | found["unnamed"]
    assert (batch.inputs["context_mask"][parts] == 0).all()
    silent = batch.inputs["mixture_mask"].amax(1) == 0
    assert (batch.inputs["mixture"][silent] == 0).all() and (batch.inputs["mixture_stems"][silent] == 0).all()


def test_the_loss_is_on_what_is_asked_for(batch: Batch) -> None:
    found = kinds(batch)
    known = batch.inputs["context_mask"] > 0
    assert torch.allclose(batch.loss_mask[known], torch.tensor(KNOWN_WEIGHT))
    unnamed = batch.loss_mask[found["unnamed"]]
    in_the_mix = unnamed.amax(2) == 0
    assert (in_the_mix.sum(1) >= 1).all() and (in_the_mix.sum(1) < len(STEMS)).all()
    sounding = (batch.mels > FLOOR + 0.1).flatten(2).any(2)[..., None] & ~known
    others = ~found["unnamed"]
    assert (batch.loss_mask[others][sounding[others]] == 1).all()


def test_what_is_armed_and_silent_costs_nothing(frozen: Frozen) -> None:
    """A fill must not learn to rest from stems that were made silent; in other tasks silence is right."""
    windows = draw([song(0)], 96, np.random.default_rng(0), frames=LENGTH * LATENT_FRAMES)
    windows.mels[:, 1] = FLOOR
    made = make_batch(windows, frozen, np.random.default_rng(1))
    found = kinds(made)
    asked = made.inputs["context_mask"][:, 1] == 0
    assert (made.loss_mask[:, 1][found["context"][:, None] & asked] == 0).all()
    assert (made.loss_mask[:, 1][found["split"] & asked.all(1)] == 1).all()
    assert (made.loss_mask[:, 1][found["generate"] & asked.all(1)] == 1).all()


def test_mixtures_are_encoded_mixtures(batch: Batch, frozen: Frozen) -> None:
    with torch.no_grad(), mixed_precision("cpu"):
        mean, _ = frozen.vae.moments(batch.mixture[:, None])
        stems, _ = frozen.vae.moments(batch.mels.flatten(0, 1)[:, None])
    whole = kinds(batch)["split"]
    mixture = batch.inputs["mixture"]
    assert torch.allclose(mixture[whole], mean[whole].float() * frozen.scale, atol=1e-5)
    named = kinds(batch)["named"]
    assert not torch.allclose(mixture[named], mean[named].float() * frozen.scale, atol=1e-2)
    expected = stems.float().unflatten(0, batch.latents.shape[:2]) * frozen.scale
    assert torch.allclose(batch.latents, expected, atol=1e-5)


def test_conditions_are_known_or_all_zero(batch: Batch) -> None:
    for name, known, share in (("grid", 5, 0.5), ("chords", 24, 0.7)):
        value = batch.inputs[name]
        told = value[..., known]
        assert (told.amin(1) == told.amax(1)).all() and set(told.unique().tolist()) == {0.0, 1.0}
        assert (value[told[:, 0] == 0] == 0).all()
        assert float(told.mean()) == pytest.approx(share, abs=0.17)


def test_a_quarter_has_no_prompt(batch: Batch, frozen: Frozen) -> None:
    empty = frozen.towers.text(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    without = ((batch.inputs["film"] - empty).abs().amax(1) < 1e-5).float().mean()
    assert 0.12 < float(without) < 0.45
    assert torch.allclose(batch.inputs["film"].norm(dim=1), torch.ones(len(batch.latents)), atol=1e-4)


def test_batches_repeat_with_the_seed_and_move_between_devices(frozen: Frozen) -> None:
    windows = draw([song(0)], 4, np.random.default_rng(0), frames=64)
    first, second = (make_batch(windows, frozen, np.random.default_rng(3)) for _ in range(2))
    assert all(torch.equal(first.inputs[k], second.inputs[k]) for k in first.inputs)
    moved = first.to("cpu")
    assert torch.equal(moved.splits, first.splits) and moved.inputs.keys() == first.inputs.keys()


def test_timesteps_are_uniform_and_splits_are_mostly_last(batch: Batch) -> None:
    rng = np.random.default_rng(0)
    t = torch.stack([draw_timesteps(batch, rng, "cpu") for _ in range(40)])
    assert t.min() >= 0 and t.max() == LAST
    assert float((t[:, batch.splits] == LAST).float().mean()) == pytest.approx(LAST_SHARE, abs=0.05)
    others = t[:, ~batch.splits].float()
    assert float(others.mean()) == pytest.approx(LAST / 2, rel=0.05)
    assert float((others == LAST).float().mean()) < 0.01


class Oracle(nn.Module):
    """Predicts v for the clean latents it was given, off by `wrong` (B, S, Z, T, F)."""

    def __init__(self, clean: torch.Tensor, wrong: torch.Tensor) -> None:
        super().__init__()
        self.clean, self.wrong = clean, wrong

    def forward(self, x: torch.Tensor, t: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        a = ALPHAS[t].sqrt()[:, None, None, None, None]
        s = (1 - ALPHAS[t]).sqrt()[:, None, None, None, None]
        return (a * x - self.clean) / s + self.wrong


def loss_of(
    batch: Batch, frozen: Frozen, wrong: torch.Tensor, t: torch.Tensor
) -> tuple[float, dict[str, float]]:
    oracle = Oracle(batch.latents, wrong)
    value, logs = diffusion_loss(oracle, batch, frozen, frozen.vae.decoder, t, ALPHAS, "cpu")
    return float(value), logs


def test_the_true_v_costs_nothing(batch: Batch, frozen: Frozen) -> None:
    t = torch.full((len(batch.latents),), 500)
    value, logs = loss_of(batch, frozen, torch.zeros_like(batch.latents), t)
    assert value < 1e-6 and logs.keys() == {"mse", "mse_made"}


def test_an_error_costs_by_channel_and_by_what_is_asked_for(batch: Batch, frozen: Frozen) -> None:
    t = torch.full((len(batch.latents),), 500)
    wrong = torch.zeros_like(batch.latents)
    wrong[:, :, 2] = 0.3
    value, _ = loss_of(batch, frozen, wrong, t)
    weight = float(frozen.metric[0, 2, 2] ** 2)
    assert value == pytest.approx(0.09 * weight / Z, rel=1e-3)  # one of the channels, everywhere
    known = batch.inputs["context_mask"][:, :, None, :, None]
    value, _ = loss_of(batch, frozen, wrong * known, t)
    mask, given = batch.loss_mask, batch.inputs["context_mask"]
    share = (KNOWN_WEIGHT * given).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
    assert value == pytest.approx(0.09 * weight / Z * float(share.mean()), rel=1e-3)


def test_splits_at_the_last_step_are_judged_by_their_masks(batch: Batch, frozen: Frozen) -> None:
    t = torch.full((len(batch.latents),), LAST)
    right, logs = loss_of(batch, frozen, torch.zeros_like(batch.latents), t)
    swapped = batch.latents - batch.latents.roll(1, 1)  # each stem predicted in the place of another
    wrong, wrong_logs = loss_of(batch, frozen, swapped, t)
    assert logs["mask_db"] < -10 and wrong_logs["mask_db"] > -1
    assert logs["mse_split"] < 1e-6 < wrong_logs["mse_split"] and right < wrong


class Pictures(nn.Module):
    """A decoder whose latents are the log mels themselves."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, None]


def test_mask_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    mels = torch.full((1, 4, 20, BANDS), FLOOR)
    mels[:, 0, :, : BANDS // 2], mels[:, 1, :, BANDS // 2 :] = 0.0, 0.0
    mixture = mix(mels, rng)
    decoder: nn.Module = Pictures()
    perfect = mask_loss(decoder, mels, mels, mixture, "cpu")
    assert float(perfect) == pytest.approx(-4.5), "clamped: masks of disjoint stems are exact"
    # equal masks give each stem a quarter of the mixture: 9/16 of its energy is missing, 1/16 is the other's
    equal = mask_loss(decoder, torch.zeros_like(mels), mels, mixture, "cpu")
    assert float(equal) == pytest.approx(np.log(10 / 16), abs=1e-3)


def test_the_stream_of_batches_follows_the_folder(tmp_path: Path, frozen: Frozen) -> None:
    save(tmp_path, 0, song(0))
    stream = iter(BatchStream(tmp_path, frozen, 1, seed=0))
    sizes = {(len(b.latents), b.latents.shape[3]) for b in (next(stream) for _ in range(6))}
    assert sizes <= {(1, 216), (2, 108)}  # whole windows, or twice as many halves


def test_the_vae_learns_to_rebuild_and_starts_as_a_principal_component_analysis() -> None:
    torch.manual_seed(0)
    songs = [song(seed) for seed in range(2)]
    rng = np.random.default_rng(0)
    model = PatchVAE(PatchVAEConfig(BANDS, channels=16, width=16, encoder_blocks=1, decoder_blocks=1))
    mels = train_vae.batch_of_mels(songs, 3, rng)
    assert mels.shape == (15, 1, train_vae.FRAMES, BANDS)
    patches = mels.reshape(-1, PATCH)
    model.set_principal_components(patches)
    with torch.no_grad():
        rebuilt = model.decoder(model.encoder(mels)[:, :16])
    x = (patches - FLOOR) / 2
    mean = x.mean(0)
    _, _, basis = torch.linalg.svd(x - mean, full_matrices=False)
    expected = ((x - mean) @ basis[:16].T @ basis[:16] + mean) * 2
    expected = nn.functional.softplus(expected, beta=4.0) + FLOOR
    assert (rebuilt.reshape(-1, PATCH) - expected).abs().mean() < 1e-3 < (rebuilt - mels).abs().mean()
    value, logs = train_vae.losses(model, mels, "cpu")
    assert value.item() == pytest.approx(logs["weighted_l1"] + train_vae.KL_WEIGHT * logs["kl"], rel=1e-4)
    assert float(train_vae.reconstruction(mels, mels)) == 0
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_tones_are_learnt_from_notes_and_lie_behind_the_other_latents() -> None:
    """Mels in which each pitch class lights a band of its own."""
    torch.manual_seed(0)
    vae = PatchVAE(PatchVAEConfig(**SMALL, tones=12, tones_width=16))
    played = (torch.rand(8, 16, 12) < 0.2).float()
    mel = torch.full((8, 1, 16, LATENT_FRAMES, BANDS), FLOOR)
    mel[:, 0, :, :, :12] += 8 * played[:, :, None]
    mel = mel.reshape(8, 1, 16 * LATENT_FRAMES, BANDS)
    optimiser = torch.optim.Adam(vae.encoder.parameters(), 1e-2)
    first = None
    for _ in range(150):
        loss, logs = train_vae.tone_loss(vae.encoder, mel, played, "cpu")
        first = first or logs
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logs["tones"] < 0.2 * first["tones"] and logs["tones_f1"] > 0.95
    mean, log_variance = vae.moments(mel)
    assert mean.shape[1] == Z and (log_variance[:, 6:] == -12).all()
    tones = mean[:, 6:, :, 0].transpose(1, 2)
    assert (tones[played > 0].min() > 0) and (tones[played == 0].max() < 0) and tones.std() > 1
    without = PatchVAE(PatchVAEConfig(**SMALL))
    with pytest.raises(ValueError, match="no tones"):
        train_vae.tone_loss(without.encoder, mel, played, "cpu")


def test_a_murmur_is_as_loud_and_has_another_pitch() -> None:
    torch.manual_seed(0)
    mel = torch.full((10, 1, 96, BANDS), FLOOR)
    for i in range(3):  # a melody of three notes, each in its own bands
        mel[:, :, 32 * i : 32 * (i + 1), 10 * i : 10 * i + 10] = -1.0
    mel[3] = FLOOR  # a piano that rests
    found = train_vae.murmured(mel)
    assert found.shape == mel.shape and torch.equal(found[[1, 4, 6, 9]], mel[[1, 4, 6, 9]]), "drums, mixtures"
    assert torch.equal(found[3], mel[3])
    assert torch.allclose(found.mean(3), mel.mean(3), atol=0.5)
    others = found[0, 0, :32, 10:30].max()
    assert others > mel[0, 0, :32, 10:30].max() + 0.5, "notes of other times are heard"
    vae = PatchVAE(PatchVAEConfig(**SMALL, tones=12, tones_width=8))
    value, _ = train_vae.losses(vae, mel, "cpu", murmur=True)
    assert torch.isfinite(value)


def test_noise_on_the_latents_reaches_the_decoder_only() -> None:
    torch.manual_seed(0)
    vae = PatchVAE(PatchVAEConfig())
    mel = torch.randn(4, 1, 32, 128) - 4
    vae.encoder.requires_grad_(False)
    plain = train_vae.losses(vae, mel, "cpu")[1]
    value, noisy = train_vae.losses(vae, mel, "cpu", noise=20.0)
    assert noisy["weighted_l1"] > 1.1 * plain["weighted_l1"] and noisy["kl"] == pytest.approx(plain["kl"])
    value.backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in vae.decoder.parameters())


def test_loud_and_low_bands_weigh_more() -> None:
    bands = torch.full((128,), FLOOR)
    bands[[10, 100]] = 0.0
    mel = bands.reshape(1, 1, 1, -1)
    costs = {}
    for band in (10, 20, 100, 120):
        error = torch.zeros(128)
        error[band] = 1.0
        costs[band] = float(train_vae.reconstruction(mel + error, mel))
    assert 5 < costs[10] / costs[20] < 6.1 and 5 < costs[100] / costs[120] < 6.1, "loud over quiet"
    assert costs[10] / costs[100] == pytest.approx(3.0), "low over high"


def test_the_vocoders_loss_is_zero_for_the_target_and_hears_noise() -> None:
    target = torch.randn(2, 64 * GEOMETRY.hop) * 0.1
    value, logs = train_vocoder.spectral_loss(target, target)
    assert float(value) == 0 and logs == {"mel_l1": 0, "stft": 0}
    noisy, _ = train_vocoder.spectral_loss(target + 0.01 * torch.randn_like(target), target)
    wrong, _ = train_vocoder.spectral_loss(torch.randn_like(target) * 0.1, target)
    assert 0 < float(noisy) < float(wrong)


def test_segments_are_sounding_stems_and_mixtures(tmp_path: Path) -> None:
    samples = train_vocoder.SEGMENT * GEOMETRY.hop
    audio = np.zeros((4, 3 * samples), np.int16)
    audio[1], audio[2] = 8000, -4000
    np.save(tmp_path / "000000.audio.npy", audio)
    songs = train_vocoder.load_audio(tmp_path)
    rows = train_vocoder.segments(songs, 200, np.random.default_rng(0))
    assert rows.shape == (200, samples) and rows.dtype == torch.float32
    assert (rows.abs().amax(1) > 0).all(), "silence teaches nothing"
    gains = torch.log10(rows[:, 0].abs() * 32768 / 4000) * 20  # the mixture is 4000, stem 1 is 6 dB above
    assert float(gains.std()) == pytest.approx(5, abs=1.5)
    with pytest.raises(FileNotFoundError, match=r"training\.render"):
        train_vocoder.load_audio(tmp_path / "nowhere")


class Matched(nn.Module):
    """Towers whose embeddings are the rows of the identity, the text's turned by `turn`."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn, self.log_temperature = turn, nn.Parameter(torch.tensor(3.0))

    def audio(self, mel: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(mel))

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(ids)).roll(self.turn, 0)


def test_the_contrastive_loss_knows_pairs() -> None:
    nothing = torch.zeros(4, 1)
    right, share = train_towers.contrastive(Matched(0), nothing, nothing, nothing)
    assert share == 1 and float(right.detach()) == pytest.approx(
        np.log(1 + 3 * np.exp(-np.exp(3.0))), abs=1e-5
    )
    wrong, share = train_towers.contrastive(Matched(1), nothing, nothing, nothing)
    assert share == 0 and float(wrong.detach()) == pytest.approx(np.exp(3.0), abs=1e-3)


def test_the_classifier_hears_sounding_stems_whatever_their_level() -> None:
    torch.manual_seed(0)
    mel, label = train_classifier._sounding([song(0)], 6, np.random.default_rng(1), True)
    assert len(mel) == len(label) <= 24 and set(label.tolist()) == {0, 1, 2, 3}
    assert (mel.amax((1, 2, 3)) > FLOOR + 4).all()
    quarter = BANDS // len(STEMS)
    loudest = mel.mean(2)[:, 0].argmax(1) // quarter
    assert torch.equal(loudest, label)
    model = train_classifier.StemClassifier().eval()
    logits = model(mel)
    assert logits.shape == (len(mel), len(STEMS))
    assert torch.allclose(model(mel + 1.5), logits, atol=2e-2)


def test_errors_weigh_where_the_stem_is_heard(frozen: Frozen) -> None:
    """A latent that the decoder writes into one half of the bands costs the stem most that sounds there."""
    decoder = copy.deepcopy(frozen.vae.decoder)
    half = torch.arange(BANDS) < BANDS // 2
    written = decoder.linear.weight.unflatten(0, (-1, BANDS))
    written[:, half, 1] = 0
    written[:, ~half, 0] = 0
    mels = torch.full((2, len(STEMS), 32, BANDS), FLOOR)
    mels[:, 0, :, half] = 0.0
    mels[:, 1, :, ~half] = 0.0
    low, high = train_unet.error_metric(decoder, torch.ones(Z), mels)[:2, :, :2].square().sum(1)
    assert low[0] > 1.5 * low[1]
    assert high[1] > 1.5 * high[0]


def test_a_favoured_stem_is_asked_for_more_and_weighs_more(frozen: Frozen) -> None:
    windows = draw([song(0)], 96, np.random.default_rng(0), frames=LENGTH * LATENT_FRAMES)
    plain, favoured = (make_batch(windows, frozen, np.random.default_rng(1), f) for f in (None, 0))
    known = [b.inputs["context_mask"].mean((0, 2)) for b in (plain, favoured)]
    assert known[1][0] < 0.8 * known[0][0]
    assert known[1][0] < 0.8 * known[1][1:].min()
    assert favoured.loss_mask[:, 0].max() == train_unet.FAVOUR and favoured.loss_mask[:, 1:].max() == 1


def test_the_harmony_is_held_as_it_was_trained(tmp_path: Path) -> None:
    sizes = StemUNetConfig(channels=Z, tones=12, film=FILM, width=16, inner=16, cond=16, harmony=16, heads=2)
    torch.manual_seed(0)
    trained, model, begun = StemUNet(sizes), StemUNet(sizes), StemUNet(sizes)
    assert trained.harmony is not None and model.harmony is not None
    for name, network in (("harmony", trained.harmony), ("unet", begun)):
        (tmp_path / name).mkdir()
        weights = {"model": network.state_dict(), "ema": network.state_dict(), "step": 3}
        torch.save(weights, tmp_path / name / "checkpoint.pt")
    train_unet.hold_harmony(model, tmp_path / "harmony", tmp_path / "unet")
    assert not any(weight.requires_grad for weight in model.harmony.parameters())
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "harmony." not in name)
    resumed = torch.load(tmp_path / "unet" / "checkpoint.pt", weights_only=True)
    assert resumed["step"] == 3
    for name, weight in trained.harmony.state_dict().items():
        assert torch.equal(model.harmony.state_dict()[name], weight)
        assert all(torch.equal(resumed[kind][f"harmony.{name}"], weight) for kind in ("model", "ema"))
    for name, weight in begun.state_dict().items():
        assert name.startswith("harmony.") or torch.equal(resumed["ema"][name], weight)
    with pytest.raises(ValueError, match="no harmony"):
        train_unet.hold_harmony(StemUNet(replace(sizes, tones=0)), tmp_path / "harmony", tmp_path / "unet")


def test_statistics_are_measured_once(
    tmp_path: Path, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae_config, towers_config = frozen.vae.config, frozen.towers.config
    for name, model in (("vae", frozen.vae), ("towers", frozen.towers)):
        (tmp_path / name).mkdir()
        torch.save({"ema": model.state_dict()}, tmp_path / name / "checkpoint.pt")
    frozen.tokenizer.save(str(tmp_path / "towers" / "tokenizer.json"))
    limits = '{"brightness": [[1, 2], [1, 2], [1, 2], [1, 2], [1, 2]], "density": [3, 4]}'
    (tmp_path / "towers" / "thresholds.json").write_text(limits)
    monkeypatch.setattr(train_unet, "PatchVAEConfig", lambda **given: replace(vae_config, **given))
    monkeypatch.setattr(train_unet, "CaptionTowersConfig", lambda **given: replace(towers_config, **given))
    monkeypatch.setattr(train_unet, "draw", lambda songs, batch, rng: draw(songs, batch, rng, frames=32))
    statistics = tmp_path / "unet" / "latents.pt"  # the harmony is trained before that folder is there
    first = train_unet.freeze(tmp_path / "vae", tmp_path / "towers", statistics, [song(0)])
    again = train_unet.freeze(tmp_path / "vae", tmp_path / "towers", statistics, [song(1)])
    assert first.scale == again.scale and torch.equal(first.metric, again.metric)
    weight = first.metric.mT @ first.metric
    assert weight.diagonal(dim1=1, dim2=2).mean(1).tolist() == pytest.approx([1] * len(STEMS))
    assert first.thresholds == Thresholds(((1, 2),) * 5, (3, 4))
    windows = draw([song(0)], 64, np.random.default_rng(0), frames=32)
    latents, _ = first.vae.moments(windows.mels.flatten(0, 1)[:, None])
    assert float((latents * first.scale).std()) == pytest.approx(1, rel=1e-4)


def test_splits_take_their_share_and_leave_the_others_their_proportion() -> None:
    shares = with_splits(SHARES, 0.1)
    assert shares["split"] == 0.1 and sum(shares.values()) == pytest.approx(1)
    assert shares["fill"] / shares["generate"] == pytest.approx(SHARES["fill"] / SHARES["generate"])
    assert with_splits(SHARES, SHARES["split"]) == pytest.approx(SHARES)
    with pytest.raises(ValueError, match="from 0 to 1"):
        with_splits(SHARES, 1.1)
