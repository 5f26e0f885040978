"""The towers of LAION's CLAP (arXiv:2211.06687) that condition MusicLDM: HTSAT for audio, RoBERTa for text.

laion-clap is the source of the architecture and of the names; it is not imported, since it wants torchvision
to be there. The towers are its non-fusion model: HTSAT (arXiv:2202.00874, a Swin transformer over a mel
spectrogram cut into four and stacked) and RoBERTa (arXiv:1907.11692), each with a two-layer projection to a
unit embedding. The audio front-end is inside the graph, with the tables that the checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 4
PAD = 1  # RoBERTa's padding token; positions are counted from the one after it


@dataclass(frozen=True)
class ClapAudioConfig:
    """`rate`: of the audio given, in Hz; brought up to `sample_rate` inside. `samples`: the length given."""

    width: int = 128
    depths: tuple[int, ...] = (2, 2, 12, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    image: int = 256  # side of the square that the spectrogram is folded into
    mels: int = 64
    n_fft: int = 1024
    hop: int = 480
    sample_rate: int = 48000
    rate: int = 48000
    samples: int = 480000
    embedding: int = 512


@dataclass(frozen=True)
class ClapTextConfig:
    vocabulary: int = 50265
    positions: int = 514
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    embedding: int = 512


class ClapAudio(nn.Module):
    """audio (B, samples) at `rate`, mono -> unit embedding (B, E)."""

    def __init__(self, config: ClapAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_branch = _Htsat(config)
        width = config.width * 2 ** (len(config.depths) - 1)
        self.audio_projection = _projection(width, config.embedding)

    def forward(self, audio: Tensor) -> Tensor:
        raised = upsample(audio, self.config.sample_rate // self.config.rate)
        return functional.normalize(self.audio_projection(self.audio_branch(raised)), dim=-1)


class ClapText(nn.Module):
    """input_ids (B, L), attention_mask (B, L), int64 -> unit embedding (B, E)."""

    def __init__(self, config: ClapTextConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.types = nn.Embedding(1, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.layers = nn.ModuleList(_RobertaLayer(config) for _ in range(config.layers))
        self.pool = nn.Linear(config.width, config.width)
        self.text_projection = _projection(config.width, config.embedding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = (input_ids != PAD).long()
        places = torch.cumsum(real, dim=1) * real + PAD
        hidden = self.norm(self.words(input_ids) + self.positions(places) + self.types.weight[0])
        # Finite, so that a row of nothing but padding stays finite too.
        hidden_keys = (1.0 - attention_mask.float())[:, None, None, :] * -1e9
        for layer in self.layers:
            hidden = layer(hidden, hidden_keys)
        pooled = torch.tanh(self.pool(hidden[:, 0]))
        return functional.normalize(self.text_projection(pooled), dim=-1)


class _RobertaLayer(nn.Module):
    """Attention and a feed-forward, normalised after each sum."""

    def __init__(self, config: ClapTextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-5)
        self.expand = nn.Linear(config.width, config.hidden)
        self.project = nn.Linear(config.hidden, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor, hidden_keys: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden_keys)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.project(functional.gelu(self.expand(x))))


class _Htsat(nn.Module):
    """audio (B, samples) at the tower's own rate -> (B, width x 2^(levels - 1))."""

    def __init__(self, config: ClapAudioConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.n_fft // 2 + 1
        self.spectrogram_extractor = _Spectrogram(bins, config.n_fft)
        self.logmel_extractor = _MelTable(bins, config.mels)
        self.bn0 = nn.BatchNorm2d(config.mels)
        self.patch_embed = _PatchEmbed(config.width)
        self.layers = nn.ModuleList(
            _SwinStage(config, level, last=level == len(config.depths) - 1)
            for level in range(len(config.depths))
        )
        self.norm = nn.LayerNorm(config.width * 2 ** (len(config.depths) - 1))

    def forward(self, audio: Tensor) -> Tensor:
        c = self.config
        pad = c.n_fft // 2
        framed = functional.pad(audio[:, None], (pad, pad), mode="reflect")
        stft = self.spectrogram_extractor.stft
        real = functional.conv1d(framed, stft.conv_real.weight, stride=c.hop)
        imaginary = functional.conv1d(framed, stft.conv_imag.weight, stride=c.hop)
        power = (real * real + imaginary * imaginary).transpose(1, 2) @ self.logmel_extractor.melW
        decibels = 10.0 * torch.log10(torch.clamp(power, min=1e-10))
        mel = self.bn0(decibels.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)  # (B, frames, mels)
        hidden = self.patch_embed(self._fold(mel))
        for stage in self.layers:
            hidden = stage(hidden)
        return self.norm(hidden).mean(dim=1)

    def _fold(self, mel: Tensor) -> Tensor:
        """(B, frames, mels) -> (B, 1, side, side): stretched in time, cut into parts, the parts stacked."""
        side, mels = self.config.image, self.config.mels
        parts = side // mels
        stretched = functional.interpolate(
            mel[:, None], (side * parts, mels), mode="bicubic", align_corners=True
        )
        cut = stretched.reshape(-1, parts, side, mels)
        return cut.transpose(2, 3).reshape(-1, 1, side, side)


class _Fourier(nn.Module):
    """The windowed Fourier basis, as two convolutions without bias."""

    def __init__(self, bins: int, n_fft: int) -> None:
        super().__init__()
        self.conv_real = nn.Conv1d(1, bins, n_fft, bias=False)
        self.conv_imag = nn.Conv1d(1, bins, n_fft, bias=False)


class _Spectrogram(nn.Module):
    def __init__(self, bins: int, n_fft: int) -> None:
        super().__init__()
        self.stft = _Fourier(bins, n_fft)


class _MelTable(nn.Module):
    def __init__(self, bins: int, mels: int) -> None:
        super().__init__()
        self.melW = nn.Parameter(torch.zeros(bins, mels))


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class _SwinStage(nn.Module):
    """Blocks at one resolution, every second one with its windows shifted; then 2 x 2 positions make one."""

    def __init__(self, config: ClapAudioConfig, level: int, last: bool) -> None:
        super().__init__()
        side = config.image // PATCH // 2**level
        width = config.width * 2**level
        window = min(config.window, side)
        self.blocks = nn.ModuleList(
            _SwinBlock(
                width, side, config.heads[level], window, window // 2 if i % 2 and side > window else 0
            )
            for i in range(config.depths[level])
        )
        self.downsample = None if last else _PatchMerging(width, side)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _SwinBlock(nn.Module):
    """Attention within windows (Swin, arXiv:2103.14030), with a learnt bias by relative position."""

    def __init__(self, width: int, side: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape[1:]
        side, window, shift = self.side, self.window, self.shift
        count = side // window
        grid = self.norm1(x).reshape(-1, side, side, width)
        if shift:
            grid = torch.roll(grid, (-shift, -shift), (1, 2))
        cut = grid.reshape(-1, count, window, count, window, width).transpose(2, 3)
        mixed = self.attn(cut.reshape(-1, count * count, window * window, width), self._wrapped(x.device))
        grid = mixed.reshape(-1, count, count, window, window, width).transpose(2, 3)
        grid = grid.reshape(-1, side, side, width)
        if shift:
            grid = torch.roll(grid, (shift, shift), (1, 2))
        x = x + grid.reshape(-1, length, width)
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))

    def _wrapped(self, device: torch.device) -> Tensor | None:
        """(windows, n, n): -100 between positions that only the cyclic shift made neighbours."""
        if not self.shift:
            return None
        place = torch.arange(self.side, device=device)
        region = (place >= self.side - self.window).long() + (place >= self.side - self.shift).long()
        count = self.side // self.window
        label = (3 * region[:, None] + region[None, :]).reshape(count, self.window, count, self.window)
        label = label.transpose(1, 2).reshape(count * count, -1)
        return (label[:, :, None] != label[:, None, :]).float() * -100.0


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, length, width = x.shape[1:]
        split = self.qkv(x).reshape(-1, windows, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self._offsets(x.device)].permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None]
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads) + bias
        mixed = torch.softmax(scores, dim=-1) @ v
        return self.proj(mixed.transpose(2, 3).reshape(-1, windows, length, width))

    def _offsets(self, device: torch.device) -> Tensor:
        """(n, n): where in the table the bias between two positions of a window is."""
        place = torch.arange(self.window, device=device)
        apart = place[:, None] - place[None, :] + self.window - 1
        rows = apart[:, None, :, None] * (2 * self.window - 1)
        return (rows + apart[None, :, None, :]).reshape(self.window**2, self.window**2)


