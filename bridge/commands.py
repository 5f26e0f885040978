"""The commands of `backline` and their options; `bridge.cli` starts them."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bridge import ardour_commands, bench_commands, session_commands
from bridge import demo as demo_job
from bridge.charts import chart
from bridge.console import print_json, print_table, progress, say
from bridge.doctor import examine
from bridge.jobs import Place, Result, fill_to, find_stems, generate_to, split_to, summary
from bridge.models import describe, find_bundle, list_bundles, models_folder
from bridge.options import DeviceName, Force, Json, ModelName, QualityName, Seed, Steps, Text
from bridge.serve_commands import send, serve
from engine.errors import BacklineError
from engine.manifest import Quality
from engine.model import Device, Model
from engine.separation import Method
from engine.take import Settings

app = typer.Typer(
    help="The generative engine behind a DAW: arm a track and it plays, hand it a mix and get the stems.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(ardour_commands.app, name="ardour")
app.add_typer(bench_commands.app, name="bench")
app.add_typer(session_commands.app, name="session")

logging.getLogger("backline").addHandler(logging.NullHandler())  # its warnings are said here, once

Sampler = Literal["ddim", "dpmpp_2m", "euler", "distilled"]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; made where there is none.")]
Picture = Annotated[bool, typer.Option("--picture/--no-picture", help="Draw the spectrograms.")]
SamplerName = Annotated[Sampler | None, typer.Option("--sampler", help="That of --quality if not given.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Weight of the prompt; 1 is none.")]
Listening = Annotated[
    float | None, typer.Option("--listening", help="Weight of what is heard, tempo and chords; 1 is none.")
]
Reference = Annotated[Path | None, typer.Option("--audio", help="How it should sound, as an audio file.")]
Bpm = Annotated[float | None, typer.Option("--bpm", help="Tempo, beats per minute.")]
Chords = Annotated[
    str | None,
    typer.Option(
        "--chords", callback=chart, help='One cell a bar: "C | Am | F G | G7", or @FILE; needs --bpm.'
    ),
]
BeatsPerBar = Annotated[int, typer.Option("--beats-per-bar", help="Metre, with --bpm.")]
FirstBeat = Annotated[float, typer.Option("--first-beat", help="Second at which a bar begins, with --bpm.")]
Free = Annotated[bool, typer.Option("--free", help="Draw neither tempo nor chords where none are given.")]


@functools.cache
def command() -> Any:
    """All the commands, built once: a process that runs several command lines saves the time."""
    return typer.main.get_command(app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"backline {importlib.metadata.version('backline')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Folder; backline-demo if not given.")] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="How much of the song to use.")
    ] = demo_job.SECONDS,
    song: Annotated[Path | None, typer.Option("--song", help="Your own folder of stems instead.")] = None,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Annotated[int, typer.Option("--seed")] = demo_job.SEED,
    json_output: Json = False,
    force: Force = False,
) -> None:
    """The main job, end to end: fill in a piano, make up a band, split a mix."""
    opened = _open(model, device)
    finished = demo_job.run(
        opened, out, seconds=seconds, song=song, seed=seed, force=force, progress=progress
    )
    if json_output:
        print_json(demo_job.summary(finished))
    else:
        demo_job.show(finished)


@app.command()
def generate(
    out: Out,
    text: Text = None,
    audio: Reference = None,
    seconds: Annotated[float, typer.Option("--seconds", help="1 to 1800.")] = 10.0,
    bpm: Bpm = None,
    chords: Chords = None,
    beats_per_bar: BeatsPerBar = 4,
    first_beat: FirstBeat = 0.0,
    free: Free = False,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Seed = None,
    quality: QualityName = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    listening: Listening = None,
    json_output: Json = False,
    force: Force = False,
    picture: Picture = True,
) -> None:
    """A whole band from nothing, a text or a reference: OUT/<stem>.wav and OUT/mix.wav."""
    opened = _open(model, device)
    with progress("generate") as callback:
        result = generate_to(
            Place(out, force, picture),
            opened,
            seconds=seconds,
            text=text,
            audio=audio,
            bpm=bpm,
            chords=chords,
            beats_per_bar=beats_per_bar,
            first_beat=first_beat,
            free=free,
            settings=_settings(seed, quality, steps, sampler, guidance, listening),
            callback=callback,
        )
    _report("generate", opened, result, json_output)


@app.command()
def fill(
    folder: Annotated[Path, typer.Argument(help="Folder with the known stems: bass.wav, drums.wav, ...")],
    out: Out,
    arm: Annotated[list[str], typer.Option("--arm", help="The stems to play: piano or piano,guitar.")],
    silent: Annotated[
        list[str] | None, typer.Option("--silent", help="Stems that are known to be silent.")
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--other", help="A file of other material (vocals, ...) to hear.")
    ] = None,
    text: Text = None,
    audio: Reference = None,
    bpm: Bpm = None,
    chords: Chords = None,
    beats_per_bar: BeatsPerBar = 4,
    first_beat: FirstBeat = 0.0,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Seed = None,
    quality: QualityName = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    listening: Listening = None,
    json_output: Json = False,
    force: Force = False,
    picture: Picture = True,
) -> None:
    """Play the armed stems along with the others: OUT/<stem>.wav, with their rate and length."""
    opened = _open(model, device)
    stems = find_stems(folder, opened.manifest.stems)
    with progress("fill") as callback:
        result = fill_to(
            Place(out, force, picture),
            opened,
            stems,
            _listed(arm),
            silent=_listed(silent or []),
            other=other,
            text=text,
            audio=audio,
            bpm=bpm,
            chords=chords,
            beats_per_bar=beats_per_bar,
            first_beat=first_beat,
            settings=_settings(seed, quality, steps, sampler, guidance, listening),
            callback=callback,
        )
    _report("fill", opened, result, json_output)


@app.command()
def split(
    mix: Annotated[Path, typer.Argument(help="The mix: wav, flac, aiff, ogg or mp3.")],
    out: Out,
    method: Annotated[
        Method, typer.Option("--method", help="mask sums to the mix and is the best.")
    ] = "mask",
    residual: Annotated[
        bool, typer.Option("--residual", help="One more wav with what no stem explains.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="The vocoder's audio instead of masks on the mix.")
    ] = False,
    model: ModelName = None,
    device: DeviceName = "auto",
    seed: Seed = None,
    quality: QualityName = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    json_output: Json = False,
    force: Force = False,
    picture: Picture = True,
) -> None:
    """Split a mix: OUT/<stem>.wav, of the mix's rate, channels and length; they sum to the mix."""
    opened = _open(model, device)
    with progress("split") as callback:
        result = split_to(
            Place(out, force, picture),
            opened,
            mix,
            method=method,
            residual=residual,
            raw=raw,
            settings=_settings(seed, quality, steps, sampler, guidance),
            callback=callback,
        )
    _report("split", opened, result, json_output)


