"""The bundle schema: everything model specific that the engine knows, read from `manifest.json`.

The engine has no model constants. `export/` and `training/` write this file, the engine reads it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1
GRAPHS = ("unet", "vae_encoder", "vae_decoder", "vocoder", "clap_text", "clap_audio", "separator")
Capability = Literal[
    "text", "audio", "context", "mixture", "grid", "chords", "distilled", "weakened", "separator"
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LowBands(_Part):
    """The lowest bands of a mel spectrogram, from a longer window that resolves the harmonics of low notes.

    Their edges lie evenly from the mel's f_min to f_max here; a band of a sine is as loud as in the others.
    """

    n_fft: int = Field(gt=0, description="length of the longer transform and of its Hann window")
    bands: int = Field(gt=0, description="how many of n_mels they are")
    f_max: float = Field(gt=0, description="Hz; Slaney's scale begins here")


class Mel(_Part):
    """Geometry of the log mel spectrogram the VAE reads and the vocoder inverts.

    Frames are centred (reflect padding of n_fft / 2); the spectrum is a magnitude; the filters are
    Slaney's with area normalisation (librosa's default), but for the `low` bands; the log is natural, of
    `max(magnitude, floor)`.
    """

    sample_rate: int = Field(gt=0, description="Hz")
    n_fft: int = Field(gt=0)
    win_length: int = Field(gt=0)
    hop: int = Field(gt=0, description="samples per mel frame")
    n_mels: int = Field(gt=0)
    f_min: float = Field(ge=0, description="Hz")
    f_max: float = Field(gt=0, description="Hz")
    floor: float = Field(gt=0, description="magnitudes are clamped here before the log")
    low: LowBands | None = Field(default=None, description="None: all bands are of one transform")

    @property
    def margin(self) -> int:
        """Samples on each side of a frame's centre that it sees."""
        return max(self.n_fft, self.low.n_fft if self.low else 0) // 2


class Latent(_Part):
    """Latents are (Z, T, F) per stem; one latent frame spans `frames` mel frames."""

    channels: int = Field(gt=0, description="Z")
    frames: int = Field(gt=0, description="mel frames per latent frame, so T = mel frames / this")
    freq: int = Field(gt=0, description="F")
    scale_factor: float = Field(gt=0, description="the UNet sees latent x scale_factor")


class NoiseSchedule(_Part):
    """`linear_sqrt`: beta_t is the square of a line from sqrt(start) to sqrt(end) (latent diffusion)."""

    kind: Literal["linear_sqrt"] = "linear_sqrt"
    start: float = Field(gt=0)
    end: float = Field(gt=0)
    steps: int = Field(gt=1)


class Vocoder(_Part):
    """audio samples = mel frames x hop + trim, at `sample_rate`; the last `trim` samples are cut."""

    sample_rate: int = Field(gt=0, description="Hz")
    hop: int = Field(gt=0, description="samples written per mel frame")
    trim: int = Field(ge=0, description="extra samples the graph returns at the end")


SamplerName = Literal["ddim", "dpmpp_2m", "euler", "distilled"]
Quality = Literal["draft", "normal", "best"]
FEW_STEPS = 20  # above this, a draft is left to the solver of second order


class Preset(_Part):
    """How to sample for one quality."""

    sampler: SamplerName
    steps: int = Field(gt=0)


