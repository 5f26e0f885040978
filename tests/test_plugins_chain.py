"""Chains of effects: any channels, aligned to the sample, and no plugin that can hurt the bounce."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pedalboard
import pytest
from command import noise
from pedalboard_native._internal import AddLatency

from engine.audio import Audio, write
from engine.errors import UsageError
from plugin_host import plugins
from plugin_host.host import bounce
from plugin_host.plugin_process import adapted
from plugin_host.plugins import Bypassed, PluginFailed, describe, find_plugin, run_chain
from plugin_host.session import SessionHost
from plugin_host.session_file import PluginState

RATE = 44100
RATES, BUFFERS, LATENCIES, CHANNELS = (
    (44100, 48000, 96000),
    (1, 64, 1024, 65536),
    (0, 1, 63, 480, 10000),
    (1, 2),
)
ZAM = Path("/usr/lib/vst3")
MONO_CHAIN = ("ZamEQ2", "ZamComp", "ZamTube", "ZamGate", "ZamDelay")
STEREO_CHAIN = ("ZamGateX2", "ZamCompX2", "ZamHeadX2", "ZaMultiCompX2", "ZaMaximX2")

zam = pytest.mark.skipif(not (ZAM / "ZamComp.vst3").exists(), reason="Debian's zam-plugins are not installed")


def fails(what: Bypassed) -> None:
    raise AssertionError(what.sentence)


def chain(names: tuple[str, ...] | list[str], **parameters: Any) -> list[PluginState]:
    return [PluginState(name=n, path=str(ZAM / f"{n}.vst3"), parameters=parameters.get(n, {})) for n in names]


def song(folder: Path, seconds: float = 1.5, channels: int = 1) -> tuple[SessionHost, str]:
    host = SessionHost.create(folder / "song", sample_rate=RATE, tempo=120)
    track = host.create_track("guitar").id
    write(folder / "guitar.wav", Audio(noise(seconds, rate=RATE, channels=channels).T, RATE))
    host.place(track, folder / "guitar.wav", 0)
    return host, track


@pytest.mark.parametrize(("rate", "channels"), [*product(RATES, CHANNELS)])
def test_latency_nulls(rate: int, channels: int) -> None:
    """Over rates, buffer sizes and latencies: what a plugin delays comes out where it went in."""
    sound = noise(0.2, rate=rate, channels=channels).T.copy()
    for buffer, latency in product(BUFFERS, LATENCIES):
        result = adapted(lambda latency=latency: AddLatency(latency), sound, rate, buffer)
        assert np.array_equal(result, sound), (rate, buffer, latency)


def test_latency_nulls_through_a_chain_and_a_bounce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delayed track against the other one, in opposite phase: silence."""
    host, _ = song(tmp_path)
    opposite = host.create_track("inverted").id
    host.place(opposite, tmp_path / "guitar.wav", 0)
    delayed = [PluginState(name="Invert"), *[PluginState(name="AddLatency")] * 3]
    made = plugins._built_in
    late = lambda plugin: AddLatency(777) if plugin.name == "AddLatency" else made(plugin)  # noqa: E731
    monkeypatch.setattr(plugins, "_built_in", late)
    host.set_plugins(opposite, delayed, "plugins")
    said: list[str] = []
    host.warn = said.append
    assert not bounce(host).samples.any() and not said


@pytest.mark.parametrize("name", plugins.BUILT_IN)
def test_every_built_in_effect_runs(name: str, tmp_path: Path) -> None:
    audio = Audio(noise(0.3, rate=RATE, channels=2).T, RATE)
    found, _ = describe(PluginState(name=name), presets=tmp_path)
    values = {control.name: control.value for control in found.controls}
    result = run_chain([PluginState(name=name, parameters=values)], audio, presets=tmp_path, bypassed=fails)
    assert result.samples.shape == audio.samples.shape and result.samples.any()


def test_built_in_parameters_are_pedalboards_own(tmp_path: Path) -> None:
    audio = Audio(noise(0.3, rate=RATE).T, RATE)
    mine = run_chain(
        [
            PluginState(name="Gain", parameters={"gain_db": -3.0}),
            PluginState(name="LadderFilter", parameters={"mode": "HPF24", "cutoff_hz": 500.0}),
            PluginState(name="Reverb", parameters={"room_size": 0.9}, enabled=False),
        ],
        audio,
        presets=tmp_path,
        bypassed=fails,
    )
    board = pedalboard.Pedalboard(
        [pedalboard.Gain(-3.0), pedalboard.LadderFilter(pedalboard.LadderFilter.Mode.HPF24, 500.0)]
    )
    np.testing.assert_allclose(mine.samples, board(audio.samples, RATE), atol=1e-6)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no effect 'Reverberation'"):
        find_plugin("Reverberation")
    with pytest.raises(UsageError, match=r"no plugin /nowhere\.vst3"):
        find_plugin("/nowhere.vst3")
    assert find_plugin("reverb") == PluginState(name="Reverb")
    with pytest.raises(PluginFailed, match="size is none of its parameters"):
        describe(PluginState(name="Reverb", parameters={"size": 1}), presets=tmp_path)
    with pytest.raises(PluginFailed, match="mode is one of LPF12"):
        describe(PluginState(name="LadderFilter", parameters={"mode": "XX"}), presets=tmp_path)
    with pytest.raises(PluginFailed, match=r"not at /gone\.vst3 any more"):
        describe(PluginState(name="gone", path="/gone.vst3"), presets=tmp_path)


