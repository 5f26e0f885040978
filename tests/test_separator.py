"""The separator: masks that sum to one at any level, learnt from stems, and what `split` uses where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from default_family import networks
from numpy.typing import NDArray
from torch import nn

from engine.audio import Audio
from engine.bundle import load_bundle
from engine.errors import BacklineError
from engine.manifest import Separator as Geometry
from engine.model import Model
from engine.separation import RESIDUAL, joined, separator_masks, split
from engine.take import Settings
from export.attention import attend
from export.separator import Recall, Separator, SeparatorConfig
from training import from_bundle
from training.add_separator import add_separator
from training.from_bundle import read_separator, read_weights
from training.loop import write_checkpoint
from training.stems import STEMS
from training.train_separator import (
    DARK,
    DULL,
    FRAMES,
    HOP,
    KNOCK,
    Mixtures,
    _crossed,
    _equalisers,
    _knocked,
    draw,
    load_stems,
    mask_error,
    separation_loss,
)

RATE = 22050
SAMPLES = (FRAMES - 1) * HOP
SMALL = SeparatorConfig(blocks=2, dim=16, seen=4, track=32)
BINS = SMALL.bins + 1
LOW_HIGH = ((30, 10000), (20, 9000))  # Hz, of two renders


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two songs of four tones an octave or more apart, as training.render --stems writes them."""
    folder = tmp_path_factory.mktemp("songs")
    t = np.arange(int(SAMPLES * 1.5)) / RATE
    for song in range(2):
        tones = [
            np.sin(2 * np.pi * hz * (1 + 0.05 * song) * t) * (np.sin(2 * np.pi * 2 * t) > -0.5)
            for hz in (80, 300, 1200, 5000)
        ]
        np.save(folder / f"{song:06d}.stems.npy", (np.array(tones)[:, None] * 6000).astype(np.int16))
    return folder


def test_untrained_masks_are_equal_and_any_gain_is_heard_alike() -> None:
    torch.manual_seed(0)
    network = Separator(SMALL)
    mixture = torch.rand(2, 12, BINS)
    assert torch.allclose(network(mixture), torch.tensor(0.25))
    for layer in network.outward:
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    masks = network(mixture)
    assert masks.shape == (2, 4, 12, BINS)
    assert torch.allclose(masks.sum(1), torch.tensor(1.0), atol=1e-5)
    assert float((masks - 0.25).detach().abs().max()) > 0.2
    assert torch.allclose(network(mixture * 300), masks, atol=1e-4)
    assert torch.isfinite(network(torch.zeros(1, 4, BINS))).all()


def test_recall_adds_nothing_until_trained_and_then_what_is_far_away() -> None:
    torch.manual_seed(0)
    recall = Recall(16, heads=2, head=8)
    heard = torch.randn(3, 50, 16)
    assert not recall(heard).any()
    nn.init.normal_(recall.answer.weight)
    told = recall(heard)
    assert told.shape == heard.shape
    louder = heard.clone()
    louder[:, -1] += torch.randn(16)
    assert float((recall(louder) - told)[:, 0].detach().abs().max()) > 1e-3
    order = torch.randperm(50)
    assert torch.allclose(recall(heard[:, order]), told[:, order], atol=1e-5)


def test_attention_is_the_same_with_gradients() -> None:
    """What training computes for itself, and its gradients, against torch's own kernel."""
    torch.manual_seed(0)
    given = [torch.randn(3, count, 16) for count in (20, 30, 30)]
    mine, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    out = attend(*mine, heads=2)
    heads = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in theirs]
    expected = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(attend(*given, heads=2), expected, atol=1e-6)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-5)


def test_the_error_is_the_audios() -> None:
    """mask_error against masks applied and inverted: the audio's own signal-to-noise ratio."""
    rng = np.random.default_rng(0)
    spectra = torch.randn(1, 4, 40, BINS, dtype=torch.complex64)
    mixture = spectra.sum(1)
    given = Mixtures(
        mixture.abs(),
        (mixture.conj()[:, None] * spectra).real,
        spectra.abs().square().sum((2, 3)),
    )
    masks = torch.from_numpy(rng.random((1, 4, 40, BINS), np.float32))
    plain = (masks * mixture[:, None] - spectra).abs().square().sum((2, 3)) / given.energy
    assert torch.allclose(mask_error(masks, given).exp(), plain, rtol=5e-3)


