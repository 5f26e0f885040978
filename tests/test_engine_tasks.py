"""Generate and fill on tiny bundles: shapes, seeds, subsets, what is listened to, cancelling, refusals."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import FEW as DISTILLED
from tiny_bundle import STEMS, VOCODER_RATE, WEAK, write_tiny_bundle

from engine import tasks, windows
from engine.audio import Audio
from engine.errors import BacklineError, Cancelled, UsageError
from engine.model import Model
from engine.separation import Method
from engine.take import Settings, Take

FEW = Settings(steps=2)
MODELS = ("tiny_model", "plain_model")


def tone(seconds: float = 1.5, rate: int = 16000, channels: int = 1, hz: float = 220.0) -> Audio:
    time = np.arange(round(seconds * rate)) / rate
    left = 0.2 * np.sin(2 * np.pi * hz * time) * (1 + np.sin(2 * np.pi * 3 * time))
    return Audio(np.stack([left * (1 + 0.1 * c) for c in range(channels)]).astype(np.float32), rate)


def band(seconds: float = 1.5, rate: int = 16000, channels: int = 1) -> dict[str, Audio]:
    return {name: tone(seconds, rate, channels, 110.0 * (i + 1)) for i, name in enumerate(STEMS)}


def without(*names: str, **kwargs: Any) -> dict[str, Audio]:
    return {name: audio for name, audio in band(**kwargs).items() if name not in names}


def content(take: Take) -> bytes:
    return b"".join(take.stems[name].samples.tobytes() for name in sorted(take.stems))


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("seconds", [1.0, 1.37, 1.92, 4.003])
def test_generate_has_the_exact_length(which: str, seconds: float, request: pytest.FixtureRequest) -> None:
    take = tasks.generate(request.getfixturevalue(which), seconds=seconds, settings=FEW)
    assert tuple(take.stems) == STEMS
    for audio in take.stems.values():
        assert audio.sample_rate == VOCODER_RATE
        assert audio.samples.shape == (1, round(seconds * VOCODER_RATE))
        assert audio.samples.dtype == np.float32
        assert np.abs(audio.samples).max() > 0
    total = sum(audio.samples for audio in take.stems.values())
    assert np.allclose(take.mix().samples, total, rtol=1e-5)


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fill_takes_every_subset(which: str, size: int, request: pytest.FixtureRequest) -> None:
    for armed in itertools.combinations(STEMS, size):
        take = tasks.fill(request.getfixturevalue(which), without(*armed), armed, settings=FEW)
        assert tuple(take.stems) == armed
        assert all(audio.samples.shape == (1, 24000) for audio in take.stems.values())


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 96000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_fill_keeps_rate_length_and_channels(tiny_model: Model, rate: int, channels: int) -> None:
    context = without("piano", seconds=1.0005, rate=rate, channels=channels)
    context["bass"] = Audio(context["bass"].samples[:1, : rate + 3], rate)  # another length, and mono
    take = tasks.fill(tiny_model, context, ["piano"], settings=FEW)
    piano = take.stems["piano"]
    assert piano.sample_rate == rate
    assert piano.samples.shape == (channels, max(audio.length for audio in context.values()))
    assert all(np.array_equal(piano.samples[0], row) for row in piano.samples)


def with_makeup(model: Model, **makeup_db: float) -> Model:
    """The same model with another manifest."""
    louder = copy.copy(model)
    level = model.manifest.level
    assert level is not None
    level = level.model_copy(update={"makeup_db": makeup_db})
    louder.manifest = model.manifest.model_copy(update={"level": level})
    return louder


def test_makeup_makes_louder_what_is_made(tiny_model: Model) -> None:
    louder = with_makeup(tiny_model, piano=6.0)

    def takes(model: Model) -> list[Take]:
        return [
            tasks.fill(model, without("piano", "bass"), ["piano", "bass"], settings=FEW),
            tasks.continue_(model, band(), seconds=1.0, settings=FEW),
        ]

    for before, after in zip(takes(tiny_model), takes(louder), strict=True):
        for name, audio in before.stems.items():
            gain = 10 ** (6 / 20) if name == "piano" else 1.0
            assert np.allclose(after.stems[name].samples, gain * audio.samples, rtol=1e-4, atol=1e-6), name


def test_makeup_does_not_bring_up_what_lies_at_the_floor() -> None:
    floor, reach = np.log(1e-4), np.log(10) * 12 / 20
    given = np.array([floor - 1, floor, floor + 0.1, floor + reach / 2, floor + reach, 0.0], np.float32)
    mels = np.tile(given, (3, 5000, 1))
    tasks.hush(mels, np.array([[12.0], [0.0], [-6.0]], np.float32), 1e-4)
    raised = mels[0] + reach
    assert np.allclose(raised, raised[0]), "every frame, in whatever block"
    assert np.allclose(
        raised[0], [floor - 2, floor, floor + 0.2, floor + reach, *(given[4:] + reach)], atol=1e-5
    )
    assert np.allclose(mels[1:], given), "without a gain nothing is changed"


def test_a_band_has_its_own_makeup_and_does_not_clip(tiny_model: Model) -> None:
    def made(**gains: dict[str, float]) -> Take:
        model, level = copy.copy(tiny_model), tiny_model.manifest.level
        assert level is not None
        model.manifest = tiny_model.manifest.model_copy(update={"level": level.model_copy(update=gains)})
        return tasks.generate(model, seconds=1, settings=FEW)

    def levels(take: Take) -> np.ndarray:
        return np.array([20 * np.log10(np.abs(take.stems[stem].samples).max()) for stem in STEMS])

    quiet = dict.fromkeys(STEMS, -40.0)
    plain = levels(made(makeup_db=quiet))
    assert levels(made(makeup_db={"bass": 9.0}, alone_db=quiet)) == pytest.approx(plain, abs=1e-3)
    changed = levels(made(alone_db=quiet | {"piano": -46.0}))
    assert changed - plain == pytest.approx([0, 0, 0, -6.0], abs=1e-3)
    assert (plain + 60).max() > 0, "the next would clip"
    loud = made(alone_db=dict.fromkeys(STEMS, 20.0))
    assert np.abs(loud.mix().samples).max() <= 1.0
    assert levels(loud) - levels(loud)[0] == pytest.approx(plain - plain[0], abs=1e-2), "the balance stays"
    assert all(np.abs(part.samples).max() <= 1.0 for part in loud.stems.values())


@pytest.mark.parametrize("quiet", [0, 1, 2, 3])
def test_what_is_armed_is_heard(tiny_model: Model, monkeypatch: pytest.MonkeyPatch, quiet: int) -> None:
    """A sample in which the piano rests is followed by others, three at most."""
    calls = 0
    decode = tasks.decode_timeline

    def decode_quietly(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        mels = decode(*given) + 5.0
        return np.full_like(mels, -11.0) if calls <= quiet else mels

    monkeypatch.setattr(tasks, "decode_timeline", decode_quietly)
    takes = []
    for _ in range(2):
        calls = 0
        takes.append(tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW))
        assert calls == min(quiet + 1, 3)
    assert content(takes[0]) == content(takes[1])
    rests = ["The stem piano rests: nothing of it is heard."] if quiet == 3 else []
    assert takes[0].record["warnings"] == rests


@pytest.mark.parametrize("which", MODELS)
def test_fill_listens(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    first = tasks.fill(model, without("piano"), ["piano"], settings=FEW)
    changed = without("piano") | {"bass": tone(hz=3000.0)}
    assert content(tasks.fill(model, changed, ["piano"], settings=FEW)) != content(first)


def test_an_armed_stem_is_not_listened_to(tiny_model: Model) -> None:
    first = tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW)
    again = tasks.fill(tiny_model, band(), ["piano"], settings=FEW)
    assert content(first) == content(again)
    assert again.record["request"]["context"] == ["bass", "drums", "guitar"]


def test_a_missing_stem_is_unknown_unless_it_is_silent(tiny_model: Model) -> None:
    some = without("piano", "guitar")
    unknown = tasks.fill(tiny_model, some, ["piano"], settings=FEW)
    silent = tasks.fill(tiny_model, some, ["piano"], silent=["guitar"], settings=FEW)
    zeros = some | {"guitar": Audio(np.zeros((1, 24000), np.float32), 16000)}
    given = tasks.fill(tiny_model, zeros, ["piano"], settings=FEW)
    assert content(unknown) != content(silent)
    assert np.allclose(given.stems["piano"].samples, silent.stems["piano"].samples, rtol=1e-3, atol=1e-3)


def test_other_material_is_listened_to(tiny_model: Model) -> None:
    first = tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW)
    heard = tasks.fill(tiny_model, without("piano"), ["piano"], other=tone(hz=999), settings=FEW)
    assert content(first) != content(heard)
    alone = tasks.fill(tiny_model, {}, ["piano"], other=tone(2.0, 48000, 2), settings=FEW)
    assert alone.stems["piano"].samples.shape == (2, 96000)


def test_level_of_the_context_is_undone(tiny_model: Model) -> None:
    loud = tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW).stems["piano"].samples
    context = {
        name: Audio(audio.samples * np.float32(0.01), 16000) for name, audio in without("piano").items()
    }
    quiet = tasks.fill(tiny_model, context, ["piano"], settings=FEW).stems["piano"].samples
    assert np.abs(quiet * 100 - loud).max() < 1e-2 * np.abs(loud).max()


@pytest.mark.parametrize(
    "change",
    [
        {"text": "warm piano"},
        {"audio": tone(3.0)},
        {"bpm": 97.0},
        {"bpm": 97.0, "beats_per_bar": 3},
        {"bpm": 97.0, "first_beat": 0.2},
        {"bpm": 97.0, "chords": "C | F"},
        {"settings": Settings(seed=1, steps=2)},
        {"settings": Settings(steps=3)},
        {"settings": Settings(steps=2, sampler="ddim")},
        {"settings": Settings(steps=2, sampler="ddim", eta=1.0)},
    ],
)
def test_what_is_asked_for_is_heard(tiny_model: Model, change: dict[str, Any]) -> None:
    plain = tasks.generate(tiny_model, seconds=1.5, settings=FEW)
    asked = tasks.generate(tiny_model, **({"seconds": 1.5, "settings": FEW} | change))
    assert content(plain) != content(asked)
    filled = tasks.fill(tiny_model, without("piano"), ["piano"], **({"settings": FEW} | change))
    assert content(filled) != content(tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW))


def test_guidance_needs_a_prompt(tiny_model: Model) -> None:
    def take(guidance: float, text: str | None) -> bytes:
        settings = Settings(steps=2, guidance=guidance)
        return content(tasks.generate(tiny_model, seconds=1, text=text, free=True, settings=settings))

    assert take(3.0, "warm") != take(1.0, "warm")
    assert take(3.0, None) == take(1.0, None)
    assert take(0.0, "warm") == take(1.0, None)


def test_same_seed_same_bytes(tiny_bundle: Path) -> None:
    def takes(seed: int) -> bytes:
        model = Model.open(tiny_bundle, "cpu", 2)
        settings = Settings(seed=seed, steps=2)
        filled = tasks.fill(model, without("drums"), ["drums"], settings=settings)
        return content(tasks.generate(model, seconds=4.5, settings=settings)) + content(filled)

    assert takes(5) == takes(5)
    assert takes(5) != takes(6)


def test_the_record_is_enough_to_make_the_take_again(tiny_model: Model) -> None:
    settings = Settings(seed=3)
    take = tasks.generate(tiny_model, seconds=1.2, text="warm", bpm=100, chords="C | G7", settings=settings)
    record = json.loads(json.dumps(take.record))
    assert record["task"] == "generate"
    assert record["model"] == {"name": "tiny", "version": "1"}
    assert record["provider"] == "CPUExecutionProvider"
    assert set(record["timings"]) == {"load", "listen", "sample", "render"}
    request = {key: value for key, value in record["request"].items() if key != "audio"}
    again = tasks.generate(tiny_model, **request, settings=Settings(**record["settings"]))
    assert content(take) == content(again)


def jobs(model: Model) -> dict[str, Callable[[tasks.Callback], Take]]:
    settings = Settings(steps=3)
    return {
        "generate": lambda callback: tasks.generate(model, seconds=5, settings=settings, callback=callback),
        "fill": lambda callback: tasks.fill(
            model, without("bass", seconds=3), ["bass"], settings=settings, callback=callback
        ),
        "split": lambda callback: tasks.split(
            model, tone(3.0, 16000, 2), method="dirac", settings=settings, callback=callback
        ),
        "mask": lambda callback: tasks.split(model, tone(3.0, 16000, 2), callback=callback),
    }


@pytest.mark.parametrize("job", ["generate", "fill", "split", "mask"])
def test_progress_rises_to_one(tiny_model: Model, job: str) -> None:
    seen: list[tuple[str, float]] = []
    jobs(tiny_model)[job](lambda phase, fraction: seen.append((phase, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert list(dict.fromkeys(phase for phase, _ in seen)) == ["listen", "sample", "render"]


@pytest.mark.parametrize("job", ["generate", "fill", "split", "mask"])
def test_cancel_at_any_moment(tiny_model: Model, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that raises ends the job at once, with no evaluation after it."""
    evaluations = 0
    real = tiny_model.denoiser

    def denoiser(conditions: Any, **kwargs: Any) -> Any:
        denoise = real(conditions, **kwargs)

        def watched(x: np.ndarray, t: int) -> np.ndarray:
            nonlocal evaluations
            evaluations += 1
            return denoise(x, t)

        return watched

    monkeypatch.setattr(tiny_model, "denoiser", denoiser)
    reports = 0

    def count(phase: str, fraction: float) -> None:
        nonlocal reports
        reports += 1

    jobs(tiny_model)[job](count)
    for moment in range(reports):
        evaluations = calls = at_cancel = 0

        def cancel(phase: str, fraction: float) -> None:
            nonlocal calls, at_cancel
            calls += 1
            if calls > moment:  # noqa: B023 (called in this turn of the loop)
                at_cancel = evaluations  # noqa: B023
                raise Cancelled("Cancelled.")

        with pytest.raises(Cancelled):
            jobs(tiny_model)[job](cancel)
        assert calls == moment + 1
        assert evaluations == at_cancel


