"""python -m training.from_bundle: a shipped bundle's weights as training folders, to train on from there.

Writes vae/, towers/, unet/, a trained harmony/ and distilled/ with a checkpoint each, as the training
commands leave them but for the optimisers' state, which a bundle does not hold. Where training/mel.py has
other bands than the bundle, the layers that read or write bands are made anew such that the latents stay
close to those that the UNet knows; a short training of the VAE makes up for the rest. Where the bundle's
latents have no tones, these are added, untrained, and neither decoder nor UNet takes notice of them yet:
`train_vae --tones-only` and `train_harmony` come first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from torch import nn

from engine.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from engine.features import mel_edges
from engine.manifest import Mel
from export.caption_towers import CaptionTowers, CaptionTowersConfig
from export.patch_vae import PatchVAE, PatchVAEConfig
from export.separator import Separator, SeparatorConfig
from export.stem_unet import StemUNet, StemUNetConfig
from training.captions import measure_thresholds
from training.dataset import load_songs
from training.mel import GEOMETRY, TONES
from training.train_unet import STATISTICS
from training.train_vae import batch_of_mels

WEAKEST = 0.5  # singular value
RIDGE = 10.0
HALVED = ".float16"  # ending of the names of weights that export/onnx_writer.py stores as float16


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every named weight of a graph of the default family, in float32."""
    tensors = onnx.load(str(path)).graph.initializer
    return {t.name.removesuffix(HALVED): torch.tensor(numpy_helper.to_array(t)).float() for t in tensors}


def spread(before: Mel, after: Mel) -> torch.Tensor:
    """(bands after, bands before): reads a spectrogram of `before` at the centres of the bands of `after`."""
    old, new = mel_edges(before)[1:-1], mel_edges(after)[1:-1]
    position = np.interp(new, old, np.arange(len(old)))
    distance = np.abs(position[:, None] - np.arange(len(old)))
    return torch.from_numpy(np.maximum(0, 1 - distance)).float()