def test_silence_is_no_error() -> None:
    """A silent stem, and a wholly silent mixture, leave loss and gradients finite."""
    nothing = torch.zeros(1, 12, BINS)
    given = Mixtures(nothing, torch.zeros(1, 4, 12, BINS), torch.zeros(1, 4))
    network = Separator(SMALL)
    loss, logs = separation_loss(network, given, "cpu")
    loss.backward()
    assert float(loss.detach()) == 0 and logs == {}
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_training_separates(songs: Path) -> None:
    torch.manual_seed(0)
    loaded, rng = load_stems(songs), np.random.default_rng(0)
    network = Separator(SMALL)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    errors = []
    for _ in range(25):
        loss, logs = separation_loss(network, draw(loaded, 1, rng), "cpu")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(logs["db"])
    assert np.mean(errors[-5:]) < errors[0] - 5


def test_drawn_mixtures(songs: Path) -> None:
    loaded = load_stems(songs)
    plain = draw(loaded, 2, np.random.default_rng(3), augment=False)
    again = draw(loaded, 2, np.random.default_rng(3), augment=False)
    other = draw(loaded, 2, np.random.default_rng(3))
    assert plain.mixture.shape == (2, FRAMES, BINS)
    assert draw(loaded, 1, np.random.default_rng(3), frames=FRAMES + 2).mixture.shape == (1, FRAMES + 2, BINS)
    assert torch.equal(plain.mixture, again.mixture) and not torch.equal(plain.mixture, other.mixture)
    # the stems' shares of the mixture sum to its power
    assert torch.allclose(plain.shared.sum(1), plain.mixture.square(), atol=1e-2, rtol=1e-3)
    with pytest.raises(FileNotFoundError, match="--stems"):
        load_stems(songs / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"18\.7 s"):  # 14.8 s, a quarter faster
        load_stems(songs, frames=4 * FRAMES)


def test_stems_of_two_renders_take_low_tones_from_the_first() -> None:
    """Whatever the frequency between 150 Hz and 4 kHz, at which the one ends and the other begins."""
    t = np.arange(RATE) / RATE
    first, second = (np.sin(2 * np.pi * low * t) + np.sin(2 * np.pi * high * t) for low, high in LOW_HIGH)
    rng = np.random.default_rng(0)
    for _ in range(10):
        crossed = _crossed(first.astype(np.float32), second.astype(np.float32), rng)
        (kept, lost), (gone, had) = np.abs(np.fft.rfft(crossed))[np.array(LOW_HIGH)] / (RATE / 2)
        assert min(kept, had) > 0.9 and max(lost, gone) < 0.1


