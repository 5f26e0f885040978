"""What the VAE and the vocoder alone do to a sound."""

from __future__ import annotations

import numpy as np

from bench.quality.articulation import attacks, held_notes
from bench.quality.figures import Figure, Tick, of_means
from engine.audio import Audio, fit, resample
from engine.features import log_mel
from engine.listening import gain_to, model_signal, signal_level, window_mel
from engine.manifest import Mel
from engine.model import Model
from training.held_out import RATE, Window
from training.metrics import Array
from training.stems import STEMS

PART = "sound"
WINDOWS = 16
BAR = 0.35
# The geometry of the figure, whatever the bundle's own is.
MEL = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0.0, f_max=22050.0, floor=1e-5
)


def measure(model: Model, windows: list[Window], tick: Tick) -> list[Figure]:
    """What VAE and vocoder do to log mels, beside the vocoder alone and another window's stem; to held notes
    and to attacks."""
    few = windows[:WINDOWS]
    trips = []
    rows: dict[str, list[Array]] = {"both": [], "vocoder": [], "other": []}
    for number, window in enumerate(few):
        tick(0.8 * number / len(few))
        other = few[(number + 1) % len(few)].stems
        made = round_trip(model, window.stems, window.mixture)
        true = log_mel(window.stems[:, : made["both"].shape[1]].astype(np.float32), MEL)
        size = made["both"].shape[1]
        trips.append(made)
        for kind, audio in (*made.items(), ("other", other[:, :size])):
            rows[kind].append(np.abs(log_mel(audio.astype(np.float32), MEL) - true).mean((1, 2)))
    values = {kind: np.array(found) for kind, found in rows.items()}
    drums = STEMS.index("drums")
    mel, latent = model.manifest.mel, model.manifest.latent
    patch_hz = mel.sample_rate / mel.hop / latent.frames
    struck = {kind: [trip[kind][drums] for trip in trips] for kind in ("both", "vocoder")}
    stems = ", ".join(f"{s} {values['both'][:, i].mean():.2f}" for i, s in enumerate(STEMS))
    return [
        of_means(
            PART,
            "log-mel L1 of VAE and vocoder",
            values["both"].mean(1),
            ceiling={"vocoder alone": float(values["vocoder"].mean())},
            floor={"another window's": float(values["other"].mean())},
            bar=BAR,
            lower=True,
            note=stems,
        ),
        *held_notes(lambda note: {k: x[0] for k, x in round_trip(model, note[None], note).items()}, patch_hz),
        attacks(struck, [window.stems[drums, : trips[0]["both"].shape[1]] for window in few]),
    ]


def round_trip(model: Model, stems: Array, mixture: Array) -> dict[str, Array]:
    """(S, samples) at 44.1 kHz after VAE and vocoder ("both") and after the vocoder alone, whole windows.

    stems: (S, samples). mixture: (samples,), whose level they are heard at.
    """
    manifest = model.manifest
    gain = 1.0
    if manifest.level is not None:
        heard = model_signal(Audio(mixture[None], RATE), manifest)
        gain = gain_to(manifest.level.mixture_db, signal_level(heard, manifest))
    signals = [model_signal(Audio(stem[None], RATE), manifest) for stem in stems]
    mels = np.stack([window_mel(signal, manifest, 0, manifest.window_frames, gain) for signal in signals])
    size = min(stems.shape[1], round(mels.shape[1] * manifest.mel.hop / manifest.mel.sample_rate * RATE))

    def heard_again(log_mels: Array) -> Array:
        audio = Audio(model.vocode(log_mels.astype(np.float32)), manifest.vocoder.sample_rate)
        return fit(resample(audio, RATE).samples, size) / np.float32(gain)

    return {"both": heard_again(model.decode(model.encode(mels))), "vocoder": heard_again(mels)}
