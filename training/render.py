"""python -m training.render: writes songs as features (and some audio) into a folder, song by song.

Each song becomes `<name>.npy`, uint8 log mels (stems, renders, frames, mels), and `<name>.json` with
every label. Each stem is rendered several times with different sounds, so that training can combine
renders at random. A part of the songs also keeps 16-bit audio for the vocoder, and `--stems` keeps
`<name>.stems.npy` of all of them for the separator: int16 (stems, renders, samples) at half the rate.
Run it again and it goes on where it stopped. Several can work side by side, with `--step 2` and `--first 0`
and `--first 1` for two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from engine.harmony import UNPITCHED
from training.bands import Song, lowered, split_grooves, try_song
from training.grooves import list_grooves
from training.instruments import RATE
from training.mel import GEOMETRY, log_mel, to_bytes
from training.sources import Source, held_out_sources, training_sources
from training.stems import STEMS

if TYPE_CHECKING:
    import pedalboard as pb

SEPARATION_RATE = RATE // 2  # of the stems the separator hears
STEM_RMS_DB = {"bass": -20.0, "drums": -20.0, "guitar": -23.0, "piano": -23.0}  # of a stem's sounding parts


def effects(stem: str, rng: np.random.Generator) -> pb.Pedalboard:
    """A random chain such as a mixing engineer might leave on the track."""
    import pedalboard as pb

    u = rng.uniform
    chain: list[pb.Plugin] = []
    if stem == "guitar" and rng.random() < 0.2:
        chain.append(pb.Distortion(drive_db=u(5, 28)))
    if stem == "bass" and rng.random() < 0.1:
        chain.append(pb.Distortion(drive_db=u(3, 15)))
    if rng.random() < 0.4:
        chain.append(
            pb.Compressor(threshold_db=u(-32, -14), ratio=u(2, 8), attack_ms=u(1, 30), release_ms=u(50, 300))
        )
    if stem in ("guitar", "piano") and rng.random() < 0.15:
        chain.append(pb.Chorus(rate_hz=u(0.3, 2.5), depth=u(0.1, 0.4), mix=u(0.2, 0.5)))
    for _ in range(int(rng.integers(0, 3))):
        chain.append(pb.PeakFilter(cutoff_frequency_hz=10 ** u(2, 4), gain_db=u(-9, 9), q=u(0.5, 2)))
    if rng.random() < 0.5:
        chain.append(pb.HighShelfFilter(cutoff_frequency_hz=u(2000, 8000), gain_db=u(-12, 8)))
    if rng.random() < (0.15 if stem == "bass" else 0.5):
        chain.append(
            pb.Reverb(room_size=u(0.1, 0.85), wet_level=u(0.04, 0.3), dry_level=1.0, damping=u(0.2, 0.9))
        )
    return pb.Pedalboard(chain)


def pools(sources: list[Source], only: Sequence[str] = ("",)) -> dict[str, list[Source]]:
    """The sounds of each stem whose names begin with one of `only`."""
    named = [source for source in sources if source.name.startswith(tuple(only))]
    return {stem: [source for source in named if source.stem == stem] for stem in STEMS}


def levelled(audio: NDArray[np.float32], db: float) -> NDArray[np.float32]:
    """The signal at `db` dBFS RMS over its sounding 50 ms blocks (those within 40 dB of the loudest)."""
    blocks = audio[: len(audio) // 2205 * 2205].reshape(-1, 2205)
    power = (blocks.astype(np.float64) ** 2).mean(1)
    if power.max() < 1e-12:
        return audio
    rms = np.sqrt(power[power > power.max() * 1e-4].mean())
    return (audio * (10 ** (db / 20) / rms)).astype(np.float32)


def render_stem(
    song: Song, source: Source, rng: np.random.Generator, dry: bool = False
) -> NDArray[np.float32]:
    """One stem as mono audio (samples,) of the song's length, at its usual level."""
    n = int(song.seconds * RATE)
    audio = source.render(song.notes[source.stem], n, rng)
    if not dry:
        audio = effects(source.stem, rng)(audio[None], RATE)[0]
    return levelled(audio, STEM_RMS_DB[source.stem])


