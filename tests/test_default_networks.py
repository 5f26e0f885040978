"""What the default family's networks compute, and the tokenizer that is shipped with them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from training_songs import song

from engine.manifest import (
    Chords,
    Clap,
    Distilled,
    Grid,
    Latent,
    Level,
    Manifest,
    Mel,
    NoiseSchedule,
    Sampling,
    Vocoder,
    Weakened,
)
from engine.model import Asked, Model
from export.blocks import ConvBlock
from export.bundle_writer import export_bundle
from export.caption_towers import CaptionTowers, CaptionTowersConfig
from export.patch_vae import PatchVAE, PatchVAEConfig, steadied
from export.stem_unet import StemUNet, StemUNetConfig, timestep_embedding, weakened
from export.vocos import InverseFFT, Vocos, VocosConfig
from training.captions import encode, for_prompts, make_tokenizer
from training.mel import LATENT_FRAMES
from training.stems import STEMS

MELS, CHANNELS, FILM = 16, 4 + 12, 8
GEOMETRY = Mel(
    sample_rate=16000, n_fft=256, win_length=256, hop=32, n_mels=MELS, f_min=0, f_max=8000, floor=1e-4
)
UNET = StemUNetConfig(
    channels=CHANNELS, film=FILM, width=16, inner=16, blocks_down=1, blocks_up=1, layers=1, heads=2, cond=16,
    tones=12, harmony=16, harmony_blocks=1, harmony_guidance=2.0,
)  # fmt: skip
FEW = replace(UNET, distilled=1000, adapter=4, weakened=True)
VAE = PatchVAEConfig(
    mels=MELS, channels=4, width=8, encoder_blocks=1, decoder_blocks=1, tones=12, tones_width=8
)
VOCOS = VocosConfig(mels=MELS, width=8, blocks=1, n_fft=64, split=2)


def towers_config(vocabulary: int) -> CaptionTowersConfig:
    return CaptionTowersConfig(
        vocabulary=vocabulary, embedding=FILM, text_width=8, mels=MELS, audio_width=8, audio_blocks=1
    )


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with no weight left at zero, where training starts many."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return module.eval().requires_grad_(False)


def unet_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    stems = len(STEMS)
    return {
        "latents": torch.randn(batch, stems, CHANNELS, length, 1),
        "timestep": torch.arange(batch) * 300 + 10,
        "film": torch.randn(batch, FILM),
        "context": torch.randn(batch, stems, CHANNELS, length, 1),
        "context_mask": torch.ones(batch, stems, length),
        "mixture": torch.randn(batch, CHANNELS, length, 1),
        "mixture_mask": torch.ones(batch, length),
        "mixture_stems": torch.ones(batch, stems),
        "grid": torch.randn(batch, length, 6),
        "chords": torch.randn(batch, length, 25),
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, CaptionTowers]:
    tokenizer = make_tokenizer([song(0)])
    towers = random(CaptionTowers(towers_config(tokenizer.get_vocab_size())), 1)
    vae = random(PatchVAE(VAE), 2)
    uncond = towers.text(*encode(tokenizer, [""]))[0]
    manifest = Manifest(
        name="small",
        licence="CC0-1.0",
        stems=STEMS,
        mel=GEOMETRY,
        latent=Latent(channels=CHANNELS, frames=LATENT_FRAMES, freq=1, scale_factor=1.0),
        vocoder=Vocoder(sample_rate=16000, hop=32, trim=0),
        schedule=NoiseSchedule(start=0.0015, end=0.0195, steps=1000),
        prediction="v",
        sampling=Sampling(sampler="dpmpp_2m", steps=2),
        window_frames=64,
        capabilities=("text", "audio", "context", "mixture", "grid", "chords", "distilled", "weakened"),
        distilled=Distilled(steps=3, listening=1.5),
        weakened=Weakened(),
        film_dim=FILM,
        film_uncond=tuple(uncond.tolist()),
        clap=Clap(tokenizer="tokenizer.json"),
        grid=Grid(),
        chords=Chords(),
        level=Level(mixture_db=-8.0, context_db=-9.5),
    )
    networks = {
        "unet": random(StemUNet(FEW), 3),
        "vae_encoder": vae.encoder,
        "vae_decoder": vae.decoder,
        "vocoder": random(Vocos(VOCOS), 4),
        "clap_text": towers.text,
        "clap_audio": towers.audio,
    }
    out = tmp_path_factory.mktemp("family") / "bundle"
    extra = {"tokenizer.json": for_prompts(tokenizer).to_str(pretty=True).encode()}
    # an odd and an even length: the UNet halves time once
    written = export_bundle(out, manifest, networks, extra=extra, times=(15, 22))
    return out, written, towers


def test_every_graph_equals_torch(bundle: tuple[Path, Manifest, CaptionTowers]) -> None:
    errors = bundle[1].provenance["export"]["relative_error"]
    assert set(errors) == {"unet", "vae_encoder", "vae_decoder", "vocoder", "clap_text", "clap_audio"}
    assert max(errors.values()) <= 1e-4


def test_the_shipped_tokenizer_drops_unknown_words(bundle: tuple[Path, Manifest, CaptionTowers]) -> None:
    out, manifest, towers = bundle
    model = Model.open(out, "cpu", 1)
    nothing = model.embed_text("xyzzy")
    assert np.allclose(nothing, [manifest.film_uncond], atol=1e-5)
    known = model.embed_text("Slow piano")
    assert np.array_equal(known, model.embed_text("slow, plugh piano!"))
    assert np.abs(known - nothing).max() > 0.01
    expected = towers.text(*encode(make_tokenizer([song(0)]), ["slow piano"])).numpy()
    assert np.allclose(known, expected, atol=1e-5)


@pytest.mark.parametrize("n_fft", [4, 64, 1024])
def test_inverse_fft_is_torchs(n_fft: int) -> None:
    torch.manual_seed(0)
    spectrum = torch.randn(2, 3, n_fft // 2 + 1, dtype=torch.complex64)
    expected = torch.fft.irfft(spectrum, n_fft)
    assert torch.allclose(InverseFFT(n_fft)(spectrum.real, spectrum.imag), expected, atol=1e-6)


def test_inverse_fft_needs_a_square() -> None:
    with pytest.raises(ValueError, match="square"):
        InverseFFT(512)


def test_tables_are_no_weights() -> None:
    names = set(Vocos(VOCOS).state_dict())
    assert not any("inverse" in name or "window" in name for name in names)


@pytest.mark.parametrize(("frames", "split"), [(7, 2), (8, 1), (1, 4)])
def test_the_vocoder_writes_its_hop_per_mel_frame(frames: int, split: int) -> None:
    config = VocosConfig(mels=MELS, width=8, blocks=1, n_fft=64, split=split)
    audio = random(Vocos(config))(torch.randn(2, MELS, frames))
    assert audio.shape == (2, 1, frames * split * 16)
    assert torch.isfinite(audio).all()
    loud = random(Vocos(config))(torch.full((1, MELS, frames), 200.0))
    assert torch.isfinite(loud).all(), "magnitudes are bounded"


def test_overlapping_frames_of_a_signal_give_it_back() -> None:
    hop, n_fft = 16, 64
    signal = torch.randn(1, 40 * hop)
    # frame i is centred on sample (i + 1) hop
    padded = nn.functional.pad(signal, (hop, 2 * hop))
    frames = padded.unfold(1, n_fft, hop)
    vocoder = Vocos(VOCOS)
    audio = vocoder._overlap(frames * vocoder.window)
    assert audio.shape == (1, 1, 40 * hop)
    assert torch.allclose(audio[0, 0, 2 * hop : -3 * hop], signal[0, 2 * hop : -3 * hop], atol=1e-5)


def test_the_vae_keeps_its_shapes_and_floor() -> None:
    vae = random(PatchVAE(VAE))
    mel = torch.randn(3, 1, 4 * 9, MELS) * 5
    mean, log_variance = vae.moments(mel)
    assert mean.shape == log_variance.shape == (3, CHANNELS, 9, 1)
    assert log_variance.min() >= -12 and log_variance.max() <= 4
    decoded = vae.decoder(mean)
    assert decoded.shape == mel.shape and decoded.min() >= np.log(VAE.floor)
    quiet = vae.decoder(torch.full((1, CHANNELS, 5, 1), -1e4))
    assert torch.isfinite(quiet).all()


def test_steadying_takes_the_pattern_of_patches_from_what_is_held_and_leaves_attacks() -> None:
    held = torch.linspace(-6, 0, MELS).expand(1, 1, 40, MELS)
    pattern = torch.tensor([0.03, -0.05, 0.04, -0.02]).repeat(10)[:, None]
    still = steadied(held + pattern, 0.2)[..., 8:-8, :] - held[..., 8:-8, :]
    assert still.abs().max() < 0.1 * pattern.abs().max()
    struck = held.clone()
    struck[..., 20:, :] += 4
    kept = steadied(struck, 0.2)
    assert torch.allclose(kept, struck, atol=0.02)
    assert torch.equal(steadied(held[..., :1, :], 0.2), held[..., :1, :]), (
        "a single frame has nothing beside it"
    )


def test_the_vae_starts_half_whitened() -> None:
    torch.manual_seed(0)
    vae = PatchVAE(VAE)
    patches = torch.randn(4000, 64) @ torch.randn(64, 64) + 3
    vae.set_principal_components(patches)
    latents = vae.encoder.linear((patches - np.log(VAE.floor)) / VAE.scale)
    assert torch.allclose(latents.mean(0), torch.zeros(VAE.channels), atol=1e-2)
    # in units of the divided log mel: deviations are square roots of the components' own
    values = torch.linalg.eigvalsh(torch.cov((patches / VAE.scale).T))[-VAE.channels :].flip(0)
    assert torch.allclose(latents.std(0), values**0.25, rtol=1e-2)
    covariance = torch.cov(latents.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-2


@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_the_unet_takes_any_length(length: int) -> None:
    inputs = unet_inputs(2, length)
    assert random(StemUNet(UNET))(**inputs).shape == inputs["latents"].shape


def test_the_unet_hears_every_input() -> None:
    unet, inputs = random(StemUNet(UNET)), unet_inputs(2, 12)
    before = unet(**inputs)
    for name in inputs:
        changed = inputs | {name: inputs[name] + 1}
        assert (unet(**changed) - before).abs().max() > 1e-4, name


def test_stems_of_a_mixture_that_is_not_there_say_nothing() -> None:
    unet, inputs = random(StemUNet(UNET)), unet_inputs(1, 12)
    inputs["mixture"], inputs["mixture_mask"] = torch.zeros(1, CHANNELS, 12, 1), torch.zeros(1, 12)
    without = unet(**(inputs | {"mixture_stems": torch.zeros(1, 4)}))
    assert torch.equal(unet(**inputs), without)


def test_guidance_moves_the_tones_away_from_what_nothing_told_would_give() -> None:
    guided, plain = (random(StemUNet(replace(UNET, harmony_guidance=weight))) for weight in (3.0, 1.0))
    plain.load_state_dict(guided.state_dict())
    inputs = unet_inputs(2, 12)
    untold = inputs | {
        name: torch.zeros_like(inputs[name]) for name in ("context", "context_mask", "grid", "chords")
    }
    told, alone = (plain(**given)[:, :, -12:] for given in (inputs, untold))
    found = guided(**inputs)
    assert torch.allclose(found[:, :, -12:], alone + 3 * (told - alone), atol=1e-4)
    assert torch.allclose(found[:, :, :-12], plain(**inputs)[:, :, :-12], atol=1e-5)
    assert torch.allclose(guided(**untold), plain(**untold), atol=1e-5)  # a split's mixture is not touched


def test_what_is_distilled_is_asked_for_past_the_schedule_and_changes_nothing_else() -> None:
    plain, few = random(StemUNet(UNET)), random(StemUNet(FEW))
    few.load_state_dict(plain.state_dict(), strict=False)
    inputs = unet_inputs(3, 13)
    ordinary = plain(**inputs)
    assert torch.equal(few(**inputs), ordinary)
    late = inputs["timestep"] + torch.tensor([1000, 0, 1000])
    mixed = few(**(inputs | {"timestep": late}))
    assert torch.allclose(mixed[1], ordinary[1], atol=1e-5), "samples of a batch are told apart"
    rest = (mixed - ordinary)[[0, 2]]
    assert rest[:, :, :-12].abs().amin((0, 1, 3)).max() > 1e-3
    assert torch.allclose(rest[:, :, -12:], torch.zeros(()), atol=1e-5), "the harmony is the same"
    new = StemUNet(FEW)
    new.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(new(**(inputs | {"timestep": late})), ordinary, atol=1e-5), (
        "untrained it adds nothing"
    )


def test_the_exported_unet_has_all_its_predictions(bundle: tuple[Path, Manifest, CaptionTowers]) -> None:
    model = Model.open(bundle[0], "cpu", 1)
    x = np.random.default_rng(0).normal(0, 1, (1, len(STEMS), CHANNELS, 15, 1)).astype(np.float32)
    made = {kind: model.denoiser({}, asked=kind)(x, 500) for kind in get_args(Asked)}
    for one, other in itertools.combinations(made.values(), 2):
        assert np.abs(one - other)[:, :, :-12].max() > 0.01
        assert np.abs(one - other)[:, :, -12:].max() < 1e-5


def test_a_weakened_prediction_is_that_of_fewer_blocks() -> None:
    sizes = replace(FEW, layers=3, blocks_up=3)
    unet, inputs = random(StemUNet(sizes)), unet_inputs(3, 15)
    less = weakened(unet)
    assert len(less.layers) == len(less.up) == 2 and len(unet.layers) == len(unet.up) == 3
    assert less.layers[1].qkv.weight.equal(unet.layers[2].qkv.weight)
    plain, wanted = unet(**inputs), less(**inputs)
    asked = inputs | {"timestep": inputs["timestep"] + torch.tensor([2000, 0, 2000])}
    found = unet(**asked)
    assert torch.allclose(found[[0, 2]], wanted[[0, 2]], atol=1e-5)
    assert torch.allclose(found[1], plain[1], atol=1e-5), "samples of a batch are told apart"
    assert (found - plain)[0].abs().max() > 0.01
    with pytest.raises(ValueError, match="distilled ones before"):
        StemUNet(replace(UNET, weakened=True))


def test_a_new_unet_predicts_nothing_and_attention_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    unet, inputs = StemUNet(UNET), unet_inputs(1, 12)
    assert not unet(**inputs).any()
    x, cond = torch.randn(1, 6, UNET.inner), torch.randn(1, UNET.cond)
    assert torch.equal(unet.layers[0](x, cond, *unet._rotation(x)), x)
    block = ConvBlock(8, 2.0, cond=16)
    y = torch.randn(1, 5, 8)
    assert torch.equal(block(y, cond), y)


def test_attention_depends_on_distances_only() -> None:
    unet = random(StemUNet(UNET))
    layer = unet.layers[0]
    x, cond = torch.randn(1, 6, UNET.inner), torch.zeros(1, UNET.cond)
    cos, sin = unet._rotation(torch.zeros(1, 40, UNET.inner))
    near, far = (layer(x, cond, cos[s : s + 6], sin[s : s + 6]) for s in (0, 30))
    assert torch.allclose(near, far, atol=1e-5)
    assert not torch.allclose(layer(x.flip(1), cond, cos[:6], sin[:6]).flip(1), near, atol=1e-4)


def test_timestep_embedding_by_hand() -> None:
    found = timestep_embedding(torch.tensor([0, 7]), 4)
    assert torch.equal(found[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    expected = [np.cos(7), np.cos(0.07), np.sin(7), np.sin(0.07)]
    assert torch.allclose(found[1], torch.tensor(expected).float(), atol=1e-6)


def test_towers_end_on_the_sphere_and_do_not_hear_padding() -> None:
    towers = random(CaptionTowers(towers_config(50)))
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    text = towers.text(ids, mask)
    assert torch.allclose(text.norm(dim=1), torch.ones(2))
    assert torch.allclose(text[:1], towers.text(ids[:1, :3], mask[:1, :3]), atol=1e-6)
    other = ids.clone()
    other[0, 3:] = 20
    assert torch.equal(towers.text(other, mask), text)
    empty = [towers.text(torch.tensor([[i]]), torch.tensor([[0]])) for i in (0, 3)]
    assert torch.equal(*empty) and torch.isfinite(empty[0]).all()
    audio = towers.audio(torch.randn(2, 1, 50, MELS))
    assert torch.allclose(audio.norm(dim=1), torch.ones(2))


def test_the_default_family_fits_in_the_repository() -> None:
    with torch.device("meta"):
        networks = [StemUNet(StemUNetConfig()), PatchVAE(PatchVAEConfig()), Vocos(VocosConfig())]
        networks.append(CaptionTowers(CaptionTowersConfig()))
    weights = sum(p.numel() for network in networks for p in network.parameters())
    assert 2 * weights < 40e6  # bytes in float16