class _PatchMerging(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half, width = self.side // 2, x.shape[2]
        grid = x.reshape(-1, half, 2, half, 2, width)
        # Upstream's order: down the first column of the 2 x 2, then down the second.
        merged = grid.permute(0, 1, 3, 4, 2, 5).reshape(-1, half * half, 4 * width)
        return self.reduction(self.norm(merged))


def upsample(audio: Tensor, factor: int) -> Tensor:
    """(B, n) -> (B, n x factor), as torchaudio's default resampling does it for whole factors.

    A sinc of cutoff 0.99 Nyquist under a Hann window of six zero crossings to each side; one phase of it
    per new sample (Smith, "Digital Audio Resampling", CCRMA).
    """
    if factor == 1:
        return audio
    crossings, rolloff = 6, 0.99
    reach = math.ceil(crossings / rolloff)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    phase = -torch.arange(factor, dtype=torch.float64)[:, None] / factor
    t = ((taps + phase) * rolloff).clamp(-crossings, crossings)
    kernels = torch.sinc(t) * torch.cos(t * math.pi / crossings / 2) ** 2 * rolloff
    padded = functional.pad(audio[:, None], (reach, reach))
    phases = functional.conv1d(padded, kernels.float()[:, None].to(audio.device))
    return phases.transpose(1, 2).flatten(1)


def _projection(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.ReLU(), nn.Linear(after, after))


# Our name -> RoBERTa's, for the parts of a text tower.
ROBERTA_NAMES = {
    "words": "text_branch.embeddings.word_embeddings",
    "positions": "text_branch.embeddings.position_embeddings",
    "types": "text_branch.embeddings.token_type_embeddings",
    "norm": "text_branch.embeddings.LayerNorm",
    "pool": "text_branch.pooler.dense",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "project": "output.dense",
    "norm2": "output.LayerNorm",
}


def published_name(name: str) -> str:
    """The name that a tensor of ClapText or ClapAudio has in laion-clap's checkpoints."""
    first, *rest = name.split(".")
    if first in ("audio_branch", "audio_projection", "text_projection"):
        return name
    if first == "layers":
        number, part, kind = rest
        return f"text_branch.encoder.layer.{number}.{ROBERTA_NAMES[part]}.{kind}"
    return ".".join([ROBERTA_NAMES[first], *rest])


def audio_config(shapes: Mapping[str, tuple[int, ...]], rate: int) -> ClapAudioConfig:
    """The audio tower behind tensors of these published names and shapes. Raises KeyError for a missing one.

    rate: of the audio that will be given, in Hz, where it divides the tower's own; else that is asked for.
    """
    default = ClapAudioConfig()
    branch = "audio_branch."
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(branch + "layers."))
    table = ".attn.relative_position_bias_table"
    blocks = [
        [name for name in shapes if name.startswith(f"{branch}layers.{level}.") and name.endswith(table)]
        for level in range(levels)
    ]
    window = (math.isqrt(shapes[blocks[0][0]][0]) + 1) // 2
    mask = shapes.get(f"{branch}layers.0.blocks.1.attn_mask")
    given = rate if default.sample_rate % rate == 0 else default.sample_rate
    bins, mels = shapes[branch + "logmel_extractor.melW"]
    return ClapAudioConfig(
        width=shapes[branch + "patch_embed.proj.weight"][0],
        depths=tuple(len(names) for names in blocks),
        heads=tuple(shapes[names[0]][1] for names in blocks),
        window=window,
        image=PATCH * window * math.isqrt(mask[0]) if mask else default.image,
        mels=mels,
        n_fft=2 * (bins - 1),
        rate=given,
        samples=default.samples * given // default.sample_rate,
        embedding=shapes["audio_projection.2.weight"][0],
    )


def text_config(shapes: Mapping[str, tuple[int, ...]]) -> ClapTextConfig:
    """The text tower behind tensors of these published names and shapes; KeyError as `audio_config`."""
    vocabulary, width = shapes["text_branch.embeddings.word_embeddings.weight"]
    layer = "text_branch.encoder.layer."
    return ClapTextConfig(
        vocabulary=vocabulary,
        positions=shapes["text_branch.embeddings.position_embeddings.weight"][0],
        width=width,
        layers=1 + max(int(name.split(".")[3]) for name in shapes if name.startswith(layer)),
        heads=max(1, width // 64),
        hidden=shapes[f"{layer}0.intermediate.dense.weight"][0],
        embedding=shapes["text_projection.2.weight"][0],
    )
