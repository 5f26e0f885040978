"""CLAP's towers against transformers' ClapModel and laion-clap's own, and through an import."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from command import RATE, backline, noise
from laion_reference import SECONDS, TEXTS
from reference_model import random_checkpoint, small_config, write_config
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engine.audio import Audio
from engine.conditions import prompt_film
from engine.errors import BacklineError, UsageError
from engine.model import Model
from engine.take import Settings
from engine.tasks import generate
from export.checkpoint import open_checkpoint
from export.clap import (
    ClapAudio,
    ClapAudioConfig,
    ClapText,
    ClapTextConfig,
    audio_config,
    published_name,
    text_config,
    upsample,
)
from export.import_checkpoint import import_checkpoint
from export.import_clap import read_towers
from export.onnx_writer import Input, relative_error, write_graph
from export.reference_config import read_config
from export.tensor_source import Source

EMBEDDING = 24
TEXT = ClapTextConfig(
    vocabulary=320, positions=40, width=128, layers=2, heads=2, hidden=64, embedding=EMBEDDING
)
SMALL_AUDIO = ClapAudioConfig(
    width=16,
    depths=(2, 2, 1),
    heads=(2, 4, 8),
    window=4,
    image=64,
    mels=16,
    n_fft=64,
    hop=30,
    samples=7200,
    embedding=EMBEDDING,
)
# What an import reads: only the width may differ from the published tower, its front-end is fixed.
AUDIO = ClapAudioConfig(
    width=16, depths=(1, 2, 1, 1), heads=(1, 2, 4, 8), rate=16000, samples=160000, embedding=EMBEDDING
)


def randomised(module: torch.nn.Module, seed: int) -> Any:
    """The module with weights that make every part of it matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if not value.dtype.is_floating_point:
            state[name] = value
        elif value.dim() > 1:
            state[name] = noise * (1.5 / value[0].numel() ** 0.5)
        else:
            state[name] = 1 + 0.1 * noise.abs() if name.endswith(("weight", "var")) else 0.3 * noise
    module.load_state_dict(state)
    return module.eval()


def published(*towers: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The towers' tensors under laion-clap's names, with the buffers that it saves beside them."""
    state = {published_name(name): value for tower in towers for name, value in tower.state_dict().items()}
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(64, 64, dtype=torch.int64)
    if any(name.startswith("audio_branch") for name in state):
        state["audio_branch.tscam_conv.bias"] = torch.zeros(527)
    if any(name.startswith("text_branch") for name in state):
        state["text_branch.embeddings.position_ids"] = torch.arange(TEXT.positions)[None]
    return state


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """transformers' ClapModel, the same network, of the sizes above."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": TEXT.vocabulary,
            "hidden_size": TEXT.width,
            "num_hidden_layers": TEXT.layers,
            "num_attention_heads": TEXT.heads,
            "intermediate_size": TEXT.hidden,
            "max_position_embeddings": TEXT.positions,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "projection_dim": EMBEDDING,
        },
        audio_config={
            "window_size": SMALL_AUDIO.window,
            "num_mel_bins": SMALL_AUDIO.mels,
            "spec_size": SMALL_AUDIO.image,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": SMALL_AUDIO.width,
            "hidden_size": 4 * SMALL_AUDIO.width,
            "depths": list(SMALL_AUDIO.depths),
            "num_attention_heads": list(SMALL_AUDIO.heads),
            "enable_fusion": False,
            "projection_dim": EMBEDDING,
        },
        projection_dim=EMBEDDING,
    )
    return randomised(transformers.ClapModel(config), 1)