@app.command("import")
def import_bundle(
    checkpoint: Annotated[Path, typer.Argument(help="The .ckpt, or the .tar.gz that holds it.")],
    config: Annotated[
        Path, typer.Option("--config", help="The release's YAML, or JSON with the same names.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The bundle to write.")],
    weights: Annotated[Literal["ema", "raw"], typer.Option("--weights", help="Which copy to read.")] = "ema",
    precision: Annotated[
        Literal["fp32", "fp16", "fp16-compute", "int8"],
        typer.Option("--precision", help="Of the weights; fp16-compute is for a GPU, int8 for a CPU."),
    ] = "fp32",
    vae: Annotated[Path | None, typer.Option("--vae", help="The VAE's file, where CKPT has none.")] = None,
    vocoder: Annotated[Path | None, typer.Option("--vocoder", help="The vocoder's, likewise.")] = None,
    clap: Annotated[Path | None, typer.Option("--clap", help="CLAP's, likewise.")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="roberta-base's tokenizer.")] = None,
    json_output: Json = False,
    force: Force = False,
) -> None:
    """Turn a published Multi-Track MusicLDM checkpoint into a bundle; needs the extra 'export'."""
    try:
        from export.import_checkpoint import import_checkpoint
    except ModuleNotFoundError as error:
        raise BacklineError(
            f"Importing needs {error.name}: install Backline with the extra 'export'."
        ) from error
    with progress("import") as callback:
        imported = import_checkpoint(
            checkpoint,
            config,
            out,
            weights=weights,
            precision=precision,
            vae=vae,
            vocoder=vocoder,
            clap=clap,
            tokenizer=tokenizer,
            force=force,
            callback=callback,
        )
    facts = {"read": imported.read, "unused": imported.unused, "foreign": imported.foreign}
    if json_output:
        print_json(
            {"status": "done", "task": "import", "out": str(out), **facts, "missing": imported.missing}
        )
        return
    print("\n".join(imported.lines()))
    print(f"{out} is ready: give it to --model.")


