"""python tests/laion_reference.py WORDS OUT: what laion-clap's own code makes of a random model of its own.

Writes OUT/clap.pt as laion-clap's training saves one, and OUT/reference.npz with prompts and embeddings.
WORDS holds vocab.json and merges.txt. The text tower is a RoBERTa of two layers: roberta-base would be a
download.

A process of its own, for what laion-clap needs of its process: its folder on the path, with a `training` that
is not ours, and torchvision (for images and fusion), of which there is no build for a torch without CUDA.
Where torchvision is missing, empty names stand for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

# module -> what laion_clap imports from it
TORCHVISION = {
    "torchvision": ("datasets", "transforms", "ops"),
    "torchvision.datasets": (),
    "torchvision.transforms": (
        "CenterCrop",
        "Compose",
        "InterpolationMode",
        "Normalize",
        "RandomResizedCrop",
        "Resize",
        "ToTensor",
    ),
    "torchvision.ops": ("misc",),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
}
TEXTS = ("warm piano", "bright fast drums and a slow bass", "")
SECONDS = {"whole": 10.0, "short": 3.0, "one_and_a_half": 7.0}
RATE = 48000


def main(words: Path, out: Path) -> None:
    torch.manual_seed(0)
    clap = _random_clap(words)
    state = {f"module.{name}": value for name, value in clap.model.state_dict().items()}
    torch.save({"epoch": 3, "name": "random", "state_dict": state}, out / "clap.pt")
    arrays: dict[str, Any] = {"text": clap.get_text_embedding(list(TEXTS))}
    rng = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        audio = (0.1 * rng.standard_normal(round(seconds * RATE))).astype(np.float32)
        arrays |= {f"{name}_audio": audio, name: _embed(clap, audio)}
    np.savez(out / "reference.npz", **arrays)


def _embed(clap: Any, audio: np.ndarray) -> np.ndarray:
    """As MusicLDM's conditioner calls it, and as laion-clap itself does after rounding to 16 bits."""
    get_audio_features = vars(sys.modules[type(clap).__module__])["get_audio_features"]
    features = get_audio_features(
        {},
        torch.from_numpy(audio),
        10 * RATE,
        data_truncating="rand_trunc",
        data_filling="repeatpad",
        audio_cfg=clap.model_cfg["audio_cfg"],
    )
    with torch.no_grad():
        return clap.model.get_audio_embedding([features]).numpy()


def _random_clap(words: Path) -> Any:
    """laion-clap's own module, its weights random, its tables (front-end, masks) as they are."""
    import transformers  # before any stand-in: it looks for torchvision, too

    roberta = transformers.RobertaConfig(  # roberta-base's, but for the sizes
        vocab_size=320,
        num_hidden_layers=2,
        max_position_embeddings=130,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    tower = transformers.RobertaModel(roberta)
    tokenizer = transformers.RobertaTokenizer(str(words / "vocab.json"), str(words / "merges.txt"))
    transformers.RobertaModel.from_pretrained = staticmethod(lambda _: tower)
    transformers.RobertaTokenizer.from_pretrained = staticmethod(lambda _: tokenizer)
    _make_torchvision_importable()
    found = importlib.util.find_spec("laion_clap")
    assert found is not None and found.submodule_search_locations
    sys.path.insert(0, found.submodule_search_locations[0])
    import laion_clap

    clap = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-tiny", device="cpu")
    state = clap.model.state_dict()
    for name, value in state.items():
        if value.dtype.is_floating_point and "extractor" not in name and "attn_mask" not in name:
            noise = torch.randn(value.shape)
            if value.dim() > 1:
                state[name] = noise * (1.5 / value[0].numel() ** 0.5)
            else:
                state[name] = 1 + 0.1 * noise.abs() if name.endswith(("weight", "var")) else 0.3 * noise
    clap.model.load_state_dict(state)
    return clap


def _make_torchvision_importable() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name, members in TORCHVISION.items():
        module = ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    del sys.argv[1:]  # laion-clap reads the command line, too
    main(*folders)
