"""The options that more than one group of commands has."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.charts import chart
from engine.manifest import Quality
from engine.model import Device

ModelName = Annotated[
    str | None, typer.Option("--model", help="A bundle: a folder, a zip, or a name of `backline models`.")
]
DeviceName = Annotated[Device, typer.Option("--device", help="Where to run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of words.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same bytes; random if not given.")
]
QualityName = Annotated[
    Quality | None,
    typer.Option("--quality", help="The model's steps and sampler for it; normal if not given."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; those of --quality if not given.")
]
HostChords = Annotated[
    str | None,
    typer.Option(
        "--chords",
        callback=chart,
        help='One cell a bar, from the first bar line on: "C | Am"; @FILE; or "markers" of the session.',
    ),
]
Text = Annotated[str | None, typer.Option("--text", help="How it should sound, in words.")]