SIMULATED = {
    "hangs": ("import time; time.sleep(60)", "timeout", "took longer than 1 s"),
    "crashes": ("import os; os.abort()", "crash", "crashed (SIGABRT)"),
    "segfaults": ("import os; os.kill(os.getpid(), 11)", "crash", "crashed (SIGSEGV)"),
    "leaves": ("raise SystemExit(3)", "crash", "crashed (exit status 3)"),
}


@pytest.mark.parametrize("how", SIMULATED)
def test_a_bounce_goes_on_without_a_plugin_that_breaks(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated at the process boundary: the plugin's process does what a broken plugin makes it do."""
    code, reason, words = SIMULATED[how]
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "Broken.vst3").mkdir()
    monkeypatch.setattr(plugins, "PROCESS", tmp_path / "broken.py")
    host, track = song(tmp_path)
    other = host.create_track("bass").id
    host.place(other, tmp_path / "guitar.wav", 4410)
    broken = PluginState(name="Broken", path=str(tmp_path / "Broken.vst3"))
    quieter = PluginState(name="Gain", parameters={"gain_db": -6.0})
    host.set_plugins(track, [quieter, broken, quieter], "with")
    host.plugin_seconds = 1
    started = time.perf_counter()
    said: list[str] = []
    host.warn = said.append
    mix = bounce(host).samples
    assert time.perf_counter() - started < 20
    host.set_plugins(track, [quieter, quieter], "without")
    assert np.array_equal(mix, bounce(host).samples)
    assert len(said) == 1 and "The plugin Broken" in said[0] and words in said[0] and "'guitar'" in said[0]
    with pytest.raises(PluginFailed) as failed:
        describe(broken, presets=tmp_path, seconds=1)
    assert failed.value.bypassed.reason == reason


def evil(folder: Path, body: str) -> PluginState:
    """A real VST3 module that does this as it is loaded."""
    module = folder / "Evil.vst3" / "Contents" / "x86_64-linux" / "Evil.so"
    module.parent.mkdir(parents=True)
    (folder / "evil.c").write_text(
        "#include <stdlib.h>\n#include <unistd.h>\n"
        "int ModuleEntry(void *m) { return 1; }\nint ModuleExit(void) { return 1; }\n"
        f"void *GetPluginFactory(void) {{ {body} return 0; }}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(module), str(folder / "evil.c")], check=True)
    return PluginState(name="Evil", path=str(folder / "Evil.vst3"))


compiles = pytest.mark.skipif(
    shutil.which("cc") is None, reason="there is no C compiler to build the plugins with"
)


@compiles
@pytest.mark.parametrize(("body", "reason"), [("abort();", "crash"), ("for (;;) sleep(1);", "timeout")])
def test_real_vst3_modules_that_crash_or_hang_as_they_are_loaded(
    tmp_path: Path, body: str, reason: str
) -> None:
    audio = Audio(noise(0.5, rate=RATE).T, RATE)
    said: list[Bypassed] = []
    broken = [evil(tmp_path, body)]
    result = run_chain(broken, audio, presets=tmp_path, seconds=3, bypassed=said.append)
    assert [(what.plugin, what.reason) for what in said] == [("Evil", reason)]
    assert np.array_equal(result.samples, audio.samples)


@compiles
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="this system has no alarms")
def test_a_plugin_that_hangs_ends_even_where_the_host_was_killed(tmp_path: Path) -> None:
    plugin = evil(tmp_path, "for (;;) sleep(1);")
    request = {"path": plugin.path, "name": None, "preset": None, "parameters": {}, "rate": RATE}
    (tmp_path / "request.json").write_text(json.dumps(request | {"buffer": 64, "seconds": -3}))  # 5 s more
    child = subprocess.run([sys.executable, "-P", str(plugins.PROCESS), str(tmp_path)], timeout=30)
    assert child.returncode == -signal.SIGALRM