def hugging_face_name(name: str) -> str:
    for ours, theirs in (
        ("text_branch.", "text_model."),
        ("audio_branch.", "audio_model.audio_encoder."),
        ("bn0", "batch_norm"),
        (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"),
        (".attn.proj", ".attention.output.dense"),
        (".attn.relative", ".attention.self.relative"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
        ("projection.0", "projection.linear1"),
        ("projection.2", "projection.linear2"),
    ):
        name = name.replace(ours, theirs)
    return name


def filled(tower: torch.nn.Module, state: dict[str, torch.Tensor]) -> Any:
    """Our tower with transformers' weights; its front-end, which transformers has outside, keeps its own."""
    own = tower.state_dict()
    for name in own:
        if "extractor" in name:
            continue
        theirs = hugging_face_name(published_name(name))
        if ".attn.qkv." in name:
            parts = [
                theirs.replace(".attn.qkv.", f".attention.self.{part}.") for part in ("query", "key", "value")
            ]
            own[name] = torch.cat([state[part] for part in parts])
        else:
            own[name] = state[theirs]
    tower.load_state_dict(own)
    return tower.eval()


def normalised(features: Any) -> torch.Tensor:
    tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(tensor, dim=-1)


def mels_seen_by(tower: ClapAudio) -> list[torch.Tensor]:
    """Filled, as the tower runs, with its log mel spectrograms (B, frames, mels)."""
    seen: list[torch.Tensor] = []
    tower.audio_branch.bn0.register_forward_hook(
        lambda _, given, __: seen.append(given[0][..., 0].transpose(1, 2))
    )
    return seen


def test_text_tower_equals_transformers(hugging_face: Any) -> None:
    ours = filled(ClapText(TEXT), hugging_face.state_dict())
    ids = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 7, 8, 9, 300, 2]])
    mask = (ids != 1).long()
    with torch.no_grad():
        theirs = normalised(hugging_face.get_text_features(input_ids=ids, attention_mask=mask))
        assert relative_error(ours(ids, mask).numpy(), theirs.numpy()) <= 1e-5
        alone = ours(ids[:1, :4], mask[:1, :4])
    assert relative_error(alone.numpy(), theirs[:1].numpy()) <= 1e-5, "padding must not matter"


def test_audio_tower_equals_transformers(hugging_face: Any) -> None:
    ours = filled(randomised(ClapAudio(SMALL_AUDIO), 2), hugging_face.state_dict())
    seen = []
    ours.audio_branch.bn0.register_forward_hook(
        lambda _, given, __: seen.append(given[0][..., 0].transpose(1, 2))
    )
    audio = torch.from_numpy(np.random.default_rng(0).standard_normal((2, SMALL_AUDIO.samples), np.float32))
    with torch.no_grad():
        embedding = ours(audio)
        longer = torch.zeros(2, 1, dtype=torch.bool)
        theirs = normalised(
            hugging_face.get_audio_features(input_features=seen[0][:, None], is_longer=longer)
        )
    assert relative_error(embedding.numpy(), theirs.numpy()) <= 1e-5


def test_front_end_is_a_mel_spectrogram_in_decibels() -> None:
    """With the tables of torchlibrosa: a windowed Fourier basis, and mel filters."""
    tower = ClapAudio(SMALL_AUDIO).eval()
    n_fft, hop = SMALL_AUDIO.n_fft, SMALL_AUDIO.hop
    window = torch.hann_window(n_fft)
    basis = torch.fft.rfft(torch.eye(n_fft), dim=0)
    filters = torch.rand(n_fft // 2 + 1, SMALL_AUDIO.mels)
    branch = tower.audio_branch
    with torch.no_grad():
        branch.spectrogram_extractor.stft.conv_real.weight.copy_((basis.real * window)[:, None])
        branch.spectrogram_extractor.stft.conv_imag.weight.copy_((basis.imag * window)[:, None])
        branch.logmel_extractor.melW.copy_(filters)
        seen = mels_seen_by(tower)
        audio = torch.randn(1, SMALL_AUDIO.samples)
        tower(audio)
        spectrum = torch.stft(audio, n_fft, hop, window=window, center=True, return_complex=True)
        expected = 10 * torch.log10((spectrum.abs() ** 2).transpose(1, 2) @ filters)
    assert relative_error(seen[0].numpy(), expected.numpy()) <= 1e-4


def test_upsampling_keeps_tones_and_makes_no_new_ones() -> None:
    time = torch.arange(1600) / 16000
    tone = torch.sin(2 * torch.pi * 1000 * time)[None]
    raised = upsample(tone, 3)[0]
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(4800) / 48000)
    assert raised.shape == (4800,)
    assert float((raised - expected)[100:-100].abs().max()) < 5e-3
    assert torch.equal(upsample(tone, 1), tone)


