"""Bad input: one clear sentence, exit status 1 or 2, nothing lost and nothing left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import RATE, Ran, backline, noise, refused, samples, write_song

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.wav"
    soundfile.write(path, noise(2.0), RATE, "FLOAT")
    return path


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return write_song(tmp_path / "song", seconds=1.5)


def split(capsys: Capture, mix: Path, out: Path, bundle: Path, *options: object) -> Ran:
    return backline(capsys, "split", mix, "--out", out, "--model", bundle, "--no-picture", *options)


def not_audio(path: Path) -> None:
    path.write_text("This is a shopping list, and no sound at all.\n" * 100)


def truncated_header(path: Path) -> None:
    path.write_bytes(b"RIFF\x24\x00\x00\x00WAVEfm")


def no_samples(path: Path) -> None:
    soundfile.write(path, np.zeros((0, 1), np.float32), RATE)


def short(path: Path) -> None:
    soundfile.write(path, noise(0.9), RATE)


def silent(path: Path) -> None:
    soundfile.write(path, np.zeros(2 * RATE, np.float32), RATE)


def with_nan(path: Path) -> None:
    sound = noise(2.0)
    sound[RATE] = np.nan
    soundfile.write(path, sound, RATE, "FLOAT")


def with_infinity(path: Path) -> None:
    sound = noise(2.0)
    sound[RATE] = np.inf
    soundfile.write(path, sound, RATE, "DOUBLE")


def nine_channels(path: Path) -> None:
    soundfile.write(path, noise(2.0, channels=9), RATE)


def too_slow(path: Path) -> None:
    soundfile.write(path, noise(2.0, rate=4000), 4000)


def too_fast(path: Path) -> None:
    soundfile.write(path, noise(2.0, rate=384000), 384000)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (Path.mkdir, "not a file"),
    "no audio": (not_audio, "not an audio file"),
    "no bytes": (Path.touch, "empty"),
    "cut off in the header": (truncated_header, "not an audio file"),
    "no samples": (no_samples, "empty"),
    "shorter than 1 s": (short, "at least 1 s"),
    "silent": (silent, "silent"),
    "NaN": (with_nan, "NaN or infinite"),
    "infinity": (with_infinity, "NaN or infinite"),
    "9 channels": (nine_channels, "9 channels"),
    "4 kHz": (too_slow, "4000 Hz"),
    "384 kHz": (too_fast, "384000 Hz"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_used(kind: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    make, words = BAD_FILES[kind]
    path, out = tmp_path / "bad.wav", tmp_path / "out"
    make(path)
    refused(split(capsys, path, out, tiny_bundle), 1, "bad.wav", words)
    common = ("--out", out, "--model", tiny_bundle, "--no-picture")
    refused(backline(capsys, "generate", "--audio", path, *common), 1, "bad.wav", words)
    song = write_song(tmp_path / "song", ("bass",), seconds=1.5)
    if path.is_file() and kind != "silent":  # one silent stem among others is music
        shutil.copy(path, song / "drums.wav")
        refused(backline(capsys, "fill", song, "--arm", "piano", *common), 1, "drums.wav", words)
    assert not out.exists()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_is_read(
    subtype: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "mix.wav", tmp_path / "out"
    soundfile.write(path, noise(1.2), RATE, subtype)
    assert split(capsys, path, out, tiny_bundle).status == 0
    total = sum(samples(wav) for wav in out.glob("*.wav"))
    np.testing.assert_allclose(total, samples(path), atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "channels"),
    [(8000, 1), (11025, 3), (16000, 4), (44100, 5), (48000, 6), (88200, 7), (96000, 2), (192000, 8)],
)
def test_every_rate_and_channel_count_is_kept(
    rate: int, channels: int, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "mix.wav", tmp_path / "out"
    soundfile.write(path, noise(1.3, rate=rate, channels=channels), rate, "FLOAT")
    assert split(capsys, path, out, tiny_bundle).status == 0
    for wav in out.glob("*.wav"):
        info = soundfile.info(wav)
        assert (info.samplerate, info.channels, info.frames) == (rate, channels, round(1.3 * rate))
    np.testing.assert_allclose(sum(samples(wav) for wav in out.glob("*.wav")), samples(path), atol=1e-6)


@pytest.mark.parametrize(
    ("arm", "status", "words"),
    [
        ("kazoo", 2, "no stem 'kazoo'"),
        ("../piano", 2, "no stem '../piano'"),
        ("bass,drums,guitar,piano", 2, "generate"),
        ("", 2, "No stem is armed"),
        (" , ", 2, "No stem is armed"),
    ],
)
def test_stems_that_make_no_sense(
    arm: str, status: int, words: str, tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    refused(backline(capsys, "fill", song, "--arm", arm, "--out", out, "--model", tiny_bundle), status, words)
    assert not out.exists()


def test_contexts_that_make_no_sense(tiny_bundle: Path, song: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ("--arm", "piano", "--out", tmp_path / "out", "--model", tiny_bundle)
    (tmp_path / "empty").mkdir()
    refused(backline(capsys, "fill", tmp_path / "empty", *common), 2, "no context")
    refused(backline(capsys, "fill", tmp_path / "none", *common), 1, "does not exist")
    refused(backline(capsys, "fill", song / "bass.wav", *common), 1, "not a folder")
    refused(backline(capsys, "fill", song, "--silent", "bass", *common), 2, "bass", "silent")
    refused(backline(capsys, "fill", song, "--silent", "kazoo", *common), 2, "kazoo")
    soundfile.write(song / "bass.flac", noise(1.5), RATE)
    refused(backline(capsys, "fill", song, *common), 2, "bass.flac", "bass.wav")
    (song / "bass.flac").unlink()
    soundfile.write(song / "bass.wav", noise(1.5, rate=44100), 44100)
    refused(backline(capsys, "fill", song, *common), 2, "22050", "44100")
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    silent(quiet / "bass.wav")
    silent(quiet / "drums.wav")
    refused(backline(capsys, "fill", quiet, *common), 1, "silent")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seconds", "0.5"], "1 to 1800"),
        (["--seconds", "1801"], "1 to 1800"),
        (["--seconds", "nan"], "1 to 1800"),
        (["--seconds", "long"], "--seconds"),
        (["--steps", "0"], "steps"),
        (["--steps", "100000"], "steps"),
        (["--seed", "-1"], "seed"),
        (["--guidance", "-1"], "guidance"),
        (["--sampler", "magic"], "magic"),
        (["--device", "abacus"], "abacus"),
        (["--bpm", "-3"], "tempo"),
        (["--chords", "C | Am"], "tempo"),
        (["--chords", "H7", "--bpm", "100"], "H7"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(
    options: list[str], words: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    refused(backline(capsys, "generate", "--out", out, "--model", tiny_bundle, *options), 2, words)
    assert not out.exists()


def test_a_command_line_that_makes_no_sense(tiny_bundle: Path, mix: Path, capsys: Capture) -> None:
    refused(backline(capsys, "explode"), 2, "explode")
    refused(backline(capsys, "generate"), 2, "--out")
    refused(backline(capsys, "split", "--out", "x"), 2, "mix")
    refused(split(capsys, mix, mix.parent / "o", tiny_bundle, "--raw", "--residual"), 2, "residual")
    refused(split(capsys, mix, mix.parent / "o", tiny_bundle, "--method", "magic"), 2, "magic")


def test_an_output_folder_that_cannot_be_made(
    tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    refused(split(capsys, mix, taken, tiny_bundle), 1, "taken", "a file of that name is in the way")
    refused(split(capsys, mix, taken / "deeper", tiny_bundle), 1, "deeper")
    assert taken.read_text() == "mine"
    nested = tmp_path / "out"
    nested.mkdir()
    (nested / "bass.wav").mkdir()
    refused(split(capsys, mix, nested, tiny_bundle, "--force"), 1, "bass.wav", "folder")
    assert list(nested.iterdir()) == [nested / "bass.wav"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that even root cannot write is needed")
def test_an_output_folder_that_cannot_be_written(tiny_bundle: Path, mix: Path, capsys: Capture) -> None:
    refused(split(capsys, mix, Path("/sys/kernel"), tiny_bundle), 1, "/sys/kernel", "cannot be written")
    refused(
        split(capsys, mix, Path("/sys/kernel/out"), tiny_bundle), 1, "/sys/kernel/out", "cannot be written"
    )


def test_nothing_is_overwritten_without_force(
    tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "drums.wav").write_bytes(b"my best take")
    (out / "notes.txt").write_text("keep")
    refused(split(capsys, mix, out, tiny_bundle), 1, "drums.wav exists", "--force")
    assert (out / "drums.wav").read_bytes() == b"my best take"
    assert sorted(path.name for path in out.iterdir()) == ["drums.wav", "notes.txt"]
    assert split(capsys, mix, out, tiny_bundle, "--force").status == 0
    assert soundfile.info(out / "drums.wav").frames == 2 * RATE
    assert (out / "notes.txt").read_text() == "keep"


def test_the_mix_survives_a_split_into_its_own_folder(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    mix = tmp_path / "drums.wav"
    soundfile.write(mix, noise(2.0), RATE, "FLOAT")
    before = mix.read_bytes()
    refused(split(capsys, mix, tmp_path, tiny_bundle), 1, "drums.wav exists")
    assert mix.read_bytes() == before


def damage(bundle: Path, kind: str) -> None:
    unet, manifest = bundle / "unet.onnx", bundle / "manifest.json"
    content = unet.read_bytes()
    if kind == "missing":
        unet.unlink()
    elif kind == "changed":
        unet.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "truncated":
        unet.write_bytes(content[: len(content) // 2])
    elif kind == "newer":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif kind == "not a manifest":
        manifest.write_text("[]")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "unet.onnx is missing"),
        ("changed", "damaged"),
        ("truncated", "damaged"),
        ("newer", "newer"),
        ("no manifest", "manifest.json"),
        ("half a manifest", "JSON"),
        ("not a manifest", "valid manifest"),
    ],
)
def test_a_bundle_that_cannot_be_used(
    kind: str, words: str, tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    damage(bundle, kind)
    refused(split(capsys, mix, tmp_path / "out", bundle), 1, words)
    refused(backline(capsys, "demo", "--out", tmp_path / "out", "--model", bundle), 1, words)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_none(mix: Path, tmp_path: Path, capsys: Capture) -> None:
    refused(split(capsys, mix, tmp_path / "out", tmp_path / "none"), 1, "does not exist")
    refused(split(capsys, mix, tmp_path / "out", mix), 1, "no model bundle")


def test_imports_that_cannot_be_done(
    tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(checkpoint: Path, config: Path, out: Path, *options: str) -> Ran:
        return backline(capsys, "import", checkpoint, "--config", config, "--out", out, *options)

    out = tmp_path / "out"
    refused(imported(tmp_path / "none.ckpt", tmp_path / "none.yaml", out), 1, "does not exist")
    refused(imported(mix, mix, tiny_bundle), 1, "exists", "--force")
    refused(imported(mix, mix, out, "--weights", "heavy"), 2, "heavy")
    monkeypatch.setitem(sys.modules, "export.import_checkpoint", None)
    refused(imported(mix, mix, out), 1, "'export'")
    assert not out.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_in_the_middle(
    number: signal.Signals, existing: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "mix.wav").write_bytes(b"my best take")
    arguments = ["generate", "--out", str(out), "--seconds", "1800", "--steps", "900", "--force"]
    command = [sys.executable, "-m", "bridge.cli", *arguments, "--model", str(tiny_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.backline-*")):  # the work has begun
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(number)
        process.send_signal(number)  # an impatient user's second Ctrl-C must not stop the cleaning up
        printed, sentence = process.communicate(timeout=30)
    assert process.returncode == 1
    assert printed == "" and sentence == "Stopped; nothing half-written is left.\n"
    if existing:
        assert [path.name for path in out.iterdir()] == ["mix.wav"]
        assert (out / "mix.wav").read_bytes() == b"my best take"
    else:
        assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk; the injected error below covers it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny_bundle: Path, mix: Path, small_disk: Path, capsys: Capture) -> None:
    (small_disk / "drums.wav").write_bytes(b"my best take")
    refused(split(capsys, mix, small_disk, tiny_bundle, "--force"), 1, "disk is full")
    refused(split(capsys, mix, small_disk / "new", tiny_bundle), 1, "disk is full")
    assert [path.name for path in small_disk.iterdir()] == ["drums.wav"]
    assert (small_disk / "drums.wav").read_bytes() == b"my best take"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("calls", [1, 3, 5, 6, 8])
def test_a_disk_that_fills_up(
    calls: int,
    existing: bool,
    tiny_bundle: Path,
    mix: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first four renames finish wavs in the hidden folder, the others move what is finished out of it."""
    out = tmp_path / "out"
    takes = (
        {out / f"{name}.wav": f"my best {name}".encode() for name in ("bass", "drums")} if existing else {}
    )
    for path, content in takes.items():
        out.mkdir(exist_ok=True)
        path.write_bytes(content)
    real, left = os.replace, calls

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    ran = split(capsys, mix, out, tiny_bundle, "--force")
    refused(ran, 1, "disk is full")
    assert ".backline-" not in ran.err  # the hidden folder is nobody's business
    assert {path: path.read_bytes() for path in tmp_path.glob("out/*")} == takes
    assert out.exists() == existing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_results_that_cannot_be_printed(options: list[str]) -> None:
    command = [sys.executable, "-m", "bridge.cli", "models", *options]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1 and ran.stderr == "The disk is full.\n"


def test_a_reader_that_left_early() -> None:
    command = [sys.executable, "-m", "bridge.cli", "models", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_picture_that_fails_does_not_cost_the_take(
    tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bridge.jobs.draw", draw)
    ran = backline(capsys, "split", mix, "--out", tmp_path / "out", "--model", tiny_bundle)
    assert ran.status == 0 and "picture could not be drawn" in ran.err
    assert len(list((tmp_path / "out").glob("*.wav"))) == 4


def test_what_nobody_thought_of_is_a_sentence_too(
    tiny_bundle: Path, mix: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split_badly(*arguments: object, **options: object) -> None:
        raise RuntimeError("the tubes are cold\nand more")

    monkeypatch.setattr("bridge.jobs.split", split_badly)
    ran = split(capsys, mix, tmp_path / "out", tiny_bundle)
    assert ran.status == 1 and "the tubes are cold" in ran.err and len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