def test_some_stems_end_where_samples_of_a_low_rate_do() -> None:
    factors = _equalisers(400, BINS, np.random.default_rng(0))[:, STEMS.index("drums"), 0]
    dull = factors[..., -1] < 1e-2 * factors[..., BINS // 11]  # at 11 and at 1 kHz
    assert float(dull.float().mean()) == pytest.approx(DULL, abs=0.05)


def test_some_basses_are_hardly_more_than_their_lowest_tone() -> None:
    """At 400 Hz 15 dB below 50 Hz and more; drums never are."""
    factors = _equalisers(400, BINS, np.random.default_rng(0))[:, :, 0]
    hz = RATE / 2 / (BINS - 1)
    fallen = factors[..., round(400 / hz)] / factors[..., round(50 / hz)] < 10 ** (-15 / 20)
    shares = fallen.float().mean(0)
    assert 0.05 < shares[STEMS.index("bass")] < DARK and shares[STEMS.index("drums")] < 0.01


def test_a_hollow_instrument_knocks_where_it_is_plucked() -> None:
    """At a pitch of its own, whatever is played, and not while notes ring."""
    t = np.arange(SAMPLES) / RATE
    since = t % 0.5
    played = (np.sin(2 * np.pi * 440 * t) * np.exp(-3 * since)).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(10):
        knock = _knocked(played, rng) - played
        spectrum, hz = np.abs(np.fft.rfft(knock)) ** 2, np.fft.rfftfreq(SAMPLES, 1 / RATE)
        assert spectrum[(hz > 20) & (hz < 200)].sum() > 0.9 * spectrum.sum()
        energy = knock[(since < 0.25) & (t > 0.5)], knock[(since >= 0.25) & (t > 0.5)]
        assert (energy[0] ** 2).sum() > 9 * (energy[1] ** 2).sum()
        ratio = 10 * np.log10(np.mean(knock**2) / np.mean(played**2))
        assert KNOCK[0] - 0.1 < ratio < KNOCK[1] + 0.1
    assert np.isfinite(_knocked(np.zeros(SAMPLES, np.float32), rng)).all()


def test_split_uses_it_and_stems_sum_to_the_mix(tiny_default_bundle: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_default_bundle, plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["capabilities"].remove("separator")
    manifest["separator"] = None
    del manifest["files"]["separator.onnx"]
    (plain / "separator.onnx").unlink()
    (plain / "manifest.json").write_text(json.dumps(manifest))
    with_it, without = (Model.open(folder, "cpu", 1) for folder in (tiny_default_bundle, plain))
    for rate, channels, length in ((16000, 2, 40000), (44100, 1, 90000), (8000, 3, 8000)):
        noise = np.random.default_rng(0).standard_normal((channels, length)).astype(np.float32)
        mix = Audio(noise, rate)
        for residual in (False, True):
            ours, theirs = (
                split(m, mix, residual=residual, settings=Settings(seed=1)) for m in (with_it, without)
            )
            for take in (ours, theirs):
                assert np.abs(take.mix().samples - noise).max() < 1e-5
            assert (RESIDUAL in ours.stems) == residual
            if not residual:  # an untrained UNet explains nothing: the residual takes all
                assert np.abs(ours.stems["bass"].samples - theirs.stems["bass"].samples).max() > 1e-3


def test_better_qualities_hear_the_mix_at_more_pitches(
    tiny_default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks that part tones wherever and whenever these are played part them as they are in the mix."""
    model = Model.open(tiny_default_bundle, "cpu", 1)
    t = np.arange(3 * 44100) / 44100
    low, drums = 0.2 * np.sin(2 * np.pi * 500 * t), 0.1 * np.sin(2 * np.pi * 2000 * t) * (t > 2.2)
    true = {"bass": low * (t > 2.2), "drums": drums, "guitar": low * (t <= 2.2)}
    heard: list[int] = []

    def parted(magnitudes: NDArray[np.float32]) -> NDArray[np.float32]:
        masks = np.zeros((4, *magnitudes.shape), np.float32)
        heard.append(int(magnitudes.mean(0).argmax()))  # the bin of the bass, as played
        masks[0, :, : 2 * heard[-1]], masks[1, :, 2 * heard[-1] :] = 1, 1
        early = magnitudes[:, 3 * heard[-1] :].max(1) < 0.2 * magnitudes.max()
        masks[:, early], masks[2, early] = 0, 1
        return masks

    monkeypatch.setattr(model, "separate", parted)
    mix = Audio((low + drums)[None].astype(np.float32), 44100)
    for quality, bins in (("draft", {16}), ("normal", {15, 17}), ("best", {13, 14, 16, 18, 20})):  # of 31 Hz
        heard.clear()
        take = split(model, mix, settings=Settings(seed=1, quality=quality))  # type: ignore[arg-type]
        assert set(heard) == bins
        assert np.abs(take.mix().samples - mix.samples).max() < 1e-5
        for stem, part in true.items():
            error = take.stems[stem].samples[0] - part
            assert (error**2).sum() < 0.03 * (part**2).sum(), (quality, stem)


def test_what_both_hear_counts_by_their_shares() -> None:
    """In the logarithm, without a stem that one of them rules out, and less what a residual takes."""
    seconds, hz = np.zeros(1), np.zeros(1)
    first, second = (np.float32(x).reshape(2, 1, 1) for x in ((0.8, 0.2), (0.1, 0.9)))
    both = joined(lambda *_: first, lambda *_: second, 0.25)(seconds, hz)
    odds = (0.8 / 0.2) ** 0.25 * (0.1 / 0.9) ** 0.75
    assert both[:, 0, 0] == pytest.approx([odds / (1 + odds), 1 / (1 + odds)], rel=1e-3)
    sure = np.float32([1, 0]).reshape(2, 1, 1)
    assert joined(lambda *_: sure, lambda *_: second, 0.5)(seconds, hz)[0, 0, 0] > 0.9
    third = np.concatenate([second * 0.6, np.full((1, 1, 1), 0.4, np.float32)])
    for share, stem in ((1.0, 0.8), (0.25, odds / (1 + odds))):
        less = joined(lambda *_: first, lambda *_: third, share)(seconds, hz)[:, 0, 0]
        assert less == pytest.approx([0.6 * stem, 0.6 * (1 - stem), 0.4], rel=1e-3)


def test_the_unet_joins_in_where_the_bundle_says_so(tiny_default_bundle: Path, tmp_path: Path) -> None:
    """Not in a draft; and a bundle that says nothing has its separator alone."""
    noise = np.random.default_rng(0).standard_normal((1, 30000)).astype(np.float32)
    stems: dict[tuple[float, str], NDArray[np.float32]] = {}
    for share in (1.0, 0.6):
        folder = tmp_path / str(share)
        shutil.copytree(tiny_default_bundle, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["separator"]["share"] = share
        (folder / "manifest.json").write_text(json.dumps(manifest))
        model = Model.open(folder, "cpu", 1)
        for quality in ("draft", "normal"):
            for residual in (False, True):
                settings = Settings(seed=1, quality=quality)  # type: ignore[arg-type]
                take = split(model, Audio(noise, 8000), residual=residual, settings=settings)
                assert np.abs(take.mix().samples - noise).max() < 1e-5
            stems[share, quality] = take.stems["bass"].samples
    plain = split(
        Model.open(tiny_default_bundle, "cpu", 1),
        Audio(noise, 8000),
        residual=True,
        settings=Settings(seed=1),
    )
    assert np.array_equal(plain.stems["bass"].samples, stems[1.0, "normal"])
    assert np.array_equal(stems[0.6, "draft"], stems[1.0, "draft"])
    assert np.abs(stems[0.6, "normal"] - stems[1.0, "normal"]).max() > 1e-3


def test_progress_never_goes_back(tiny_default_bundle: Path) -> None:
    """Not even with a residual, for which the UNet listens after the separator."""
    mix = Audio(np.random.default_rng(0).standard_normal((1, 30000)).astype(np.float32), 8000)
    for residual, quality in ((False, "normal"), (True, "normal"), (False, "best"), (True, "best")):
        told: list[float] = []
        split(
            Model.open(tiny_default_bundle, "cpu", 1),
            mix,
            residual=residual,
            settings=Settings(seed=1, quality=quality),  # type: ignore[arg-type]
            callback=lambda phase, fraction, told=told: told.append(fraction),  # type: ignore[misc]
        )
        assert told == sorted(told) and told[-1] == 1.0


def test_windows_of_a_long_mix_are_joined(tiny_default_bundle: Path) -> None:
    """Everywhere each frame has masks as its own window gives them: what a split of its middle has there."""
    model = Model.open(tiny_default_bundle, "cpu", 1)
    signal = np.random.default_rng(1).standard_normal(8000 * 3).astype(np.float32)
    take = split(model, Audio(signal[None], 8000), settings=Settings(seed=1))
    bass = take.stems["bass"].samples[0]
    assert np.isfinite(bass).all()
    blocks = bass[: 8000 * 3 // 400 * 400].reshape(-1, 400)
    assert (np.sqrt((blocks**2).mean(1)) > 0.01).all()  # no frame is left at zero


def test_masks_between_frames_and_bins() -> None:
    """Linear in time and frequency, whatever grid the mix has, and held beyond the ends and f_max."""
    geometry = geometry_of(frames=5)
    seconds = np.array([-0.1, 0.5 * 64 / 8000, 1.0])
    hz = np.array([0.0, 8000 / 256 * 1.5, 20000.0])
    stored = np.zeros((1, 5, 129), np.float32)
    stored[0] = np.arange(5)[:, None] * 1000 + np.arange(129)
    found = separator_masks(stored, geometry)(seconds, hz)[0]
    assert np.allclose(found, [[0, 1.5, 96], [500, 501.5, 596], [4000, 4001.5, 4096]], atol=1e-2)


def geometry_of(frames: int) -> Geometry:
    return Geometry(sample_rate=8000, n_fft=256, hop=64, patch=1, window_frames=frames, f_max=3000)


def test_a_bundle_that_declares_it_says_how_it_hears(tiny_default_bundle: Path, tmp_path: Path) -> None:
    declared = json.loads((tiny_default_bundle / "manifest.json").read_text())
    deaf = [capability for capability in declared["capabilities"] if capability != "mixture"]
    for changed in ({"separator": None}, {"capabilities": deaf}):
        broken = tmp_path / next(iter(changed))
        shutil.copytree(tiny_default_bundle, broken)
        manifest = declared | changed
        (broken / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BacklineError, match=r"separator|mixture"):
            load_bundle(broken)


def test_float16_weights_make_the_same_masks(tiny_default_bundle: Path) -> None:
    network = networks()["separator"]
    magnitudes = np.random.default_rng(0).random((10, 129), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(magnitudes)[None])[0].numpy()
    masks = Model.open(tiny_default_bundle, "cpu", 1).separate(magnitudes)
    assert np.abs(masks - expected).max() < 2e-2


def test_it_is_added_to_a_bundle_and_read_from_it_again(tiny_default_bundle: Path, tmp_path: Path) -> None:
    """A bundle that had another one gets this one, keeps everything else, and training goes on from it."""
    torch.manual_seed(0)
    trained = Separator(SeparatorConfig(blocks=1))
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.1)
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint({"ema": trained.state_dict()}, run)
    (run / "log.jsonl").write_text('{"step": 7, "minutes": 1.5}\n')
    made = add_separator(tiny_default_bundle, run, tmp_path / "made", "9", config=trained.config)
    before = load_bundle(tiny_default_bundle).manifest
    assert {name for name in made.files if made.files[name] != before.files[name]} == {"separator.onnx"}
    assert made.version == "9" and made.provenance["training"]["separator"] == {"steps": 7, "minutes": 1.5}
    read = read_separator(load_bundle(tmp_path / "made"))
    mixture = torch.rand(1, 8, 1025)
    with torch.no_grad():
        assert torch.allclose(read(mixture), trained(mixture), atol=5e-3)
    noise = np.random.default_rng(0).standard_normal((1, 60000)).astype(np.float32)
    take = split(Model.open(tmp_path / "made", "cpu", 1), Audio(noise, 44100))
    assert np.abs(take.mix().samples - noise).max() < 1e-5


def test_a_separator_without_attention_can_be_trained_on(
    tiny_default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles up to 0.16.0 have none."""
    bundle = load_bundle(tiny_default_bundle)
    weights = read_weights(bundle.path("separator.onnx"))
    kept = {name: w for name, w in weights.items() if ".along." not in name and ".within." not in name}
    assert len(kept) < len(weights)
    monkeypatch.setattr(from_bundle, "read_weights", lambda path: kept)
    network = read_separator(bundle)
    mixture = torch.rand(1, 8, network.config.bins + 1)
    with torch.no_grad():
        masks = network(mixture)
        for block in network.blocks:
            block.along.ask.weight.normal_()  # type: ignore[union-attr,operator]
        assert torch.equal(network(mixture), masks)


def test_the_mean_with_an_earlier_state(tiny_default_bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = [Separator(SeparatorConfig(blocks=1)) for _ in range(3)]
    config = networks[0].config
    for number, name in enumerate(("later", "earlier")):
        for parameter in networks[number].parameters():
            nn.init.normal_(parameter, std=0.1)
        (tmp_path / name).mkdir()
        write_checkpoint({"ema": networks[number].state_dict()}, tmp_path / name)
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"step": 9 - number, "minutes": 2.5 - number}))
    runs = {"run": tmp_path / "later", "earlier": tmp_path / "earlier"}
    made = add_separator(
        tiny_default_bundle, out=tmp_path / "made", version="9", share=0.7, config=config, **runs
    )
    told = {"steps": 9, "minutes": 2.5, "mean_with_minutes": 1.5}
    assert made.provenance["training"]["separator"] == told
    assert made.separator is not None and made.separator.share == 0.7
    with torch.no_grad():
        for mean, *both in zip(*(n.parameters() for n in reversed(networks)), strict=True):
            mean.copy_(sum(both) / 2)
        mixture = torch.rand(1, 8, 1025)
        found = read_separator(load_bundle(tmp_path / "made"))(mixture)
        assert torch.allclose(found, networks[2](mixture), atol=5e-3)
        assert not torch.allclose(found, networks[0](mixture), atol=2e-2)
