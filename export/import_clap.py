"""The part of an import that conditions the model: CLAP's towers, and the tokenizer of one of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from engine.errors import BacklineError
from engine.manifest import Clap
from export.checkpoint import LazyTensor
from export.clap import ClapAudio, ClapText, audio_config, published_name, text_config
from export.reference_config import ReferenceConfig
from export.tensor_source import Source, load_network
from export.tokenizer import read_tokenizer

PREFIXES = ("cond_stage_model.model.", "cond_stage_model.", "module.", "")


@dataclass(frozen=True)
class Towers:
    """What an import has of CLAP. `empty`: (E,), the embedding of the empty text."""

    text: ClapText | None = None
    audio: ClapAudio | None = None
    tokenizer: Tokenizer | None = None
    empty: tuple[float, ...] | None = None

    def modules(self) -> dict[str, nn.Module]:
        """By graph name; text without a tokenizer could not be fed, and is left out."""
        text = {"clap_text": self.text} if self.text and self.tokenizer else {}
        return text | ({"clap_audio": self.audio} if self.audio else {})

    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each of `modules`, for the manifest."""
        towers = {"clap_text": self.text, "clap_audio": self.audio}
        return {
            name: asdict(tower.config) for name, tower in towers.items() if tower and name in self.modules()
        }

    def files(self) -> dict[str, bytes]:
        if self.text is None or self.tokenizer is None:
            return {}
        return {"tokenizer.json": self.tokenizer.to_str().encode()}

    def missing(self, config: ReferenceConfig) -> list[str]:
        """Sentences about what the bundle lacks for want of CLAP."""
        if config.unet.film_dim is None:
            return []
        if self.text is None and self.audio is None:
            return ["CLAP, so the bundle takes no prompt and its empty condition is zeros"]
        sentences = []
        if self.text is None:
            sentences.append("CLAP's text tower, so the bundle takes no text; its empty condition is zeros")
        elif self.tokenizer is None:
            sentences.append("a tokenizer (--tokenizer DIR, roberta-base's), so the bundle takes no text")
        if self.audio is None:
            sentences.append("CLAP's audio tower, so the bundle takes no audio prompt")
        return sentences


def read_towers(source: Source, config: ReferenceConfig, tokenizer_folder: Path | None) -> Towers:
    """CLAP's towers, from inside a main checkpoint or from laion-clap's own; either may be missing.

    Raises BacklineError for CLAP's fusion model, for embeddings that the UNet does not take, and for a
    tokenizer of another vocabulary.
    """
    tokenizer = read_tokenizer(tokenizer_folder) if tokenizer_folder else None
    prefix = next(
        (p for p in PREFIXES if source.has(p + "text_branch.") or source.has(p + "audio_branch.")), None
    )
    if prefix is None:
        return Towers()
    shapes = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in source.tensors.items()
        if name.startswith(prefix) and isinstance(tensor, LazyTensor)
    }
    if "audio_branch.patch_embed.mel_conv2d.weight" in shapes:
        raise BacklineError(f"{source.path} holds CLAP's fusion model, and MusicLDM's is the other one.")

    def rename(name: str) -> str:
        return prefix + published_name(name)

    has_text, has_audio = source.has(prefix + "text_branch."), source.has(prefix + "audio_branch.")
    try:
        text_layout = text_config(shapes) if has_text else None
        audio_layout = audio_config(shapes, config.mel.sample_rate) if has_audio else None
    except (KeyError, ValueError, IndexError) as error:
        name = f"{prefix}{error.args[0]}"
        raise BacklineError(f"{source.path} holds no CLAP of laion-clap's layout: see {name}.") from error
    for layout in (text_layout, audio_layout):
        if layout is not None and layout.embedding != config.unet.film_dim:
            raise BacklineError(
                f"{source.path}: CLAP's embeddings have {layout.embedding} values, and the UNet "
                f"takes {config.unet.film_dim}."
            )
    text = load_network(lambda: ClapText(text_layout), source, rename) if text_layout else None
    audio = load_network(lambda: ClapAudio(audio_layout), source, rename) if audio_layout else None
    words = tokenizer.get_vocab_size() if tokenizer else 0
    if text and words > text.config.vocabulary:
        raise BacklineError(
            f"{tokenizer_folder} is not this model's tokenizer: it has {words} tokens, and CLAP's text tower "
            f"{text.config.vocabulary}."
        )
    return Towers(text, audio, tokenizer, _empty_text(text) if text else None)


def _empty_text(text: ClapText) -> tuple[float, ...]:
    """The embedding of no words: <s> and </s>, which are tokens 0 and 2 in RoBERTa's vocabulary."""
    with torch.no_grad():
        embedding = text(torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.int64))[0]
    return tuple(embedding.tolist())


def clap_part(towers: Towers) -> Clap:
    """How the towers are fed, for the manifest."""
    audio = towers.audio.config if towers.audio else None
    return Clap(
        tokenizer="tokenizer.json" if towers.files() else None,
        max_tokens=towers.text.config.positions - 2 if towers.text else 77,
        audio_input="audio" if audio else "mel",
        sample_rate=audio.rate if audio else None,
        samples=audio.samples if audio else None,
    )
