"""The decoder's training against a critic: it learns from latents as the sampler leaves them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundle import load_bundle
from engine.manifest import Manifest
from engine.model import Model
from engine.samplers import sample_distilled
from engine.schedule import make_schedule
from export.patch_vae import PatchVAE, PatchVAEConfig, steadied
from export.stem_unet import StemUNet, StemUNetConfig
from training import loop
from training.add_decoder import add_decoder
from training.add_decoder import main as add_decoder_command
from training.distill import STEPS, clean_from, keeping
from training.from_bundle import read_weights
from training.loop import write_checkpoint
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
from training.stems import STEMS
from training.train_decoder import (
    CRITIC_PACE,
    CROP,
    NOISE,
    ROWS,
    SLOWED,
    Landing,
    Pairs,
    Rivals,
    as_before,
    change_error,
    compare,
    compare_held,
    critic_error,
    distance,
    exact,
    held,
    land,
    level_error,
    noisy,
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


def test_what_is_cropped_stays_together_and_was_made_as_asked(batch: Batch, unet: StemUNet) -> None:
    whole = land(unet, batch, 3, ALPHAS, scale=1.0)
    for seed in range(10):
        part = whole.crop(np.random.default_rng(seed))
        rows = []
        for latents, mel in zip(part.latents, part.mels, strict=True):
            row, start = next(
                (row, start)
                for row in range(2 * S)
                for start in range(T - CROP + 1)
                if torch.equal(mel, whole.mels[row][:, frames(start)])
            )
            rows.append(row)
            assert torch.equal(latents, whole.latents[row, :, start : start + CROP])
        assert sorted(rows) == [0, 4, 6, 7], "not the drums that rest although they were asked to play"
    many = Landing(*(torch.cat([x, x]) for x in (whole.latents, whole.mels, whole.made, whole.asked)))
    many = replace(many, asked=torch.ones_like(many.asked), made=torch.ones_like(many.made))
    assert len(many.crop(np.random.default_rng(5)).latents) == ROWS
    assert not len(replace(many, made=~many.made).crop(np.random.default_rng(5)).mels)


def test_half_of_what_is_known_gets_noise() -> None:
    torch.manual_seed(0)
    known = Pairs(torch.zeros(40, Z, CROP, 1), torch.rand(40, 1, CROP * LATENT_FRAMES, GEOMETRY.n_mels))
    heard = noisy(known, np.random.default_rng(1))
    deviations = heard.latents.std((1, 2, 3))
    assert torch.equal(heard.mels, known.mels)
    assert 0.2 < (deviations == 0).float().mean() < 0.8
    assert 0.5 * NOISE < deviations.max() < 1.1 * NOISE


def test_held_sounds_are_those_of_pitched_stems_slowed() -> None:
    frames = CROP * LATENT_FRAMES
    rising = torch.linspace(-6, 0, frames)[None, None, :, None] + torch.zeros(2, S, 1, GEOMETRY.n_mels)
    rising[:, STEMS.index("drums")] = 7.0
    rising[0, STEMS.index("bass")] = FLOOR
    seen = [held(rising, np.random.default_rng(seed)) for seed in range(20)]
    sounding = [mels for mels in seen if len(mels)]
    assert 0 < len(sounding) < len(seen), "what is too quiet is no sound to hold"
    for mels in sounding:
        assert mels.shape == (5, 1, frames, GEOMETRY.n_mels), (
            "the bass that rests and both drums are left out"
        )
        steps = mels.diff(dim=2)
        slow = 6 / (frames - 1) * (frames / SLOWED - 1) / (frames - 1)
        assert torch.allclose(steps, torch.full_like(steps, slow), atol=1e-5)


def test_a_pattern_in_what_is_held_is_an_error_of_its_changes_and_is_reported(rivals: Rivals) -> None:
    rivals.decoder.linear.weight.data.zero_()
    pattern = torch.tensor([0.2, -0.2, 0.1, -0.1]).repeat_interleave(GEOMETRY.n_mels) / VAE.scale
    rivals.decoder.linear.bias.data.fill_(5.0).add_(pattern)
    latents = torch.randn(2, Z, CROP, 1)
    drawn = rivals.decoder(latents).detach()
    flat = drawn.mean(2, keepdim=True).expand_as(drawn)
    assert change_error(drawn + 1, drawn) < 1e-6
    assert change_error(drawn, flat).item() == pytest.approx((0.4 + 0.3 + 0.2 + 0.3) / 4, abs=0.01)
    found = compare_held(rivals.decoder, Pairs(latents, flat - 0.5))
    assert found["pattern"] == pytest.approx(np.std([0.2, -0.2, 0.1, -0.1]), abs=1e-3)
    assert found["l1_held"] == pytest.approx(0.5, abs=1e-3)


def pairs_of(batch: Batch, unet: StemUNet, start: int) -> dict[str, Pairs]:
    """Pairs of each kind: those of a landing for what was made, other mels for what is known and held."""
    torch.manual_seed(5)
    vae = PatchVAE(VAE)
    mels = batch.mels[:, :, : CROP * LATENT_FRAMES] + 2  # loud enough to be held
    return {
        "made": land(unet, batch, start, ALPHAS, scale=1.0).crop(np.random.default_rng(0)),
        "known": exact(vae, mels.flatten(0, 1)[:, None]),
        "held": exact(vae, held(mels, np.random.default_rng(0))),
        "basses": exact(vae, mels[:, :1]),
    }


def distances(rivals: Rivals, given: dict[str, Pairs]) -> torch.Tensor:
    estimates = {name: rivals.decoder(pairs.latents) for name, pairs in given.items()}
    return distance(estimates, {name: pairs.mels for name, pairs in given.items()})[0]


def learn_to_tell(rivals: Rivals, made: Pairs) -> None:
    optimiser = torch.optim.Adam(rivals.critic.parameters(), lr=5e-3)
    estimate = rivals.decoder(made.latents).detach()
    for _ in range(20):
        error = critic_error(*(rivals.critic(x) for x in (estimate, made.mels)))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    assert error < 1.8


def test_each_rival_is_moved_by_its_own_error_alone(
    batch: Batch, unet: StemUNet, rivals: Rivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gradients are compared to a thousandth, which bfloat16 does not have
    monkeypatch.setattr(loop, "_bfloat16_is_faster", lambda: False)
    given = pairs_of(batch, unet, 2)
    made = given["made"]
    learn_to_tell(rivals, made)
    torch.manual_seed(4)
    rivals_loss(rivals, given, "cpu")[0].backward()
    moved = {name: weight.grad.clone() for name, weight in rivals.named_parameters()}
    torch.manual_seed(4)
    estimate = rivals.decoder(made.latents).detach()
    judged = (rivals.critic(x) for x in (estimate, made.mels))
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
    own = distances(rivals, given)
    for (name, weight), wanted in zip(
        rivals.decoder.named_parameters(),
        torch.autograd.grad(own, list(rivals.decoder.parameters())),
        strict=True,
    ):
        assert torch.allclose(weight.grad, wanted, rtol=1e-3, atol=1e-6), name
    assert not torch.allclose(moved["decoder.linear.weight"], rivals.decoder.linear.weight.grad, rtol=1e-2)


def test_beside_its_critic_the_decoder_nears_the_truth(batch: Batch, unet: StemUNet, rivals: Rivals) -> None:
    given = pairs_of(batch, unet, 3)
    optimiser = torch.optim.Adam(rivals.parameters(), lr=2e-3)
    rows = []
    for _ in range(25):
        loss, logs = rivals_loss(rivals, given, "cpu")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rows.append(logs)
    for kind in given:
        assert rows[-1][kind] < 0.9 * rows[0][kind]


def test_without_anything_made_or_held_there_is_no_critic(rivals: Rivals) -> None:
    mels = FLOOR + 6 * torch.rand(2, 1, CROP * LATENT_FRAMES, GEOMETRY.n_mels)
    known, nothing = Pairs(torch.randn(2, Z, CROP, 1), mels), Pairs(torch.zeros(0, Z, CROP, 1), mels[:0])
    given = {"made": nothing, "known": known, "held": nothing, "basses": nothing}
    loss, logs = rivals_loss(rivals, given, "cpu")
    loss.backward()
    assert set(logs) == {"levels", "known", "known_changes"}
    assert all(weight.grad is not None and not weight.grad.any() for weight in rivals.critic.parameters())


def test_what_is_kept_has_no_critic_and_holds_the_decoder_where_it_began(
    batch: Batch, unet: StemUNet, rivals: Rivals
) -> None:
    given = pairs_of(batch, unet, 2)
    began_as = copy.deepcopy(rivals.decoder)
    kept = as_before(began_as, given.pop("made"))
    basses = given["basses"]
    was = (as_before(began_as, basses).mels - basses.mels).abs().mean()
    moved = {}
    for name, kinds in (("kept", given | {"kept": kept}), ("free", given)):
        learner = copy.deepcopy(rivals)
        optimiser = torch.optim.Adam(learner.parameters(), lr=1e-3)
        for _ in range(25):
            loss, logs = rivals_loss(learner, kinds, "cpu")
            assert "critic" not in logs
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            moved[name] = (learner.decoder(kept.latents) - kept.mels).abs().mean().item()
            near = (learner.decoder(basses.latents) - basses.mels).abs().mean()
        assert near < 0.95 * was, "and the basses are learned beside it"
    assert 0 < moved["kept"] < 0.7 * moved["free"]


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


def test_a_bundle_takes_the_decoder_and_keeps_all_else(tiny_default_bundle: Path, tmp_path: Path) -> None:
    before = load_bundle(tiny_default_bundle)
    old = read_weights(before.path("vae_decoder.onnx"))
    torch.manual_seed(6)
    run = _trained(tmp_path, before.manifest)
    vae = with_decoder(PatchVAE(PatchVAEConfig(**before.manifest.networks["vae_decoder"])), run)
    made = add_decoder(tiny_default_bundle, tmp_path / "made", "9", run=run, share=0.25)
    changed = {name for name in made.files if made.files[name] != before.manifest.files[name]}
    assert changed == {"vae_decoder.onnx"} and made.files.keys() == before.manifest.files.keys()
    assert made.provenance["training"]["decoder"] == {"steps": 5, "minutes": 1.3, "share": 0.25}
    found = read_weights(tmp_path / "made" / "vae_decoder.onnx")
    for name, weight in vae.decoder.state_dict().items():
        assert not torch.allclose(old[name], weight, atol=1e-2), "they can be told apart"
        assert torch.allclose(found[name], 0.75 * old[name] + 0.25 * weight, atol=1e-3), name
    again = add_decoder(tmp_path / "made", tmp_path / "again", "10", run=run)
    spent = {"steps": 10, "minutes": 2.6, "share": 1.0}
    assert again.provenance["training"]["decoder"] == spent, "trained from the one before"


def test_a_bundle_steadies_what_its_decoder_writes(tiny_default_bundle: Path, tmp_path: Path) -> None:
    before = load_bundle(tiny_default_bundle)
    made = add_decoder(tiny_default_bundle, tmp_path / "made", "9", steady=0.3)
    changed = {name for name in made.files if made.files[name] != before.manifest.files[name]}
    assert changed == {"vae_decoder.onnx"} and made.version == "9"
    assert made.networks["vae_decoder"]["steady"] == 0.3
    assert made.provenance.get("training") == before.manifest.provenance.get("training")
    latents = np.random.default_rng(1).standard_normal((2, before.manifest.latent_shape[1], 6, 1), np.float32)
    mels = [Model.open(path, "cpu", 1).decode(latents) for path in (tiny_default_bundle, tmp_path / "made")]
    expected = steadied(torch.from_numpy(np.float32(mels[0]))[:, None], 0.3)[:, 0]
    assert np.allclose(mels[1], expected, atol=1e-4)
    assert not np.allclose(mels[0], mels[1], atol=1e-2)
    again = add_decoder(tmp_path / "made", tmp_path / "again", "10", run=_trained(tmp_path, made))
    assert again.networks["vae_decoder"]["steady"] == 0.3, "another decoder is steadied as the one before"
    off = add_decoder(tmp_path / "made", tmp_path / "off", "11", steady=0)
    assert off.files["vae_decoder.onnx"] == before.manifest.files["vae_decoder.onnx"]


def test_add_decoder_wants_something_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["add_decoder", "--bundle", "a", "--out", "b", "--version", "1"])
    with pytest.raises(SystemExit) as stopped:
        add_decoder_command()
    assert stopped.value.code == 2 and "--run or --steady" in capsys.readouterr().err


def _trained(run: Path, manifest: Manifest) -> Path:
    """The folder, with a checkpoint of a decoder for that manifest's bundle."""
    trained = Rivals(PatchVAE(PatchVAEConfig(**manifest.networks["vae_decoder"])).decoder)
    for weight in trained.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    write_checkpoint({"ema": trained.state_dict()}, run)
    (run / "log.jsonl").write_text('{"step": 5, "minutes": 1.26}\n')
    return run