@app.command()
def models(json_output: Json = False) -> None:
    """The bundles there are: the default one and those in the models folder."""
    found = [describe(path) for path in list_bundles()]
    if json_output:
        print_json({"folder": str(models_folder()), "models": found})
        return
    for bundle in found:
        rows = [
            [key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)]
            for key, value in bundle.items()
        ]
        print_table(None, ["model", str(bundle.get("name", "cannot be used"))], rows)
    print(f"Bundles in {models_folder()} can be given to --model by name.")


@app.command()
def doctor(model: ModelName = None, device: DeviceName = "auto", json_output: Json = False) -> None:
    """Look at the machine and the installation, and measure how fast a window is made."""
    with progress("doctor") as callback:
        findings = []
        for finding in examine(find_bundle(model), device):
            findings.append(finding)
            callback(finding.subject, min(1.0, len(findings) / 10))
    broken = any(finding.state == "problem" for finding in findings)
    if json_output:
        print_json({"ok": not broken, "findings": [vars(finding) for finding in findings]})
    else:
        print_table(None, ["", "", ""], [[f.subject, f.state, f.text] for f in findings])
    if broken:
        say("Backline will not work as it is: see the problems it lists.")
        raise typer.Exit(1)


app.command()(serve)
app.command()(send)


def _open(model: str | None, device: Device) -> Model:
    opened = Model.open(find_bundle(model), device)
    for warning in opened.warnings:
        say(warning)
    return opened


def _settings(
    seed: int | None,
    quality: Quality | None,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    listening: float | None = None,
) -> Settings:
    if seed is None:
        seed = secrets.randbelow(1 << 31)
    return Settings(
        seed=seed, quality=quality, steps=steps, sampler=sampler, guidance=guidance, listening=listening
    )


def _listed(values: Sequence[str]) -> list[str]:
    """["piano,guitar", "bass"] -> ["piano", "guitar", "bass"]."""
    return [name for value in values for part in value.split(",") if (name := part.strip().lower())]


def _report(task: str, model: Model, result: Result, json_output: bool) -> None:
    for warning in result.record["warnings"]:
        if warning not in model.warnings:  # those were said when it was opened
            say(warning)
    if json_output:
        print_json({"status": "done", "task": task, **summary(result), "take": result.record})
        return
    played = result.record["request"]
    if task == "generate" and played["bpm"] is not None:
        chords = f": {played['chords']}" if played["chords"] else ""
        beats = played["beats_per_bar"]
        metre = "" if beats == 4 else f", {beats} beats a bar"
        print(f"{played['bpm']:g} bpm{metre}{chords}")
    print_table(None, ["", "file"], [[name, str(path)] for name, path in result.files.items()])
    print(
        f"{result.audio_seconds:.1f} s of audio in {result.seconds:.1f} s (real-time factor "
        f"{result.real_time_factor:.2f}) on {result.record['provider']}, seed {result.record['seed']}."
    )