def test_layout_is_read_from_the_shapes() -> None:
    for tower, layout in ((ClapAudio(AUDIO), audio_config), (ClapText(TEXT), text_config)):
        shapes = {name: tuple(value.shape) for name, value in published(tower).items()}
        found = layout(shapes, 16000) if layout is audio_config else layout(shapes)  # type: ignore[operator, call-arg]
        assert found == tower.config


@pytest.mark.parametrize("half", [False, True])
def test_towers_export(half: bool, tmp_path: Path) -> None:
    limit = 2e-2 if half else 1e-4
    text, audio = randomised(ClapText(TEXT), 5), randomised(ClapAudio(SMALL_AUDIO), 6)
    tokens = [Input("input_ids", ("batch", "length"), "int64", high=TEXT.vocabulary)]
    tokens.append(Input("attention_mask", ("batch", "length"), "mask"))
    sizes = [{"batch": 1, "length": 5}, {"batch": 3, "length": 9}]
    outputs = {"embedding": ("batch", EMBEDDING)}
    assert (
        write_graph(
            text, tokens, outputs, tmp_path / "text.onnx", sizes=sizes, precision="fp16" if half else "fp32"
        )
        <= limit
    )  # type: ignore[arg-type]
    inputs = [Input("audio", ("batch", SMALL_AUDIO.samples))]
    assert (
        write_graph(
            audio, inputs, outputs, tmp_path / "audio.onnx", sizes=sizes, precision="fp16" if half else "fp32"
        )
        <= limit
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def towers() -> tuple[ClapText, ClapAudio]:
    return randomised(ClapText(TEXT), 7), randomised(ClapAudio(AUDIO), 8)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with RoBERTa's special tokens, as vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["warm slow bass", "bright fast drums", "warm bright piano"] * 9, trainer)
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, towers: tuple[ClapText, ClapAudio]) -> Path:
    """A main checkpoint with CLAP inside (main.ckpt), one without (bare.ckpt), laion-clap's own (clap.pt)."""
    folder = tmp_path_factory.mktemp("clap")
    tree = small_config(channel_mult=[2], attention_resolutions=[]) | {"unconditional_guidance_scale": 2.0}
    tree["hifigan"] |= {"sampling_rate": 16000, "fmax": 8000}
    checkpoint = random_checkpoint(write_config(folder / "config.json", tree))
    torch.save(checkpoint, folder / "bare.ckpt")
    clap = published(*towers)
    inside = {f"cond_stage_model.model.{name}": value for name, value in clap.items()}
    torch.save(checkpoint | {"state_dict": checkpoint["state_dict"] | inside}, folder / "main.ckpt")
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in clap.items()}}, folder / "clap.pt")
    return folder


@pytest.fixture(scope="module")
def prompted(files: Path, words: Path) -> Model:
    summary = import_checkpoint(
        files / "main.ckpt", files / "config.json", files / "prompted", tokenizer=words
    )
    assert not summary.missing
    assert summary.read["clap_text"] > 20 and summary.read["clap_audio"] > 20
    left = [name for name in summary.unused if name.startswith("cond_stage_model.")]
    assert all(re.search(r"relative_position_index|tscam_conv|position_ids", name) for name in left)
    return Model.open(files / "prompted", "cpu", 2)


def test_text_prompt_through_the_engine(prompted: Model, towers: tuple[ClapText, ClapAudio]) -> None:
    manifest = prompted.manifest
    assert set(manifest.capabilities) == {"text", "audio"}
    assert manifest.sampling.guidance == 2.0, "with a real empty condition the configuration's guidance holds"
    with torch.no_grad():
        empty = towers[0](torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.int64)).numpy()
    assert relative_error(np.array([manifest.film_uncond]), empty) <= 1e-5
    tokenizer = Tokenizer.from_file(str(prompted.bundle.path("tokenizer.json")))
    ids = tokenizer.encode("warm piano").ids
    assert ids[0] == 0 and ids[-1] == 2 and len(ids) > 3
    with torch.no_grad():
        expected = towers[0](torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)).numpy()
    assert relative_error(prompted.embed_text("warm piano"), expected) <= 1e-4
    long = prompted.embed_text("bright drums " * 100)
    assert np.isfinite(long).all(), "a long text is cut at the positions the tower has"