@pytest.mark.parametrize("seconds", [0, 0.99, -1, 1800.1, float("nan")])
def test_lengths_out_of_range(tiny_model: Model, seconds: float) -> None:
    with pytest.raises(UsageError, match="1 to 1800 s"):
        tasks.generate(tiny_model, seconds=seconds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(seed=-1), "seed"),
        (Settings(seed=1 << 63), "seed"),
        (Settings(steps=0), "1 to 1000"),
        (Settings(steps=1001), "1 to 1000"),
        (Settings(sampler="magic"), "no sampler 'magic'"),
        (Settings(sampler="distilled"), "istilled"),
        (Settings(guidance=-1.0), "guidance"),
        (Settings(guidance=float("nan")), "guidance"),
        (Settings(eta=1.5), "eta"),
        (Settings(gamma=0.0), "gamma"),
    ],
)
def test_settings_out_of_range(tiny_model: Model, settings: Settings, message: str) -> None:
    for start in (
        lambda: tasks.generate(tiny_model, seconds=1, settings=settings),
        lambda: tasks.fill(tiny_model, without("bass"), ["bass"], settings=settings),
        lambda: tasks.split(tiny_model, tone(), settings=settings),
    ):
        with pytest.raises(UsageError, match=message):
            start()


@pytest.fixture(scope="module")
def few_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(write_tiny_bundle(tmp_path_factory.mktemp("few") / "b", **DISTILLED), "cpu", 1)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How each window was sampled: the options it was called with, `asked` with one for each pass."""
    real, calls = windows.sample_on_device, []

    def record(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(windows, "sample_on_device", record)
    return calls


def test_a_distilled_draft_takes_its_steps_in_one_pass_each(
    few_model: Model, sampled: list[dict[str, Any]]
) -> None:
    draft = tasks.fill(few_model, without("bass"), ["bass"], settings=Settings(quality="draft"))
    tasks.generate(few_model, seconds=1, bpm=90, settings=Settings(quality="draft"))
    usual = tasks.fill(few_model, without("bass"), ["bass"])
    calls = [(len(call["asked"]), call["sampler"], call["steps"]) for call in sampled]
    assert calls == [(1, "distilled", 6), (1, "distilled", 6), (2, "dpmpp_2m", 4)]
    assert draft.record["settings"]["sampler"] == "distilled"
    asked = tasks.fill(few_model, without("bass"), ["bass"], settings=Settings(sampler="distilled"))
    assert content(asked) == content(draft) != content(usual)


def test_what_is_heard_is_weighed_against_a_weakened_prediction(
    tmp_path: Path, sampled: list[dict[str, Any]]
) -> None:
    model = Model.open(write_tiny_bundle(tmp_path / "b", **WEAK), "cpu", 1)
    tasks.fill(model, without("bass"), ["bass"])
    tasks.fill(model, without("bass"), ["bass"], text="loud", settings=Settings(guidance=2.0))
    tasks.fill(model, without("bass"), ["bass"], settings=Settings(listening=1.0))
    tasks.fill(model, without("bass"), ["bass"], settings=Settings(quality="draft"))
    tasks.generate(model, seconds=1, bpm=90)
    tasks.generate(model, seconds=1, free=True, settings=Settings(listening=2.0))
    tasks.generate(model, seconds=1, bpm=90, settings=Settings(listening=2.0))
    one, pair = ("ordinary",), ("ordinary", "weakened")
    calls = [tuple(call["asked"]) for call in sampled]
    assert calls == [pair, pair * 2, one, ("distilled",), one, one, pair]


@pytest.mark.parametrize(
    ("change", "message"), [({"steps": 5}, "takes 6 steps, not 5"), ({"listening": 2.0}, "leave it out")]
)
def test_distilled_sampling_is_had_as_it_was_taught(
    few_model: Model, change: dict[str, Any], message: str
) -> None:
    settings = Settings(sampler="distilled", **change)
    with pytest.raises(UsageError, match=message):
        tasks.fill(few_model, without("bass"), ["bass"], settings=settings)


@pytest.mark.parametrize(
    ("change", "steps", "passes"),
    [({"steps": 5}, 5, 2), ({"listening": 3.0}, 8, 2), ({"listening": 1.0}, 8, 1), ({"steps": 6}, 6, 1)],
)
def test_other_steps_or_a_listening_are_sampled_as_the_best_is(
    few_model: Model, sampled: list[dict[str, Any]], change: dict[str, Any], steps: int, passes: int
) -> None:
    take = tasks.fill(few_model, without("bass"), ["bass"], settings=Settings(quality="draft", **change))
    assert take.record["settings"]["sampler"] == ("distilled" if steps == 6 else "dpmpp_2m")
    assert take.record["settings"]["steps"] == steps and [len(call["asked"]) for call in sampled] == [passes]
    again = Settings(**take.record["settings"])
    assert content(tasks.fill(few_model, without("bass"), ["bass"], settings=again)) == content(take)


@pytest.mark.parametrize("method", ["mask", "dirac"])
def test_a_mix_is_not_taken_apart_in_distilled_steps(few_model: Model, method: Method) -> None:
    take = tasks.split(few_model, tone(), method=method, settings=Settings(quality="draft"))
    assert take.record["settings"]["sampler"] == "euler"
    with pytest.raises(UsageError, match="takes no mix apart"):
        tasks.split(few_model, tone(), method=method, settings=Settings(sampler="distilled"))


@pytest.mark.parametrize(
    ("armed", "change", "message"),
    [
        ([], {}, "No stem is armed"),
        (list(STEMS), {}, "that is generate"),
        (["banjo"], {}, "no stem 'banjo'"),
        (["piano"], {"silent": ["banjo"]}, "no stem 'banjo'"),
        (["piano"], {"silent": ["piano"]}, "both silent and armed"),
        (["piano"], {"silent": ["bass"]}, "both silent and given"),
        (["piano"], {"bpm": 7.0}, "20 to 400 bpm"),
        (["piano"], {"chords": "C"}, "need a tempo"),
        (["piano"], {"bpm": 90.0, "chords": "X"}, "no chord 'X'"),
    ],
)
def test_requests_that_make_no_sense(
    tiny_model: Model, armed: list[str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tasks.fill(tiny_model, without("piano"), armed, **change)


def test_contexts_that_cannot_be_used(tiny_model: Model) -> None:
    with pytest.raises(UsageError, match="no stem 'vocals'"):
        tasks.fill(tiny_model, without("piano") | {"vocals": tone()}, ["piano"])
    with pytest.raises(UsageError, match="There is no context"):
        tasks.fill(tiny_model, {}, ["piano"])
    with pytest.raises(UsageError, match="There is no context"):
        tasks.fill(tiny_model, {"piano": tone()}, ["piano"])
    with pytest.raises(UsageError, match=r"different sample rates \(16000, 44100 Hz\)"):
        tasks.fill(tiny_model, without("piano") | {"bass": tone(rate=44100)}, ["piano"])
    with pytest.raises(BacklineError, match="The stem bass holds NaN"):
        tasks.fill(tiny_model, {"bass": Audio(tone().samples * np.nan, 16000)}, ["piano"])
    with pytest.raises(BacklineError, match="The stem bass is only"):
        tasks.fill(tiny_model, {"bass": tone(0.5)}, ["piano"])
    with pytest.raises(BacklineError, match="The other material is only"):
        tasks.fill(tiny_model, without("piano"), ["piano"], other=tone(0.5))
    with pytest.raises(BacklineError, match="The audio prompt is only"):
        tasks.generate(tiny_model, seconds=1, audio=tone(0.5))


def test_a_model_is_asked_for_what_it_lacks(plain_model: Model) -> None:
    with pytest.raises(UsageError, match="takes no audio prompt"):
        tasks.generate(plain_model, seconds=1, audio=tone())
    with pytest.raises(UsageError, match="takes no tempo"):
        tasks.generate(plain_model, seconds=1, bpm=100)
    with pytest.raises(UsageError, match="takes no chords"):
        tasks.generate(plain_model, seconds=1, bpm=100, chords="C")
    with pytest.raises(UsageError, match="cannot listen to other material"):
        tasks.fill(plain_model, without("piano"), ["piano"], other=tone())


def test_silent_context_is_remarked(tiny_model: Model) -> None:
    silent = {name: Audio(0 * audio.samples, 16000) for name, audio in without("piano").items()}
    take = tasks.fill(tiny_model, silent, ["piano"], settings=FEW)
    assert "The context is silent" in take.record["warnings"][0]
    assert np.isfinite(take.stems["piano"].samples).all()
    assert tasks.fill(tiny_model, without("piano"), ["piano"], settings=FEW).record["warnings"] == []


def test_a_model_that_breaks_down(tmp_path: Path) -> None:
    model = Model.open(
        write_tiny_bundle(
            tmp_path / "b", latent={"channels": 8, "frames": 4, "freq": 1, "scale_factor": 1e-37}
        ),
        "cpu",
        1,
    )
    with pytest.raises(BacklineError, match="NaN or infinite"):
        tasks.generate(model, seconds=1, settings=FEW)