class Sampling(_Part):
    """Defaults that a job may override. sampler and steps are those of the quality `normal`."""

    sampler: SamplerName = "ddim"
    steps: int = Field(gt=0)
    quality: dict[Literal["draft", "best"], Preset] = Field(
        default_factory=dict, description="from a measured curve (bench.quality_curve); see `preset`"
    )
    eta: float = Field(default=0.0, ge=0, le=1)
    guidance: float = Field(default=1.0, ge=0, description="1.0 needs no unconditional pass")
    listening: float = Field(
        default=1.0, ge=0, description="guidance of fill by what it hears; 1.0 needs no further pass"
    )

    def preset(self, quality: Quality, most: int) -> Preset:
        """What this quality stands for. Where the bundle does not say: `draft` half as many steps, at most
        FEW_STEPS and then by dpmpp_2m; `best` twice as many, up to the schedule's `most`."""
        if quality == "normal":
            return Preset(sampler=self.sampler, steps=self.steps)
        if quality in self.quality:
            return self.quality[quality]
        if quality == "best":
            return Preset(sampler=self.sampler, steps=min(most, 2 * self.steps))
        half = max(1, self.steps // 2)
        return Preset(sampler=self.sampler if half <= FEW_STEPS else "dpmpp_2m", steps=min(half, FEW_STEPS))


class Clap(_Part):
    """How the text and audio towers are fed; both return (B, film_dim) embeddings.

    clap_text.onnx: input_ids (B, L) i64, attention_mask (B, L) i64 -> embedding.
    clap_audio.onnx: `mel` (B, 1, frames, mels) in the bundle's own geometry, or
    `audio` (B, samples) at `sample_rate` with exactly `samples` samples -> embedding.
    """

    tokenizer: str | None = Field(
        default=None, description="file in the bundle (Hugging Face tokenizers JSON)"
    )
    max_tokens: int = 77
    audio_input: Literal["mel", "audio"] = "mel"
    sample_rate: int | None = Field(default=None, description="Hz, when audio_input is 'audio'")
    samples: int | None = Field(default=None, description="fixed input length, when audio_input is 'audio'")


class Grid(_Part):
    """Layout of the `grid` input (B, T, 6), at the centre time of each latent frame.

    sin and cos of 2 pi beat phase, sin and cos of 2 pi bar phase, log2(bpm / 120), 1 (known).
    All zeros: unknown.
    """

    channels: Literal[6] = 6


class Chords(_Part):
    """Layout of the `chords` input (B, T, 25): root one-hot (C = 0), chord tones, 1 (known)."""

    channels: Literal[25] = 25


class Level(_Part):
    """The level the model was trained at.

    A signal's level is 10 log10 of the mean squared mel magnitude over all frames and bands (dB).
    The engine brings a mixture to `mixture_db`, a context of some stems to `context_db`, and takes
    the gain back from what the model writes.
    """

    mixture_db: float
    context_db: float
    makeup_db: dict[str, float] = Field(
        default_factory=dict,
        description="by stem, gain on what is made: where a model is unsure it is too quiet",
    )
    alone_db: dict[str, float] = Field(
        default_factory=dict,
        description="the same where nothing is heard, as in generate; empty: makeup_db holds there too",
    )
    ordinary_db: dict[str, float] = Field(
        default_factory=dict,
        description="added to either where steps are not distilled, for models that are: these blur less",
    )


class Separator(_Part):
    """The spectrogram that separator.onnx hears, of the mono mix, and has masks for; centred frames, Hann.

    separator.onnx: `mixture` (B, frames, n_fft / 2 + 1) magnitudes at any gain, frames a multiple of `patch`
    -> masks (B, S, frames, n_fft / 2 + 1) that sum to one over stems.
    """

    sample_rate: int = Field(gt=0, description="Hz")
    n_fft: int = Field(gt=0)
    hop: int = Field(gt=0)
    patch: int = Field(default=1, gt=0, description="frames come in multiples of this")
    window_frames: int = Field(gt=0, description="frames given to it at a time")
    f_max: float = Field(gt=0, description="Hz; the masks there hold for all above")
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of its masks in the geometric mean with the UNet's; 1: it is alone",
    )

    @model_validator(mode="after")
    def _whole(self) -> Separator:
        if self.window_frames % self.patch:
            raise ValueError(f"window_frames must be a multiple of patch, {self.patch}")
        return self

    @property
    def bins(self) -> int:
        """Of the spectrogram, from 0 Hz to half the rate."""
        return self.n_fft // 2 + 1


class Distilled(_Part):
    """Few long steps of one pass each, which the UNet has learnt beside its ordinary ones.

    Asked for by a `timestep` of the schedule's steps more; see `engine.samplers.sample_distilled`.
    """

    steps: int = Field(gt=0, description="so many and no others")
    listening: float = Field(gt=0, description="weight of what fill hears, learnt in")