def test_audio_prompt_through_the_engine(prompted: Model, towers: tuple[ClapText, ClapAudio]) -> None:
    audio = 0.1 * np.random.default_rng(0).standard_normal((1, AUDIO.samples), np.float32)
    with torch.no_grad():
        expected = towers[1](torch.from_numpy(audio)).numpy()
    assert relative_error(prompted.embed_audio(audio=audio), expected) <= 1e-4
    settings = Settings(seed=3, steps=2)
    takes = [
        generate(prompted, seconds=1.0, settings=settings, **prompt)  # type: ignore[arg-type]
        for prompt in ({}, {"text": "warm bass"}, {"audio": Audio(audio, 16000)})
    ]
    sounds = [take.stems["bass"].samples for take in takes]
    assert all(np.isfinite(sound).all() for sound in sounds)
    assert relative_error(sounds[1], sounds[0]) > 1e-3 and relative_error(sounds[2], sounds[0]) > 1e-3


def test_clap_from_its_own_file_and_without_a_tokenizer(files: Path) -> None:
    out = files / "separate"
    summary = import_checkpoint(files / "bare.ckpt", files / "config.json", out, clap=files / "clap.pt")
    assert summary.manifest.capabilities == ("audio",)
    assert any("--tokenizer" in sentence for sentence in summary.missing)
    assert not (out / "clap_text.onnx").exists() and not (out / "tokenizer.json").exists()
    assert any(summary.manifest.film_uncond or ()), "the empty text needs no tokenizer"
    with pytest.raises(UsageError, match="no text"):
        Model.open(out, "cpu", 1).embed_text("warm")


