"""The three tasks from files to files: read inputs, run the engine, write wavs, take.json, a picture."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.outputs import outputs
from bridge.pictures import Row, draw
from engine.audio import Audio, is_silent, read, write
from engine.bundle import file_sha256
from engine.errors import BacklineError, UsageError
from engine.model import Model
from engine.separation import RESIDUAL, Method
from engine.take import Callback, Settings, Take
from engine.tasks import fill, generate, split

EXTENSIONS = (".wav", ".flac", ".aif", ".aiff", ".ogg", ".mp3")
MIX, TAKE, PICTURE = "mix", "take.json", "picture.png"


@dataclass(frozen=True)
class Place:
    """Where a job writes, and how: `force` replaces files, `picture` draws one beside them."""

    out: Path
    force: bool = False
    picture: bool = True


@dataclass(frozen=True)
class Result:
    """What a job left: files by name ("piano", "mix", "take", "picture"), and what take.json says.

    audio_seconds: how long a stem is. seconds: how long the engine worked, less opening the model.
    """

    files: dict[str, Path]
    record: dict[str, Any]
    audio_seconds: float
    seconds: float

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of audio: below 1 is faster than it plays."""
        return self.seconds / self.audio_seconds


def generate_to(
    place: Place,
    model: Model,
    *,
    seconds: float,
    text: str | None = None,
    audio: Path | None = None,
    settings: Settings,
    callback: Callback | None = None,
    **music: Any,
) -> Result:
    """Every stem and their mix from nothing or a prompt; `music` is the engine's bpm, chords and the like.

    Raises BacklineError as `engine.tasks.generate`, `engine.audio.read` and `bridge.outputs.outputs`.
    """
    reference = None if audio is None else _read_sounding(audio)
    with outputs(place.out, _names([*model.manifest.stems, MIX]), force=place.force) as folder:
        take = generate(
            model, seconds=seconds, text=text, audio=reference, settings=settings, callback=callback, **music
        )
        rows = [Row(name, part, given=False) for name, part in take.stems.items()]
        title = f'a band for "{text}"' if text else "a band"
        wavs = take.stems | {MIX: take.mix()}
        record = _write(folder, place, take, wavs, {} if audio is None else {"audio": audio}, title, rows)
    return _result(place, wavs, record)


def fill_to(
    place: Place,
    model: Model,
    stems: Mapping[str, Path],
    armed: Sequence[str],
    *,
    text: str | None = None,
    audio: Path | None = None,
    other: Path | None = None,
    settings: Settings,
    callback: Callback | None = None,
    **music: Any,
) -> Result:
    """The armed stems, to go with the files `stems` (by stem name); the rest as in `engine.tasks.fill`.

    Raises BacklineError as `generate_to`, and where all that is given is silent.
    """
    context = {name: read(path) for name, path in stems.items() if name not in armed}
    material = None if other is None else read(other)
    given = [*context.values(), *([material] if material else [])]
    if given and all(is_silent(part) for part in given):
        raise BacklineError(
            "All that is given is silent: there is nothing to play along with; use generate instead."
        )
    reference = None if audio is None else _read_sounding(audio)
    wanted = [name for name in model.manifest.stems if name in armed]
    with outputs(place.out, _names(wanted), force=place.force) as folder:
        take = fill(
            model,
            context,
            armed,
            text=text,
            audio=reference,
            other=material,
            settings=settings,
            callback=callback,
            **music,
        )
        heard = context | take.stems
        rows = [
            Row(name, heard[name], given=name in context) for name in model.manifest.stems if name in heard
        ]
        if material is not None:
            rows.insert(0, Row("other", material, given=True))
        title = f"{' and '.join(take.stems)} to go with {', '.join(context) or 'other material'}"
        inputs = {name: stems[name] for name in context}
        inputs |= {name: path for name, path in (("audio", audio), ("other", other)) if path is not None}
        record = _write(folder, place, take, take.stems, inputs, title, rows)
    return _result(place, take.stems, record)


def split_to(
    place: Place,
    model: Model,
    mix: Path,
    *,
    method: Method = "mask",
    residual: bool = False,
    raw: bool = False,
    settings: Settings,
    callback: Callback | None = None,
) -> Result:
    """One wav per stem of the file `mix`; the rest as in `engine.separation.split`.

    Raises BacklineError as `generate_to`, and where the mix is silent.
    """
    sound = _read_sounding(mix)
    names = [*model.manifest.stems, *([RESIDUAL] if residual else [])]
    with outputs(place.out, _names(names), force=place.force) as folder:
        take = split(
            model, sound, method=method, residual=residual, raw=raw, settings=settings, callback=callback
        )
        rows = [
            Row(MIX, sound, given=True),
            *(Row(name, part, given=False) for name, part in take.stems.items()),
        ]
        record = _write(folder, place, take, take.stems, {MIX: mix}, f"{mix.name}, split", rows)
    return _result(place, take.stems, record)


def summary(result: Result) -> dict[str, Any]:
    """The files and numbers of a job, for scripts."""
    return {
        "files": {name: str(path) for name, path in result.files.items()},
        "audio_seconds": round(result.audio_seconds, 3),
        "seconds": round(result.seconds, 3),
        "real_time_factor": round(result.real_time_factor, 3),
    }


def find_stems(folder: Path, stems: Sequence[str]) -> dict[str, Path]:
    """The audio files in `folder` that are named after a stem. Raises BacklineError where it is none."""
    if not folder.is_dir():
        raise BacklineError(f"{folder} is not a folder." if folder.exists() else f"{folder} does not exist.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem.lower()
        if name not in stems or path.suffix.lower() not in EXTENSIONS:
            continue
        if name in found:
            raise UsageError(
                f"{folder} holds two files for {name}: {found[name].name} and {path.name}; keep one."
            )
        found[name] = path
    return found


def _read_sounding(path: Path) -> Audio:
    audio = read(path)
    if is_silent(audio):
        raise BacklineError(f"{path} is silent: every sample is zero.")
    return audio


def _names(stems: Sequence[str]) -> list[str]:
    return [*(f"{name}.wav" for name in stems), TAKE, PICTURE]


def _write(
    folder: Path,
    place: Place,
    take: Take,
    wavs: Mapping[str, Audio],
    inputs: Mapping[str, Path],
    title: str,
    rows: Sequence[Row],
) -> dict[str, Any]:
    """Write everything into the staging folder; returns what take.json says."""
    for name, sound in wavs.items():
        write(folder / f"{name}.wav", sound)
    record = {
        "backline": importlib.metadata.version("backline"),
        **take.record,
        "inputs": {name: {"file": str(path), "sha256": file_sha256(path)} for name, path in inputs.items()},
    }
    if place.picture:
        try:
            draw(folder / PICTURE, f"{title} (seed {record['seed']})", rows)
        except Exception as error:  # the sound is what counts: a picture that fails must not cost the take
            (folder / PICTURE).unlink(missing_ok=True)
            record["warnings"] = [*record["warnings"], f"The picture could not be drawn: {error}."]
    (folder / TAKE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _result(place: Place, wavs: Mapping[str, Audio], record: dict[str, Any]) -> Result:
    files = {name: place.out / f"{name}.wav" for name in wavs} | {"take": place.out / TAKE}
    if (place.out / PICTURE).exists():
        files["picture"] = place.out / PICTURE
    worked = sum(seconds for phase, seconds in record["timings"].items() if phase != "load")
    return Result(files, record, next(iter(wavs.values())).seconds, worked)
