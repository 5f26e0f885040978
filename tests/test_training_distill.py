"""Distillation: long steps that arrive where several guided ones do, beside a UNet that stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.bundle import load_bundle
from engine.denoisers import guided as guided_in_numpy
from engine.manifest import Distilled, Preset, Sampling
from engine.model import Model
from engine.samplers import sample_distilled, sample_dpmpp_2m
from engine.schedule import make_schedule
from export.stem_unet import StemUNet, StemUNetConfig, weakened
from training import distill
from training.add_distilled import add_distilled
from training.bundle import with_distilled
from training.distill import STEPS, SUBSTEPS, Lesson, distillation_loss, make_lesson, make_table, solve
from training.from_bundle import read_unet
from training.loop import give_weights, load_ema, write_checkpoint
from training.stems import STEMS
from training.train_unet import SCHEDULE, Batch

S, Z, T, TONES = len(STEMS), 5 + 12, 14, 12
SIZES = StemUNetConfig(
    channels=Z, film=8, width=16, inner=16, blocks_down=1, blocks_up=1, layers=1, heads=2, cond=16,
    tones=TONES, harmony=16, harmony_blocks=1, adapter=8,
)  # fmt: skip
ALPHAS = torch.from_numpy(make_schedule(SCHEDULE).alphas_cumprod).float()
ARMED = (STEMS.index("bass"), STEMS.index("piano"))
METRIC = torch.eye(Z).repeat(S, 1, 1)


def random(module: StemUNet) -> StemUNet:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return module.eval().requires_grad_(False)


@pytest.fixture
def batch() -> Batch:
    """A fill of the bass and one of the piano, and a band made up from nothing."""
    torch.manual_seed(1)
    latents = torch.randn(3, S, Z, T, 1)
    mask = torch.ones(3, S, T)
    for row, stem in enumerate(ARMED):
        mask[row, stem] = 0
    mask[2] = 0
    inputs = {
        "film": torch.randn(3, 8),
        "context": latents * mask[:, :, None, :, None],
        "context_mask": mask,
        "mixture": torch.zeros(3, Z, T, 1),
        "mixture_mask": torch.zeros(3, T),
        "mixture_stems": torch.zeros(3, S),
        "grid": torch.randn(3, T, 6),
        "chords": torch.randn(3, T, 25),
    }
    silent = torch.zeros(3, dtype=torch.bool)
    return Batch(latents, inputs, torch.ones(3, S, T), silent, torch.zeros(0), torch.zeros(0))


def student_of(teacher: StemUNet) -> StemUNet:
    student = StemUNet(replace(SIZES, distilled=SCHEDULE.steps))
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.requires_grad_(False)
    student.distilled.requires_grad_(True)
    return student


def test_long_steps_are_every_third_of_the_teachers() -> None:
    few, many = make_table(STEPS), make_table(STEPS * SUBSTEPS)
    assert torch.equal(few.timesteps, many.timesteps[::SUBSTEPS])
    assert few.timesteps[0] == SCHEDULE.steps - 1 and few.timesteps[-1] > 0


def test_the_solver_is_the_engines() -> None:
    table, schedule = make_table(11), make_schedule(SCHEDULE)
    weights = np.random.default_rng(0).normal(0, 1, SCHEDULE.steps)
    x = torch.randn(2, S, 3, 4, 1)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * torch.from_numpy(weights).float()[t][:, None, None, None, None])

    seen = []

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        seen.append(x)
        return np.tanh(x * np.float32(weights[t]))

    sample_dpmpp_2m(denoise, x.numpy(), schedule, steps=12)
    for count in range(table.steps):
        mine = solve(predict, x, table, torch.zeros(2, dtype=torch.int64), count) * table.alpha[count]
        assert np.allclose(mine.numpy(), seen[count], atol=1e-4)
    first = solve(predict, x, table, torch.zeros(2, dtype=torch.int64), 3)
    apart = torch.stack([solve(predict, x, table, torch.tensor([0, 5]), 3)[0], first[0]])
    assert torch.allclose(apart[0], apart[1], atol=1e-5), "each sample has its own place"


def test_fills_are_guided_as_the_engine_does_and_what_is_known_stays(batch: Batch) -> None:
    teacher = random(StemUNet(SIZES))
    x, t = torch.randn(3, S, Z, T, 1), torch.full((3,), 600)
    found = distill.guided(teacher, weakened(teacher), batch, ALPHAS)(x, t)
    nothing = {k: torch.zeros_like(v) if k != "film" else v for k, v in batch.inputs.items()}
    told = distill.clean_from(teacher, x, t, ALPHAS, batch.inputs).numpy()
    untold = distill.clean_from(weakened(teacher), x, t, ALPHAS, nothing).numpy()
    least = [distill.FIRMER.get(stem, distill.LISTENING) for stem in STEMS]
    kept = [float(stem not in distill.FREED) for stem in STEMS]
    scales, rescales = (np.float32(v)[:, None, None, None] for v in (least, kept))
    wanted = guided_in_numpy(lambda x, t: told, lambda x, t: untold, scales, rescale=rescales)(x.numpy(), 600)
    for row, stem in enumerate(ARMED):
        assert np.allclose(found[row, stem], wanted[row, stem], atol=1e-4)
        others = [i for i in range(S) if i != stem]
        assert torch.equal(found[row, others], batch.inputs["context"][row, others])
    assert np.allclose(found[2], told[2], atol=1e-4), "a band from nothing has nothing to weigh"


def test_a_lessons_long_step_arrives_where_the_teacher_does(batch: Batch) -> None:
    teacher = random(StemUNet(SIZES))
    start = torch.tensor([0, 1, STEPS - 1])
    lesson = make_lesson(teacher, weakened(teacher), batch, start, ALPHAS)
    table = make_table(STEPS * SUBSTEPS)
    assert torch.equal(lesson.t, table.timesteps[start * SUBSTEPS])
    arrived = solve(
        distill.guided(teacher, weakened(teacher), batch, ALPHAS), lesson.x, table, start * SUBSTEPS, SUBSTEPS
    )
    a, s = (distill.wide(x[lesson.t].sqrt()) for x in (ALPHAS, 1 - ALPHAS))
    clean = a * lesson.x - s * lesson.v
    few = make_table(STEPS)
    ratio = few.sigma[start + 1] / few.sigma[start]
    landed = distill.wide(ratio) * lesson.x / a + distill.wide(1 - ratio) * clean
    assert torch.allclose(landed, arrived, atol=1e-3)
    assert torch.allclose(landed[2], clean[2], atol=1e-4), "the last step is to clean"


def test_a_student_that_knows_its_lessons_samples_as_they_say(batch: Batch) -> None:
    """Four long steps with the lessons' predictions are the teacher's twelve."""
    teacher = random(StemUNet(SIZES))
    noise = torch.randn(3, S, Z, T, 1)
    table, predict = make_table(STEPS * SUBSTEPS), distill.guided(teacher, weakened(teacher), batch, ALPHAS)
    x = noise
    for i in range(STEPS):
        place = torch.full((3,), i * SUBSTEPS)
        x = solve(predict, x, table, place, SUBSTEPS)
        x = x * table.alpha[(i + 1) * SUBSTEPS] if i + 1 < STEPS else x

    def knows(x: np.ndarray, t: int) -> np.ndarray:
        place = torch.full((3,), int((table.timesteps == t).nonzero()))
        arrived = solve(predict, torch.from_numpy(x), table, place, SUBSTEPS)
        ratio = table.sigma[place + SUBSTEPS] / table.sigma[place]
        scaled = torch.from_numpy(x) / distill.wide(table.alpha[place])
        return ((arrived - distill.wide(ratio) * scaled) / distill.wide(1 - ratio)).numpy()

    found = sample_distilled(knows, noise.numpy(), make_schedule(SCHEDULE), steps=STEPS)
    assert np.allclose(found, x.numpy(), atol=1e-3)


def test_only_what_is_new_learns_and_it_learns(batch: Batch) -> None:
    teacher = random(StemUNet(SIZES))
    student = student_of(teacher)
    lesson = make_lesson(teacher, weakened(teacher), batch, torch.tensor([0, 1, 2]), ALPHAS)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 0.02)
    before = distillation_loss(student, lesson, METRIC).item()
    for _ in range(60):
        loss = distillation_loss(student, lesson, METRIC)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert distillation_loss(student, lesson, METRIC).item() < 0.5 * before
    x, t = lesson.x, torch.tensor([3, 500, 999])
    assert torch.equal(student(x, t, **batch.inputs), teacher(x, t, **batch.inputs))


def test_a_distillation_follows_a_unet_that_was_trained_on(tmp_path: Path) -> None:
    sizes = replace(SIZES, distilled=SCHEDULE.steps)
    old, new = random(StemUNet(sizes)), StemUNet(SIZES)
    write_checkpoint({"model": old.state_dict(), "ema": old.state_dict(), "step": 5}, tmp_path)
    give_weights(tmp_path, new.state_dict())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    taught = load_ema(tmp_path, StemUNet(sizes)).state_dict()
    assert state["step"] == 5
    for name, weights in new.state_dict().items():
        assert torch.equal(taught[name], weights) and torch.equal(state["model"][name], weights)
    own = [name for name in taught if name not in new.state_dict()]
    assert own and all(torch.equal(taught[name], old.state_dict()[name]) for name in own)


def test_a_bundle_takes_the_taught_steps_and_keeps_all_else(
    tiny_default_bundle: Path, tmp_path: Path
) -> None:
    before = load_bundle(tiny_default_bundle)
    sizes = replace(
        StemUNetConfig(**before.manifest.networks["unet"]), distilled=SCHEDULE.steps, weakened=True
    )
    unet = random(StemUNet(sizes))
    unet.load_state_dict(read_unet(before).state_dict(), strict=False)
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint({"model": unet.state_dict(), "ema": unet.state_dict(), "step": 5}, run)
    (run / "log.jsonl").write_text('{"step": 5, "minutes": 1.26}\n')
    spent = before.manifest.provenance.get("training", {})
    made = add_distilled(tiny_default_bundle, run, tmp_path / "made", "9")
    assert made.provenance["training"] == spent | {"distilled": {"steps": 5, "minutes": 1.3}}
    made = add_distilled(tiny_default_bundle, run, tmp_path / "made", "9", unet=run, force=True)
    assert made.provenance["training"]["unet"] == {"steps": 5, "minutes": 1.3}
    changed = {name for name in made.files if made.files[name] != before.manifest.files[name]}
    assert changed == {"unet.onnx"} and made.files.keys() == before.manifest.files.keys()
    assert made.version == "9" and made.distilled == Distilled(steps=STEPS, listening=distill.LISTENING)
    assert made.weakened is not None and made.weakened.listening == distill.FIRMER
    assert set(made.capabilities) - set(before.manifest.capabilities) == {"distilled", "weakened"}
    x = np.random.default_rng(0).normal(0, 1, (1, S, sizes.channels, 12, 1)).astype(np.float32)
    old, new = (Model.open(path, "cpu", 1) for path in (tiny_default_bundle, tmp_path / "made"))
    assert np.abs(old.denoiser({})(x, 300) - new.denoiser({})(x, 300)).max() < 1e-3
    given = {
        name: torch.from_numpy(value.copy()) for name, value in new.condition_inputs({}, x.shape).items()
    }
    for t in (300, 1300, 2300):
        wanted = unet(torch.from_numpy(x), torch.tensor([t]), **given).numpy()
        assert np.abs(new.predict(x, t, {}) - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_neither_what_is_known_nor_the_tones_count(batch: Batch) -> None:
    student = student_of(random(StemUNet(SIZES)))
    teacher = random(StemUNet(SIZES))
    lesson = make_lesson(teacher, weakened(teacher), batch, torch.tensor([0, 1, 2]), ALPHAS)
    loss = distillation_loss(student, lesson, METRIC)
    for other in (
        replace_v(lesson, (0, slice(1, None))),
        replace_v(lesson, (1, slice(0, S - 1))),
        replace_v(lesson, (slice(None), slice(None), slice(Z - TONES, None))),
    ):
        assert torch.equal(distillation_loss(student, other, METRIC), loss)
    assert distillation_loss(student, replace_v(lesson, (0, 0, 0)), METRIC) > loss


def replace_v(lesson: Lesson, where: tuple) -> Lesson:
    v = lesson.v.clone()
    v[where] += 30
    return replace(lesson, v=v)


def test_comparing_from_the_same_noise(batch: Batch) -> None:
    teacher = random(StemUNet(SIZES))
    torch.manual_seed(4)
    found = distill.compare(student_of(teacher).eval(), teacher, weakened(teacher), batch, ALPHAS)
    assert set(found) == {"apart_distilled", "apart_euler", "apart_plain"}
    assert all(0 < value < 10 for value in found.values())
    assert isinstance(teacher.harmony, nn.Module)


def test_which_qualities_are_sampled_in_distilled_steps() -> None:
    plain = Sampling(sampler="dpmpp_2m", steps=12, listening=1.5)
    draft = with_distilled(plain, 4, normal=False)
    assert [draft.preset(q, 1000) for q in ("draft", "normal")] == [
        Preset(sampler="distilled", steps=4),
        Preset(sampler="dpmpp_2m", steps=12),
    ]
    normal = with_distilled(plain, 4, normal=True)
    assert (
        normal.preset("draft", 1000) == normal.preset("normal", 1000) == Preset(sampler="distilled", steps=4)
    )
    assert normal.preset("best", 1000) == Preset(sampler="dpmpp_2m", steps=12) and normal.listening == 1.5
    given = plain.model_copy(update={"quality": {"best": Preset(sampler="dpmpp_2m", steps=32)}})
    assert with_distilled(given, 4, normal=True).preset("best", 1000).steps == 32