class Weakened(_Part):
    """The UNet without some of its blocks, which errs where the whole one does, and further.

    What listening weighs is then the whole UNet, told what it hears, against this one, told nothing of it
    (Karras and others 2024, "Guiding a diffusion model with a bad version of itself"). Asked for by a
    `timestep` of twice the schedule's steps more, past the distilled ones.
    """

    listening: dict[str, float] = Field(
        default_factory=dict, description="by stem, the least weight of what it hears where any is given"
    )
    freed: tuple[str, ...] = Field(
        default=(), description="stems whose deviation may grow: too small a one is how theirs goes wrong"
    )


class Manifest(_Part):
    """manifest.json. Raises pydantic.ValidationError on anything unknown or out of range."""

    schema_version: int = SCHEMA_VERSION
    name: str
    version: str = "0"
    licence: str
    provenance: dict[str, Any] = Field(default_factory=dict)
    stems: tuple[str, ...]
    mel: Mel
    latent: Latent
    vocoder: Vocoder
    schedule: NoiseSchedule
    prediction: Literal["eps", "v", "x0"]
    sampling: Sampling
    window_frames: int = Field(gt=0, description="latent frames in a window, T")
    dynamic_window: bool = Field(
        default=True, description="whether the UNet takes other T than window_frames"
    )
    capabilities: tuple[Capability, ...] = ()
    film_dim: int | None = Field(default=None, description="E; None: the UNet has no `film` input")
    film_uncond: tuple[float, ...] | None = Field(default=None, description="(E,), used for no prompt")
    clap: Clap | None = None
    grid: Grid | None = None
    chords: Chords | None = None
    level: Level | None = Field(default=None, description="None: audio is used at the level it comes")
    mask_power: float = Field(
        default=2.0, gt=0, description="split masks are ratios of the stems' mel magnitudes to this power"
    )
    separator: Separator | None = None
    distilled: Distilled | None = None
    weakened: Weakened | None = None
    networks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="the configuration dataclass of each network, by graph name"
    )
    files: dict[str, str] = Field(
        default_factory=dict, description="file name -> sha256, every file but this one"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        declared = set(self.capabilities)
        if (self.film_dim is None) != (self.film_uncond is None):
            raise ValueError("film_dim and film_uncond go together")
        if self.film_uncond is not None and len(self.film_uncond) != self.film_dim:
            raise ValueError(f"film_uncond has {len(self.film_uncond)} values, film_dim says {self.film_dim}")
        if declared & {"text", "audio"} and (self.clap is None or self.film_dim is None):
            raise ValueError("the capabilities text and audio need clap and film_dim")
        if "text" in declared and self.clap is not None and self.clap.tokenizer is None:
            raise ValueError("the capability text needs a tokenizer")
        if ("grid" in declared) != (self.grid is not None):
            raise ValueError("the capability grid and its layout go together")
        if ("separator" in declared) != (self.separator is not None):
            raise ValueError("the capability separator and its geometry go together")
        if "separator" in declared and "mixture" not in declared:
            raise ValueError("the capability separator needs mixture, which hears what no stem explains")
        if ("distilled" in declared) != (self.distilled is not None):
            raise ValueError("the capability distilled and its steps go together")
        if ("weakened" in declared) != (self.weakened is not None):
            raise ValueError("the capability weakened and its weights go together")
        if self.weakened and not {*self.weakened.listening, *self.weakened.freed} <= set(self.stems):
            raise ValueError("weakened names a stem that is none")
        presets = [self.sampling.preset(name, self.schedule.steps) for name in get_args(Quality)]
        few = self.distilled.steps if self.distilled else 0
        if any(preset.sampler == "distilled" and preset.steps != few for preset in presets):
            raise ValueError("a distilled preset takes the steps that distilled says")
        level = self.level
        gains = {} if level is None else level.makeup_db | level.alone_db | level.ordinary_db
        if not set(gains) <= set(self.stems):
            raise ValueError("makeup_db, alone_db or ordinary_db names a stem that is none")
        if ("chords" in declared) != (self.chords is not None):
            raise ValueError("the capability chords and its layout go together")
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(S, Z, T, F) of one window."""
        return len(self.stems), self.latent.channels, self.window_frames, self.latent.freq

    @property
    def window_samples(self) -> int:
        """Length of one window in samples at the mel's rate."""
        return self.window_frames * self.latent.frames * self.mel.hop
