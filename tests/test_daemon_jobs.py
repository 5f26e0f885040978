"""Jobs over a real socket with a real worker: accepted once, ended once, made again with the same bytes."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from command import noise, write_song
from daemon_process import Running, Talk, daemon, workers

from bridge.client import DaemonError, JobCancelled, connect
from bridge.osc import Value
from engine.audio import Audio
from engine.errors import UsageError
from engine.model import Model
from engine.take import Settings
from engine.tasks import continue_, fill, generate
from engine.windows import Batch

ACCEPTED = "/backline/job/accepted"
STATE = "/backline/job/state"


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_song(tmp_path_factory.mktemp("songs") / "one", ("bass", "drums", "guitar"), channels=2)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, song: Path) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("daemon") / "root"
    with daemon(root, tiny_bundle, "--allow", song.parent, "--queue", "3") as started:
        yield started


@pytest.fixture
def talk(running: Running) -> Iterator[Talk]:
    speaking = Talk(running.port)
    yield speaking
    speaking.close()


def long(talk: Talk, name: str, *options: Value) -> None:
    """A job that runs for minutes, accepted and running."""
    talk.ask("/backline/job/generate", name, 1800.0, "steps", 900, *options, answer=ACCEPTED)
    talk.until("/backline/job/progress", id=name, phase="sample")


def cancel(talk: Talk, name: str) -> None:
    talk.ask("/backline/job/cancel", name, answer=STATE)
    assert talk.end_of(name) == "cancelled"


def take_of(talk: Talk, name: str, number: int = 1) -> dict[str, Path]:
    """The files of a take by stem, as the daemon told."""
    told = [v for address, v in talk.heard if address == "/backline/job/take" and v["id"] == name]
    more = next(values["more"] for values in told if values["take"] == number)
    return {stem: Path(path) for stem, path in zip(more[::2], more[1::2], strict=True)}


def test_a_fill_leaves_float_wavs_and_all_it_takes_to_make_them_again(
    talk: Talk, running: Running, song: Path
) -> None:
    asked = ["/backline/job/fill", "one", str(song), "piano", "bpm", 100.0]
    talk.ask(*asked, answer=ACCEPTED)  # type: ignore[arg-type]
    assert talk.end_of("one") == "done"
    (stem, path), *others = take_of(talk, "one").items()
    assert stem == "piano" and not others
    assert path.is_relative_to(running.root / "jobs" / "one" / "1")
    sound = soundfile.info(path)
    assert (sound.subtype, sound.samplerate, sound.channels, sound.frames) == ("FLOAT", 22050, 2, 3 * 22050)
    record = json.loads((path.parent / "take.json").read_text("utf-8"))
    assert record["provider"] == "CPUExecutionProvider" and record["model"]["name"] == "tiny"
    assert (
        set(record["timings"]) >= {"listen", "sample", "render"}
        and len(record["inputs"]["bass"]["sha256"]) == 64
    )
    for folder in (running.root, running.root / "jobs", running.root / "jobs" / "one", path.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    talk.ask(
        "/backline/job/fill",
        "again",
        str(song),
        "piano",
        "bpm",
        100.0,
        "seed",
        record["seed"],
        answer=ACCEPTED,
    )
    assert talk.end_of("again") == "done"
    assert take_of(talk, "again")["piano"].read_bytes() == path.read_bytes()


def test_several_takes_differ_and_can_be_made_again(talk: Talk) -> None:
    talk.ask("/backline/job/generate", "many", 2.0, "takes", 3, "seed", 5, answer=ACCEPTED)
    assert talk.end_of("many") == "done"
    takes = [take_of(talk, "many", number)["drums"] for number in (1, 2, 3)]
    assert len({path.read_bytes() for path in takes}) == 3
    record = json.loads((takes[2].parent / "take.json").read_text("utf-8"))
    assert (record["seed"], record["take"], record["takes"], record["batch"]) == (7, 3, 3, [5, 6, 7])
    talk.ask("/backline/job/generate", "repeated", 2.0, "takes", 3, "seed", 5, answer=ACCEPTED)
    assert talk.end_of("repeated") == "done"
    assert take_of(talk, "repeated", 3)["drums"].read_bytes() == takes[2].read_bytes()
    talk.ask("/backline/job/generate", "third", 2.0, "seed", 7, answer=ACCEPTED)
    assert talk.end_of("third") == "done"
    alone, together = (soundfile.read(path)[0] for path in (take_of(talk, "third")["drums"], takes[2]))
    assert abs(alone - together).max() < 1e-4 * abs(together).max()


def test_the_same_request_again_starts_nothing_and_tells_the_end_again(talk: Talk, running: Running) -> None:
    for _ in range(5):
        talk.send("/backline/job/generate", "once", 1.0, "seed", 1)
    assert talk.end_of("once") == "done"
    other = Talk(running.port)
    assert other.ask("/backline/job/generate", "once", 1.0, "seed", 1, answer=ACCEPTED)["state"] == "done"
    assert other.end_of("once") == "done"
    assert set(take_of(other, "once")) == {"bass", "drums", "guitar", "piano", "mix"}
    assert other.refused("/backline/job/generate", "once", 1.5, "seed", 1, code="conflict")
    assert other.refused("/backline/job/split", "once", "/x.wav", code="conflict")
    other.close()
    lines = [json.loads(line) for line in running.log.splitlines()]
    assert sum(line["event"] == "running" and line["job"] == "once" for line in lines) == 1


def test_split_and_continue(talk: Talk, song: Path) -> None:
    mix = song / "whole.wav"
    soundfile.write(mix, noise(2.5, channels=2), 22050, "FLOAT")
    talk.ask("/backline/job/split", "parts", str(mix), "residual", 1, answer=ACCEPTED)
    assert talk.end_of("parts") == "done"
    parts = take_of(talk, "parts")
    assert set(parts) == {"bass", "drums", "guitar", "piano", "residual"}
    total = sum(soundfile.read(path)[0] for path in parts.values())
    assert abs(total - soundfile.read(mix)[0]).max() < 1e-5
    talk.ask("/backline/job/continue", "next", str(song), 1.5, answer=ACCEPTED)
    assert talk.end_of("next") == "done"
    assert {p: soundfile.info(f).frames for p, f in take_of(talk, "next").items()} == dict.fromkeys(
        ("bass", "drums", "guitar", "mix"), round(1.5 * 22050)
    )
    # a take's folder, and a file that is no stem and is split first
    for name, source in (("more", take_of(talk, "next")["bass"].parent), ("mixed", mix)):
        talk.ask("/backline/job/continue", name, str(source), 1.0, answer=ACCEPTED)
        assert talk.end_of(name) == "done"
        assert "bass" in take_of(talk, name)


def test_a_continuation_follows_what_it_hears(tiny_model: Model) -> None:
    before = {"bass": Audio(noise(3.0).T, 22050), "drums": Audio(noise(2.0, channels=2, seed=1).T, 22050)}
    first = continue_(tiny_model, before, seconds=1.25, settings=Settings(1))
    assert {name: part.samples.shape for name, part in first.stems.items()} == {
        "bass": (2, 27562),
        "drums": (2, 27562),
    }
    again = continue_(tiny_model, before, seconds=1.25, settings=Settings(1))
    louder = before | {"bass": Audio(noise(3.0, seed=9).T, 22050)}
    other = continue_(tiny_model, louder, seconds=1.25, settings=Settings(1))
    assert (first.stems["drums"].samples == again.stems["drums"].samples).all()
    assert (first.stems["drums"].samples != other.stems["drums"].samples).any()
    with pytest.raises(UsageError, match="There is nothing to continue"):
        continue_(tiny_model, {}, seconds=1.0)
    with pytest.raises(UsageError, match="no stem 'voice'"):
        continue_(tiny_model, {"voice": before["bass"]}, seconds=1.0)
    with pytest.raises(UsageError, match="1 to 1800"):
        continue_(tiny_model, before, seconds=0.2)


def test_takes_sampled_together_are_those_made_alone(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = Model.condition_inputs

    def counted(self: Model, conditions: Any, shape: tuple[int, ...]) -> Any:
        sizes.append(shape[0])
        return whole(self, conditions, shape)

    monkeypatch.setattr(Model, "condition_inputs", counted)
    context = {"drums": Audio(noise(5.0).T, 22050)}
    tasks: dict[str, Any] = {
        "generate": lambda **rest: generate(tiny_model, seconds=5.0, free=True, **rest),
        "fill": lambda **rest: fill(tiny_model, context, ["bass"], text="warm", **rest),
        "continue": lambda **rest: continue_(tiny_model, context, seconds=4.0, **rest),
    }
    seeds = [4, 5, 6, 7, 8]
    for name, task in tasks.items():
        alone = [task(settings=Settings(seed, guidance=2.0)) for seed in seeds]
        sizes.clear()
        batch = Batch(seeds, size=3)
        together = [task(settings=Settings(seed, guidance=2.0), batch=batch) for seed in seeds]
        assert set(sizes) == {3, 2} and not batch.made, name
        again = Batch(seeds, size=3)
        for seed, one, other in zip(seeds, alone, together, strict=True):
            same = task(settings=Settings(seed, guidance=2.0), batch=again)
            assert one.record["seed"] == other.record["seed"] == seed
            for stem, sound in one.stems.items():
                loudest = np.abs(sound.samples).max()
                assert np.abs(sound.samples - other.stems[stem].samples).max() < 1e-4 * loudest, (name, stem)
                assert np.array_equal(same.stems[stem].samples, other.stems[stem].samples), (name, stem)
    # noise in every step: one by one, or the order of the batch would be heard
    drawn = Settings(4, sampler="ddim", eta=1.0)
    batch = Batch(seeds)
    fresh = tasks["generate"](settings=drawn, batch=batch)
    assert np.array_equal(fresh.mix().samples, tasks["generate"](settings=drawn).mix().samples)
    assert not batch.made


def test_cancel_takes_effect_at_once_and_twice_is_fine(talk: Talk, running: Running) -> None:
    long(talk, "stopped")
    started = time.monotonic()
    cancel(talk, "stopped")
    assert time.monotonic() - started < 0.5
    assert talk.ask("/backline/job/cancel", "stopped", answer=STATE)["state"] == "cancelled"
    assert not (running.root / "jobs" / "stopped").exists()
    assert not list((running.root / "work").iterdir())


def test_a_full_queue_is_busy_and_waiting_jobs_can_be_cancelled(talk: Talk) -> None:
    long(talk, "runs")
    for position, name in enumerate(("w1", "w2", "w3"), 1):
        answer = talk.ask("/backline/job/generate", name, 1.0, answer=ACCEPTED)
        assert (answer["state"], answer["position"]) == ("queued", position)
    assert "3 jobs wait" in talk.refused("/backline/job/generate", "w4", 1.0, code="busy")
    for name in ("w1", "w2"):
        cancel(talk, name)
    cancel(talk, "runs")
    assert talk.end_of("w3") == "done"
    assert talk.ask("/backline/job/generate", "w4", 1.0, answer=ACCEPTED)["id"] == "w4"
    assert talk.end_of("w4") == "done"


def test_live_jobs_pass_a_running_batch_job_which_then_goes_on(talk: Talk) -> None:
    long(talk, "batch")
    talk.ask("/backline/job/generate", "waits", 1.0, answer=ACCEPTED)
    talk.ask("/backline/job/generate", "live", 1.0, "priority", "live", answer=ACCEPTED)
    assert talk.end_of("live", seconds=10) == "done"
    assert talk.ask("/backline/job/status", "batch", answer=STATE)["state"] == "running"
    assert talk.ask("/backline/job/status", "waits", answer=STATE)["state"] == "queued"
    talk.until("/backline/job/progress", id="batch")
    cancel(talk, "batch")
    assert talk.end_of("waits") == "done"


def test_a_batch_job_can_be_cancelled_while_a_live_one_runs(talk: Talk) -> None:
    long(talk, "below")
    long(talk, "above", "priority", "live")
    started = time.monotonic()
    cancel(talk, "below")
    assert time.monotonic() - started < 2
    cancel(talk, "above")


def test_shared_jobs_run_side_by_side_and_have_their_own_bytes(talk: Talk) -> None:
    def sums(name: str) -> dict[str, bytes]:
        return {stem: path.read_bytes() for stem, path in take_of(talk, name).items()}

    for name in ("shared-one", "shared-two"):
        talk.ask("/backline/job/generate", name, 8.0, "shared", 1, "seed", 3, "steps", 300, answer=ACCEPTED)
    talk.until("/backline/job/progress", id="shared-one")
    talk.until("/backline/job/progress", id="shared-two")
    assert talk.ask("/backline/job/status", "shared-one", answer=STATE)["state"] == "running"
    assert talk.end_of("shared-one") == "done"
    if not any(a == "/backline/job/done" and v["id"] == "shared-two" for a, v in talk.heard):
        assert talk.end_of("shared-two") == "done"
    assert sums("shared-one") == sums("shared-two")


def test_a_time_out_ends_a_job(talk: Talk) -> None:
    long(talk, "slow", "timeout", 1.0)
    assert talk.end_of("slow") == "error"
    assert talk.heard[-1][1]["code"] == "timeout"


def test_progress_comes_at_most_ten_times_a_second_and_heartbeats_too(talk: Talk) -> None:
    long(talk, "watched")
    times: list[float] = []
    fractions: list[float] = []
    until = time.monotonic() + 2.6
    while (now := time.monotonic()) < until:
        heard = talk.hear(until - now)
        if heard and heard[0] == "/backline/job/progress":
            times.append(time.monotonic())
            fractions.append(heard[1]["fraction"])
    cancel(talk, "watched")
    assert 5 < len(times) <= 27
    assert fractions == sorted(fractions)
    beats = [v for a, v in talk.heard if a == "/backline/job/heartbeat" and v["id"] == "watched"]
    assert beats and beats[0]["state"] == "running"


def test_answers_come_within_50_ms_while_a_job_runs(talk: Talk) -> None:
    long(talk, "busy-engine")
    waits = []
    for _ in range(100):
        started = time.perf_counter()
        talk.ask("/backline/job/status", "busy-engine", answer=STATE)
        waits.append(time.perf_counter() - started)
        time.sleep(0.005)
    cancel(talk, "busy-engine")
    assert sorted(waits)[94] < 0.05, sorted(waits)[-10:]


def test_a_request_that_the_engine_cannot_meet_ends_in_an_error_that_says_why(talk: Talk, song: Path) -> None:
    talk.ask("/backline/job/fill", "kazoo", str(song), "kazoo", answer=ACCEPTED)
    assert talk.end_of("kazoo") == "error"
    assert talk.heard[-1][1] == {
        "id": "kazoo",
        "code": "request",
        "sentence": "There is no stem 'kazoo': this model plays bass, drums, guitar, piano.",
    }
    talk.refused("/backline/job/generate", "short", 0.5, code="value")
    talk.refused("/backline/job/fill", "nothing", "", "piano", code="value")
    talk.refused("/backline/job/generate", "odd", 1.0, "model", "no-such-model", code="value")
    talk.refused("/backline/job/status", "nobody", code="gone")


def test_the_list_has_every_job_newest_first_in_pages(talk: Talk) -> None:
    talk.send("/backline/job/list", 0, 64)
    told = talk.until("/backline/job/listed")
    names = [values["id"] for address, values in talk.heard if address == STATE]
    assert told == {"sent": len(names), "total": len(names)} and len(set(names)) == len(names)
    talk.heard.clear()
    talk.send("/backline/job/list", 1, 2)
    assert talk.until("/backline/job/listed") == {"sent": 2, "total": len(names)}
    assert [values["id"] for address, values in talk.heard if address == STATE] == names[1:3]


def test_subscribers_are_told_what_is_and_then_what_changes(talk: Talk, running: Running) -> None:
    host = Talk(running.port)
    host.ask("/backline/track/rename", "7", "Rhodes", answer="/backline/track/renamed")
    host.ask("/backline/track/arm", "7", 1, answer="/backline/track/armed")
    host.ask("/backline/tempo/set", 93.5, 3, answer="/backline/tempo/is")
    for topic, address, values in (
        ("tracks", "/backline/track/armed", {"track": "7", "armed": 1}),
        ("tempo", "/backline/tempo/is", {"bpm": 93.5, "beats_per_bar": 3}),
        ("model", "/backline/model/state", {"state": "loaded"}),
    ):
        talk.ask("/backline/subscription/add", topic, answer="/backline/subscription/added")
        talk.until(address, seconds=2, **values)
    host.ask("/backline/track/mute", "7", 1, answer="/backline/track/muted")
    assert talk.until("/backline/track/muted", seconds=2) == {"track": "7", "muted": 1}
    host.ask("/backline/tempo/set", 100, answer="/backline/tempo/is")
    assert talk.until("/backline/tempo/is", seconds=2) == {"bpm": 100.0, "beats_per_bar": 3}
    talk.ask("/backline/subscription/remove", "tracks", answer="/backline/subscription/removed")
    host.ask("/backline/track/remove", "7", answer="/backline/track/removed")
    assert talk.hear(0.3) is None
    host.close()


def test_the_model_can_be_unloaded_and_a_job_loads_it_again(talk: Talk) -> None:
    talk.ask("/backline/subscription/add", "model", answer="/backline/subscription/added")
    talk.send("/backline/model/unload")
    talk.until("/backline/model/state", state="unloaded")
    assert talk.ask("/backline/hello", "me", answer="/backline/welcome")["state"] == "unloaded"
    talk.ask("/backline/job/generate", "reload", 1.0, answer=ACCEPTED)
    assert talk.until("/backline/model/state", state="loaded")["provider"] == "CPUExecutionProvider"
    assert talk.end_of("reload") == "done"
    talk.send("/backline/model/load", "")
    talk.until("/backline/model/state", state="loaded", name="tiny 1")


def test_the_worker_never_works_in_the_daemons_process(talk: Talk, running: Running) -> None:
    talk.ask("/backline/hello", "me", answer="/backline/welcome")
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "onnxruntime" not in maps and "torch" not in maps
    (worker,) = workers(running)
    assert "onnxruntime" in Path(f"/proc/{worker}/maps").read_text()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_the_python_client_awaits_jobs(running: Running, song: Path, tmp_path: Path, transport: Any) -> None:
    elsewhere = write_song(tmp_path / "not allowed", ("bass", "drums"))

    async def talk() -> None:
        async with connect(port=running.port, transport=transport) as client:
            assert client.welcome["model"] == "tiny 1" and "stem:piano" in client.welcome["more"]
            job = await client.fill(song, "piano", takes=2, bpm=100)
            seen = [fraction async for _, fraction in job.progress()]
            result = await job.result()
            assert [take.number for take in result.takes] == [1, 2]
            assert soundfile.info(result.takes[1].files["piano"]).frames == 3 * 22050
            assert all(0 <= fraction <= 1 for fraction in seen)
            assert (await client.status(job.id))["fetched"] == 1
            copied = await client.fill(elsewhere, "piano")  # copied to where the daemon may read
            assert (await copied.result()).provider == "CPUExecutionProvider"
            assert not list((running.root / "inputs").iterdir())
            named = await client.fill({"drums": song / "drums.wav"}, "bass,piano")
            assert set((await named.result(keep=True)).takes[0].files) == {"bass", "piano"}
            assert (await client.status(named.id))["fetched"] == 0
            stopped = await client.generate(1800.0, steps=500)
            await stopped.cancel()
            with pytest.raises(JobCancelled):
                await stopped.result()
            with pytest.raises(DaemonError, match="kazoo") as error:
                await (await client.fill(song, "kazoo")).result()
            assert error.value.code == "request"
            several = [await client.generate(1.0, seed=seed) for seed in (1, 2)]
            results = await asyncio.gather(*(job.result() for job in several))
            assert len({result.id for result in results}) == 2
            assert "default" in [entry["name"] for entry in await client.models()]

    asyncio.run(talk())


def test_many_clients_at_once_are_all_answered(running: Running) -> None:
    failed: list[BaseException] = []

    def one(number: int) -> None:
        speaking = Talk(running.port)
        try:
            for turn in range(25):
                speaking.ask("/backline/track/arm", f"t{number}", turn % 2, answer="/backline/track/armed")
        except AssertionError as error:
            failed.append(error)
        finally:
            speaking.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