def _as_int16(audio: NDArray[np.float32]) -> NDArray[np.int16]:
    return (np.clip(audio, -1, 1) * 32767).astype(np.int16)


def _labels(song: Song, sources: list[list[Source]]) -> dict[str, object]:
    labels = asdict(song)
    del labels["notes"]
    labels["onsets"] = {s: [round(float(t), 3) for t in song.notes[s][:, 0]] for s in STEMS}
    pitched = [s for s in STEMS if s not in UNPITCHED]  # s, s, MIDI pitch
    labels["notes"] = {s: song.notes[s][:, :3].round(3).tolist() for s in pitched}
    labels["sources"] = [[{"name": s.name, "words": s.words} for s in renders] for renders in sources]
    return labels


def write(
    song: Song,
    pool: dict[str, list[Source]],
    path: Path,
    renders: int,
    audio: bool,
    dry: bool,
    rng: np.random.Generator,
    stems: bool = False,
) -> None:
    """Renders a song and writes its files; the .npy gets its name last, so that no half song is seen."""
    mels, sources, kept, halved = [], [], [], []
    for stem in STEMS:
        chosen = [pool[stem][int(i)] for i in rng.choice(len(pool[stem]), renders, replace=False)]
        rendered = [render_stem(song, source, rng, dry) for source in chosen]
        mels.append(torch.stack([to_bytes(log_mel(torch.from_numpy(a)[None])[0]) for a in rendered]))
        sources.append(chosen)
        if audio:
            kept.append(_as_int16(rendered[0][RATE * 8 : RATE * 28]))
        if stems:
            halved.append([_as_int16(soxr.resample(a, RATE, SEPARATION_RATE)) for a in rendered])
    path.with_suffix(".json").write_text(json.dumps(_labels(song, sources)))
    if audio:
        np.save(path.with_suffix(".audio.npy"), np.stack(kept))
    if stems:
        np.save(path.with_suffix(".stems.npy"), np.array(halved))
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, torch.stack(mels).numpy())
    temporary.replace(path.with_suffix(".npy"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the songs")
    parser.add_argument(
        "--samples", type=Path, required=True, help="folder of fetched soundfonts and npm archives"
    )
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe (JSON)")
    parser.add_argument("--songs", type=int, default=1000, help="how many songs this worker makes")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first song, which is also its seed"
    )
    parser.add_argument(
        "--step", type=int, default=1, help="work on every STEP-th song, for workers side by side"
    )
    parser.add_argument("--renders", type=int, default=2, help="sounds each stem is played with")
    parser.add_argument(
        "--made-from", type=int, default=0, help="seed of our own synthesis: others make other sounds"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="only sounds whose names begin so"
    )
    parser.add_argument("--low-basses", action="store_true", help="basses play in their lowest octaves")
    parser.add_argument("--held-out", action="store_true", help="held-out grooves, TimGM6mb, no effects")
    parser.add_argument("--stems", action="store_true", help="keep audio of every render, 0.6 MB a second")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = held_out_sources() if args.held_out else training_sources(args.samples, args.made_from)
    pool = pools(sources, args.only)
    if min(map(len, pool.values())) < args.renders:
        parser.error(f"a stem has fewer than {args.renders} sounds: lower --renders or name more with --only")
    args.out.mkdir(parents=True, exist_ok=True)
    grooves = split_grooves(list_grooves(args.grooves), args.held_out)
    counts = ", ".join(f"{len(pool[stem])} {stem}" for stem in STEMS)
    print(f"sounds: {counts}; {len(grooves)} grooves; {GEOMETRY.sample_rate} Hz", flush=True)
    for number in range(args.first, args.first + args.songs * args.step, args.step):
        path = args.out / f"{number:06d}"
        if not path.with_suffix(".npy").exists():
            rng = np.random.default_rng(number)
            song = try_song(grooves, rng, forms=not args.held_out)
            if args.low_basses:
                song = lowered(song, np.random.default_rng([number, 1]))
            write(song, pool, path, args.renders, number % 3 == 0, args.held_out, rng, args.stems)


if __name__ == "__main__":
    main()