@zam
@pytest.mark.parametrize("names", [MONO_CHAIN, STEREO_CHAIN], ids=["mono", "stereo"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_five_real_vst3s_in_a_chain(names: tuple[str, ...], channels: int, tmp_path: Path) -> None:
    host, track = song(tmp_path, channels=channels)
    host.set_plugins(track, chain(names), "plugins")
    said: list[str] = []
    host.warn = said.append
    mix = bounce(host)
    assert said == []
    assert mix.channels == (2 if names == STEREO_CHAIN else channels)
    assert mix.length == host.length and np.isfinite(mix.samples).all() and mix.samples.any()
    dry = np.broadcast_to(noise(1.5, rate=RATE, channels=channels).T, mix.samples.shape)
    assert not np.allclose(mix.samples, dry, atol=1e-4)


@zam
def test_a_mono_vst3_gives_each_channel_what_it_gives_that_channel_alone(tmp_path: Path) -> None:
    sound = noise(0.5, rate=RATE, channels=2).T.copy()
    tube = chain(["ZamTube"], ZamTube={"tube_drive": 8.0})
    both = run_chain(tube, Audio(sound, RATE), presets=tmp_path, bypassed=fails)
    for channel in range(2):
        alone = run_chain(tube, Audio(sound[channel : channel + 1], RATE), presets=tmp_path, bypassed=fails)
        # Not to the bit: now and then it takes a new drive over a few samples later.
        np.testing.assert_allclose(both.samples[channel], alone.samples[0], atol=1e-3)


@zam
@pytest.mark.parametrize("rate", RATES)
def test_the_latency_of_a_real_vst3_is_taken_out(rate: int, tmp_path: Path) -> None:
    """ZaMaximX2 looks 480 samples ahead; below its threshold it is a delay, and so must null."""
    maxim = chain(["ZaMaximX2"])
    found, _ = describe(maxim[0], presets=tmp_path, rate=rate)
    assert found.latency == 480
    sound = 0.01 * np.random.default_rng(0).standard_normal((2, rate // 2)).astype(np.float32)
    for buffer in (64, 8192):
        result = run_chain(maxim, Audio(sound, rate), presets=tmp_path, buffer=buffer, bypassed=fails)
        lag = np.argmax(np.correlate(result.samples[0, 600:-600], sound[0], "full")) - (sound.shape[1] - 1)
        assert lag == -600
        gain = float(np.vdot(result.samples, sound) / np.vdot(sound, sound))
        rest = np.abs(result.samples - gain * sound)[:, 100:-100].max()
        assert rest < 1e-3 * np.abs(sound).max()


@zam
def test_parameters_and_presets_of_a_vst3_are_saved(tmp_path: Path) -> None:
    host, track = song(tmp_path)
    wanted = PluginState(
        name="ZamEQ2",
        path=str(ZAM / "ZamEQ2.vst3"),
        parameters={"boost_cut_1_db": 12.0, "master_gain_db": -3.0},
    )
    found, kept = describe(wanted, presets=host.preset_folder())
    shown = {control.name: control for control in found.controls}
    assert shown["boost_cut_1_db"].value == pytest.approx(12, abs=0.1)
    assert (shown["boost_cut_1_db"].low, shown["boost_cut_1_db"].high) == (-50, 20)
    host.set_plugins(track, [kept], "plugins")
    first = bounce(host).samples
    again = SessionHost.open(host.folder)
    assert again.state.tracks[0].plugins == (kept,) and kept.preset is not None
    np.testing.assert_allclose(bounce(again).samples, first, atol=1e-4)
    only_preset = kept.model_copy(update={"parameters": {}})
    again.set_plugins(track, [only_preset], "plugins")
    np.testing.assert_allclose(bounce(again).samples, first, atol=1e-4)  # the preset alone holds its state
    again.set_plugins(track, [wanted.model_copy(update={"parameters": {}})], "plugins")
    assert not np.allclose(bounce(again).samples, first, atol=1e-3)


@zam
@pytest.mark.skipif(not (ZAM / "ZamVerb.vst3").exists(), reason="this zam-plugins has no ZamVerb")
def test_a_real_vst3_that_takes_a_minute_is_cut_off(tmp_path: Path) -> None:
    said: list[Bypassed] = []
    audio = Audio(noise(0.5, rate=RATE).T, RATE)
    names = [*chain(["ZamVerb"]), PluginState(name="Gain", parameters={"gain_db": -6.0})]
    result = run_chain(names, audio, presets=tmp_path, seconds=2, bypassed=said.append)
    assert [what.reason for what in said] == ["timeout"]
    np.testing.assert_allclose(result.samples, audio.samples * 10 ** (-6 / 20), rtol=1e-5)