@pytest.fixture(scope="module")
def laion(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with laion-clap's own random model, its embeddings, and the bundle imported from it."""
    if importlib.util.find_spec("laion_clap") is None:
        pytest.skip("laion-clap is not installed (extra clap)")
    folder = tmp_path_factory.mktemp("laion")
    script = Path(__file__).with_name("laion_reference.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(words), str(folder)], capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    tree = small_config(channel_mult=[1], attention_resolutions=[], extra_film_condition_dim=512)
    tree["hifigan"] |= {"sampling_rate": 48000, "fmax": 24000}  # prompts at CLAP's own rate: no resampling
    torch.save(random_checkpoint(write_config(folder / "config.json", tree)), folder / "main.ckpt")
    summary = import_checkpoint(
        folder / "main.ckpt",
        folder / "config.json",
        folder / "bundle",
        clap=folder / "clap.pt",
        tokenizer=words,
    )
    assert not summary.missing and set(summary.manifest.capabilities) == {"text", "audio"}
    own = [name for name in summary.unused if name.startswith("module.")]
    unused = (
        r"relative_position_index|attn_mask|tscam_conv|head|position_ids|num_batches|logit_scale|_transform"
    )
    assert own and [name for name in own if not re.search(unused, name)] == []
    return folder


def test_towers_equal_laion_clap_in_torch(laion: Path, words: Path) -> None:
    reference = np.load(laion / "reference.npz")
    with open_checkpoint(laion / "clap.pt") as checkpoint:
        source = Source(checkpoint, checkpoint.tensors("state_dict"))
        towers = read_towers(source, read_config(laion / "config.json"), words)
    assert towers.text is not None and towers.audio is not None and towers.tokenizer is not None
    towers.tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    encoded = towers.tokenizer.encode_batch(list(TEXTS))
    ids, mask = (torch.tensor([getattr(row, part) for row in encoded]) for part in ("ids", "attention_mask"))
    with torch.no_grad():
        assert relative_error(towers.text(ids, mask).numpy(), reference["text"]) <= 1e-4
        audio = towers.audio(torch.from_numpy(reference["whole_audio"])[None])
    assert relative_error(audio.numpy(), reference["whole"]) <= 1e-4


def test_prompts_equal_laion_clap_in_the_engine(laion: Path) -> None:
    """From a text or a sound to its embedding: tokens, lengths, the front-end and the towers."""
    reference = np.load(laion / "reference.npz")
    model = Model.open(laion / "bundle", "cpu", 2)
    for text, expected in zip(TEXTS, reference["text"], strict=True):
        assert relative_error(model.embed_text(text)[0], expected) <= 1e-4, text
    assert relative_error(np.array(model.manifest.film_uncond), reference["text"][-1]) <= 1e-4
    for name in SECONDS:  # what is shorter than ten seconds is repeated as often as it fits, then silent
        film = prompt_film(model, None, Audio(reference[f"{name}_audio"][None], 48000))
        assert film is not None and relative_error(film, reference[name]) <= 1e-4, name


def test_towers_that_do_not_fit(files: Path, words: Path, tmp_path: Path) -> None:
    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(BacklineError) as caught:
            import_checkpoint(path, files / "config.json", tmp_path / "bundle", **options)
        return str(caught.value)

    whole = torch.load(files / "clap.pt", weights_only=True)["state_dict"]

    def changed(**changes: Any) -> Path:
        state = {k: v for k, v in (whole | changes).items() if v is not None}
        torch.save({"state_dict": state}, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    main = files / "bare.ckpt"
    fusion = {"module.audio_branch.patch_embed.mel_conv2d.weight": torch.zeros(1)}
    assert "fusion" in refused(main, clap=changed(**fusion))
    wide = {"module.text_projection.2.weight": torch.zeros(30, 30)}
    assert "30 values" in refused(main, clap=changed(**wide))
    key = "module.text_branch.pooler.dense.weight"
    assert key in refused(main, clap=changed(**{key: None}))
    assert "laion-clap" in refused(main, clap=changed(**{"module.text_projection.2.weight": None}))
    assert "tokenizer.json" in refused(main, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refused(main, tokenizer=tmp_path)
    other = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    other.save(str(tmp_path / "tokenizer.json"))
    assert "RoBERTa" in refused(main, tokenizer=tmp_path)
    tokens = json.loads((words / "vocab.json").read_text())
    large = tmp_path / "large"
    large.mkdir()
    tokens |= {f"word{i}": len(tokens) + i for i in range(100)}
    (large / "vocab.json").write_text(json.dumps(tokens))
    (large / "merges.txt").write_text((words / "merges.txt").read_text())
    assert f"{len(tokens)} tokens" in refused(files / "main.ckpt", tokenizer=large)
    assert not (tmp_path / "bundle").exists()


def test_every_task_through_the_command(
    files: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's session: import with separate files, then prompts, arrangement and every way to separate."""
    bundle = tmp_path / "bundle"
    separate = ("--clap", files / "clap.pt", "--tokenizer", words, "--weights", "raw", "--precision", "fp16")
    common = ("--config", files / "config.json", "--out", bundle, *separate)
    ran = backline(capsys, "import", files / "bare.ckpt", *common)
    assert ran.status == 0 and "missing:" not in ran.out, ran
    assert "read clap_text" in ran.out and "unused: module.audio_branch" in ran.out
    model = ("--model", bundle, "--steps", "2", "--seed", "1")
    sung = tmp_path / "reference.wav"
    soundfile.write(sung, noise(2.0), RATE)
    for i, prompt in enumerate(([], ["--text", "warm bass"], ["--audio", sung])):
        out = tmp_path / f"generated{i}"
        ran = backline(capsys, "generate", *model, "--seconds", "1", *prompt, "--out", out)
        assert ran.status == 0 and (out / "mix.wav").is_file(), ran
    context = tmp_path / "context"
    context.mkdir()
    soundfile.write(context / "bass.wav", noise(1.0), RATE)
    ran = backline(capsys, "fill", context, *model, "--arm", "drums,piano", "--out", tmp_path / "filled")
    assert ran.status == 0 and soundfile.info(tmp_path / "filled" / "piano.wav").samplerate == RATE, ran
    for method in ("mask", "dirac", "gaussian"):
        out = tmp_path / method
        ran = backline(capsys, "split", sung, *model, "--method", method, "--out", out)
        assert ran.status == 0 and soundfile.info(out / "drums.wav").frames == 2 * RATE, ran