def gathered(before: Mel, after: Mel) -> torch.Tensor:
    """(bands before, bands after): a band of `before` is the mean of those of `after` under its triangle."""
    edges, centres = mel_edges(before), mel_edges(after)[1:-1]
    rising = (centres - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - centres) / np.diff(edges)[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    empty = weights.sum(1) == 0
    weights[empty, np.abs(centres - edges[1:-1, None]).argmin(1)[empty]] = 1
    return torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()


def fill_in(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """`network` with these weights. Raises ValueError where one is missing or of another shape."""
    state = network.state_dict()
    for name, tensor in state.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"the bundle has no weight {name} of shape {tuple(tensor.shape)}")
        state[name] = weights[name].to(tensor.dtype)
    network.load_state_dict(state)
    return network


def read_vae(bundle: Bundle) -> PatchVAE:
    """The VAE, its bands interpolated to those of training/mel.py."""
    before, after = bundle.manifest.mel, GEOMETRY
    sizes = PatchVAEConfig(**bundle.manifest.networks["vae_encoder"])
    encoder, decoder = (read_weights(bundle.path(f"vae_{part}.onnx")) for part in ("encoder", "decoder"))
    reading, writing = gathered(before, after), spread(before, after)
    for name in ("linear.weight", "inward.weight"):
        bands = encoder[name].unflatten(1, (sizes.frames, sizes.mels))
        encoder[name] = (bands @ reading).flatten(1)
    for name in ("linear", "outward"):
        bands = decoder[f"{name}.weight"].unflatten(0, (sizes.frames, sizes.mels))
        decoder[f"{name}.weight"] = torch.einsum("nb,fbc->fnc", writing, bands).flatten(0, 1)
        decoder[f"{name}.bias"] = (decoder[f"{name}.bias"].reshape(sizes.frames, -1) @ writing.T).flatten()
    vae = PatchVAE(replace(sizes, mels=after.n_mels, tones=TONES))
    if sizes.tones < TONES:
        encoder |= {name: w for name, w in vae.encoder.state_dict().items() if name.startswith("tones.")}
        for name in ("linear.weight", "inward.weight"):
            decoder[name] = nn.functional.pad(decoder[name], (0, TONES - sizes.tones))
    fill_in(vae.encoder, encoder)
    fill_in(vae.decoder, decoder)
    return vae


@torch.no_grad()
def aligned(vae: PatchVAE, mels: torch.Tensor) -> None:
    """Lets the linear layers carry what principal components of the new bands can, on the old latents' axes.

    mels (N, 1, frames, bands). An interpolated VAE neither sees nor writes what the new bands tell more. So
    the latents become a linear map of the new principal components, the least-squares one to the old
    latents, but none of its directions falls below WEAKEST: what the old latents did not hold goes there.
    The decoder's linear layer inverts it; its convolutions add what is left, by ridge regression.
    """
    c = vae.config
    latents = _vectors(vae.moments(mels)[0][:, : c.channels])
    plain = PatchVAE(replace(c, tones=0))
    plain.set_principal_components(mels.reshape(-1, c.frames * c.mels))
    components = _vectors(plain.moments(mels)[0][:, : c.channels])
    solution = torch.linalg.lstsq(_with_one(components), latents).solution
    u, values, v = torch.linalg.svd(solution[:-1])
    there, offset = u @ torch.diag(values.clamp_min(WEAKEST)) @ v, solution[-1]
    linear = plain.encoder.linear
    vae.encoder.linear.weight.copy_(there.T @ linear.weight)
    vae.encoder.linear.bias.copy_(there.T @ linear.bias + offset)
    vae.encoder.outward.weight[: c.channels] = 0
    vae.encoder.outward.bias[: c.channels] = 0
    back = plain.decoder.linear.weight @ torch.linalg.inv(there).T
    vae.decoder.linear.weight[:, : c.channels] = back
    vae.decoder.linear.bias.copy_(plain.decoder.linear.bias - back @ offset)
    _refit(vae, mels)


def _refit(vae: PatchVAE, mels: torch.Tensor) -> None:
    """The decoder's last layer, so that it adds what its linear layer leaves."""
    c, decoder = vae.config, vae.decoder
    latents = vae.moments(mels)[0][..., 0].transpose(1, 2)
    hidden = decoder.inward(latents)
    for block in decoder.blocks:
        hidden = block(hidden)
    features = _with_one(decoder.norm(hidden).flatten(0, 1))
    picture = ((mels - math.log(c.floor)) / c.scale).reshape(-1, c.frames * c.mels)
    left = picture - decoder.linear(latents).flatten(0, 1)
    ridge = features.T @ features + RIDGE * torch.eye(features.shape[1])
    solution = torch.linalg.solve(ridge, features.T @ left)
    decoder.outward.weight.copy_(solution[:-1].T)
    decoder.outward.bias.copy_(solution[-1])


def _vectors(latents: torch.Tensor) -> torch.Tensor:
    """(N, Z, T, 1) -> (N T, Z)."""
    return latents[..., 0].transpose(1, 2).flatten(0, 1)


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def read_towers(bundle: Bundle) -> CaptionTowers:
    """Text and audio tower; the temperature starts anew."""
    towers = CaptionTowers(
        replace(CaptionTowersConfig(**bundle.manifest.networks["clap_text"]), mels=GEOMETRY.n_mels)
    )
    fill_in(towers.text, read_weights(bundle.path("clap_text.onnx")))
    audio = read_weights(bundle.path("clap_audio.onnx"))
    reading = gathered(bundle.manifest.mel, GEOMETRY)
    audio["inward.weight"] = torch.einsum("obk,bn->onk", audio["inward.weight"], reading)
    fill_in(towers.audio, audio)
    return towers


def read_unet(bundle: Bundle, tones: int | None = None, *, distilled: bool = False) -> StemUNet:
    """The UNet, for latents with so many tones, the bundle's own where none are given.

    Tones that the bundle's latents lack are not read, and what writes them is untrained. distilled: with what
    it has for that, too, which another training of the rest makes worthless.
    """
    sizes = StemUNetConfig(**bundle.manifest.networks["unet"])
    sizes = sizes if distilled else replace(sizes, distilled=0, weakened=False)
    weights = read_weights(bundle.path("unet.onnx"))
    more = 0 if tones is None else tones - sizes.tones
    unet = StemUNet(replace(sizes, channels=sizes.channels + more, tones=sizes.tones + more))
    if more:
        state = unet.state_dict()
        weights |= {name: state[name] for name in state if name.startswith(("harmony.", "hear."))}
        read = torch.zeros_like(unet.inward.weight)
        read[:, _places(sizes, unet.config.channels)] = weights["inward.weight"]
        weights["inward.weight"] = read
    fill_in(unet, weights)
    return unet


def read_separator(bundle: Bundle) -> Separator:
    """The separator of a bundle that declares one; attention that it lacks is new and adds nothing yet."""
    network = Separator(SeparatorConfig(**bundle.manifest.networks["separator"]))
    attention = {n: w for n, w in network.state_dict().items() if ".along." in n or ".within." in n}
    fill_in(network, attention | read_weights(bundle.path("separator.onnx")))
    return network


def _places(sizes: StemUNetConfig, channels: int) -> torch.Tensor:
    """Where each column of the UNet's first layer is when latents have `channels` channels."""
    kept = torch.arange(channels) < sizes.channels
    mask = torch.ones(sizes.stems, dtype=torch.bool)
    rest = torch.ones(1 + sizes.stems + sizes.grid + sizes.chords, dtype=torch.bool)
    return torch.cat([kept.repeat(2 * sizes.stems), mask, kept, rest]).nonzero()[:, 0]


def _write(network: nn.Module, folder: Path, minutes: float, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=False)
    weights = network.state_dict()
    state = {"model": weights, "ema": weights, "step": step, "spent": minutes * 60}
    torch.save(state, folder / "checkpoint.pt")
    (folder / "log.jsonl").write_text(json.dumps({"step": step, "minutes": minutes}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help=f"default: engine/{DEFAULT_BUNDLE}")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ of training.render")
    parser.add_argument(
        "--runs", type=Path, required=True, help="where vae/, towers/, harmony/, unet/ and separator/ will be"
    )
    args = parser.parse_args()
    bundle = load_bundle(args.bundle)
    songs = load_songs(args.data / "train")
    spent = bundle.manifest.provenance["training"]
    vae, towers = read_vae(bundle), read_towers(bundle)
    unet = read_unet(bundle, TONES)
    if bundle.manifest.mel != GEOMETRY:
        aligned(vae, batch_of_mels(songs, 64, np.random.default_rng(0)))
    networks: dict[str, nn.Module] = {"vae": vae, "towers": towers, "unet": unet}
    if "harmony" in spent and unet.harmony is not None:
        networks["harmony"] = unet.harmony
    if unet.config.tones == TONES and bundle.manifest.distilled is not None:
        networks["distilled"] = read_unet(bundle, TONES, distilled=True)
    if bundle.manifest.separator is not None:
        networks["separator"] = read_separator(bundle)
    for name, network in networks.items():
        _write(network, args.runs / name, spent[name]["minutes"], spent[name]["steps"])
    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.save(str(args.runs / "towers" / "tokenizer.json"))
    thresholds = args.runs / "towers" / "thresholds.json"
    thresholds.write_text(json.dumps(asdict(measure_thresholds(songs))))
    # the rest is measured when the VAE has been trained on
    torch.save({"scale": bundle.manifest.latent.scale_factor}, args.runs / "unet" / STATISTICS)
    print(f"{args.runs}: {bundle.manifest.name} {bundle.manifest.version}, {GEOMETRY.n_mels} bands")


if __name__ == "__main__":
    main()
