"""`backline bench`: measure this installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.console import print_json, print_table, progress, say
from bridge.models import find_bundle
from engine.model import Device

app = typer.Typer(help="Measure: how fast it is.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Keeps `speed` a subcommand while it is the only one."""


@app.command()
def speed(
    model: Annotated[
        str | None, typer.Option("--model", help="A bundle: a folder, a zip, or a name of `backline models`.")
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to run.")] = "auto",
    full: Annotated[
        bool, typer.Option("--full", help="Also torch.compile, the reference's 3-D UNet, batches; minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for speed.json, speed.md and speed.png.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Time every stage beside torch and beside what this hardware allows."""
    from bench.speed import report
    from bench.speed.run import measure

    bundle = find_bundle(model)
    with progress("bench speed") as callback:
        result = measure(Path(bundle) if bundle else None, device, full=full, report=callback)
    for warning in result["warnings"]:
        say(warning)
    written = report.write(result, out) if out else []
    if json_output:
        print_json(result)
        return
    for sentence in report.about(result):
        print(sentence)
    for title, columns, rows in report.tables(result):
        print_table(title, columns, rows)
    for path in written:
        print(path)
