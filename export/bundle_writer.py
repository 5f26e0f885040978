"""Networks in torch -> a bundle folder: the graphs of the design, checked, and a manifest with their hashes.

A bundle appears whole or not at all: everything is written to a hidden folder beside the target, which gets
its name only when the last file is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import BacklineError
from engine.features import log_mel
from engine.manifest import GRAPHS, Manifest, Mel
from export.onnx_writer import OPSET, Input, Precision, Shape, write_graph

MANIFEST = "manifest.json"
TIMES = (16, 24)  # latent frames at which graphs are compared with torch
Progress = Callable[[str, float], None]


def export_bundle(
    out: Path,
    manifest: Manifest,
    networks: Mapping[str, torch.nn.Module],
    *,
    precision: Precision = "fp32",
    extra: Mapping[str, bytes] | None = None,
    times: Sequence[int] = TIMES,
    tolerance: float | None = None,
    force: bool = False,
    callback: Progress | None = None,
) -> Manifest:
    """Write `networks` (graph name -> module) and `extra` files as the bundle `out`; return its manifest.

    A module is called with its graph's inputs in the order of `graph_inputs`, and each graph is compared with
    it at batches 1 and 2 and at the latent lengths `times`, two multiples of what the networks downsample by.
    precision: of the UNet as `write_graph` has it; the others' weights are float16 unless it is fp32. How far
    each graph is from torch goes into the manifest's provenance.

    Raises BacklineError where `out` exists (without `force`), cannot be written or the disk is full, and
    onnx_writer.ExportMismatch where a graph does not match its module. Nothing is left at `out` then.
    """
    unknown = sorted(set(networks) - set(GRAPHS))
    if unknown:
        raise ValueError(f"no such graphs: {unknown}")

    def fill(folder: Path) -> Manifest:
        errors = {}
        for i, (graph, module) in enumerate(networks.items()):
            if callback:
                callback(f"writing {graph}", i / len(networks))
            errors[graph] = _write_graph(
                folder,
                manifest,
                graph,
                module,
                sizes=_check_sizes(manifest, times),
                precision=precision if graph == "unet" or precision == "fp32" else "fp16",
                tolerance=tolerance,
            )
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)
        export = {
            "opset": OPSET,
            "precision": precision,
            "relative_error": errors,
        }
        return manifest.model_copy(update={"provenance": {**manifest.provenance, "export": export}})

    written = write_bundle(out, fill, force=force)
    if callback:
        callback("done", 1.0)
    return written


def replace_graph(
    source: Bundle,
    manifest: Manifest,
    graph: str,
    network: torch.nn.Module,
    out: Path,
    *,
    sizes: Sequence[Mapping[str, int]] | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`: the files of `source` with `network` as its `graph`; return its manifest.

    manifest: what it then declares. sizes: as in `write_graph`; None: as in `export_bundle`. How far the
    graph, whose weights are float16, is from torch goes into the provenance. Raises BacklineError and
    ExportMismatch as `export_bundle`.
    """

    def fill(folder: Path) -> Manifest:
        for name in source.manifest.files:
            if name != f"{graph}.onnx":
                shutil.copyfile(source.path(name), folder / name)
        checked = sizes or _check_sizes(manifest, TIMES)
        error = _write_graph(folder, manifest, graph, network, sizes=checked, precision="fp16")
        export = manifest.provenance.get("export", {})
        errors = export.get("relative_error", {}) | {graph: error}
        provenance = manifest.provenance | {"export": export | {"relative_error": errors}}
        return manifest.model_copy(update={"provenance": provenance})

    return write_bundle(out, fill, force=force)


def _write_graph(
    folder: Path,
    manifest: Manifest,
    graph: str,
    module: torch.nn.Module,
    *,
    sizes: Sequence[Mapping[str, int]],
    precision: Precision,
    tolerance: float | None = None,
) -> float:
    """Write a graph as the manifest declares it; return its error to two digits, as the manifest has it."""
    inputs, outputs = graph_inputs(manifest, graph), graph_outputs(manifest, graph)
    path = folder / f"{graph}.onnx"
    error = write_graph(module, inputs, outputs, path, sizes=sizes, precision=precision, tolerance=tolerance)
    return float(f"{error:.1e}")


def graph_inputs(manifest: Manifest, graph: str) -> list[Input]:
    """The inputs of a graph in call order, as design and manifest fix them; strings are dynamic axes."""
    stems, z, window, f = manifest.latent_shape
    mels = manifest.mel.n_mels
    t: int | str = "time" if manifest.dynamic_window else window
    if graph == "unet":
        declared = set(manifest.capabilities)
        kinds = 3 if "weakened" in declared else 2 if "distilled" in declared else 1
        optional = [
            (manifest.film_dim is not None, Input("film", ("batch", manifest.film_dim or 0))),
            ("context" in declared, Input("context", ("batch", stems, z, t, f))),
            ("context" in declared, Input("context_mask", ("batch", stems, t))),
            ("mixture" in declared, Input("mixture", ("batch", z, t, f))),
            ("mixture" in declared, Input("mixture_mask", ("batch", t))),
            ("mixture" in declared, Input("mixture_stems", ("batch", stems))),
            ("grid" in declared, Input("grid", ("batch", t, 6))),
            ("chords" in declared, Input("chords", ("batch", t, 25))),
        ]
        return [
            Input("latents", ("batch", stems, z, t, f)),
            Input("timestep", ("batch",), "int64", high=manifest.schedule.steps * kinds),
            *(item for wanted, item in optional if wanted),
        ]
    if graph == "vae_encoder":
        return [Input("mel", ("batch", 1, "frames", mels))]
    if graph == "vae_decoder":
        return [Input("latents", ("batch", z, "time", f))]
    if graph == "vocoder":
        return [Input("mel", ("batch", mels, "frames"), feed=partial(mel_of_noise, manifest.mel))]
    if graph == "separator" and manifest.separator is not None:
        return [Input("mixture", ("batch", "frames", manifest.separator.bins), "magnitude")]
    if graph == "clap_text":
        words = int(manifest.networks.get(graph, {}).get("vocabulary", 64))
        return [
            Input("input_ids", ("batch", "length"), "int64", high=words),
            Input("attention_mask", ("batch", "length"), "mask"),
        ]
    if manifest.clap is not None and manifest.clap.audio_input == "audio":
        return [Input("audio", ("batch", manifest.clap.samples or 0))]
    return [Input("mel", ("batch", 1, "frames", mels))]


def mel_of_noise(mel: Mel, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Log mels (batch, mels, frames) of white noise: a search for phases has none to find where frames that
    overlap have nothing to do with each other."""
    batch, _, frames = shape
    noise = 0.1 * rng.standard_normal((batch, frames * mel.hop), dtype=np.float32)
    return np.ascontiguousarray(log_mel(noise, mel).transpose(0, 2, 1))


def graph_outputs(manifest: Manifest, graph: str) -> dict[str, Shape]:
    """The outputs of a graph, as `graph_inputs`."""
    stems, z, window, f = manifest.latent_shape
    t: int | str = "time" if manifest.dynamic_window else window
    shapes: dict[str, dict[str, Shape]] = {
        "unet": {"prediction": ("batch", stems, z, t, f)},
        "vae_encoder": {"moments": ("batch", 2 * z, "time", f)},
        "vae_decoder": {"mel": ("batch", 1, "frames", manifest.mel.n_mels)},
        "vocoder": {"audio": ("batch", 1, "samples")},
        "clap_text": {"embedding": ("batch", manifest.film_dim or 0)},
        "clap_audio": {"embedding": ("batch", manifest.film_dim or 0)},
    }
    if manifest.separator is not None:
        shapes["separator"] = {"masks": ("batch", stems, "frames", manifest.separator.bins)}
    return shapes[graph]


def write_bundle(out: Path, fill: Callable[[Path], Manifest], *, force: bool = False) -> Manifest:
    """Make the folder `out` from what `fill(folder)` writes into a folder and the manifest it returns.

    The manifest's `files` is set here to the sha256 of every file. Raises BacklineError where `out` exists
    (`force` replaces a bundle or an empty folder, never anything else), or where it cannot be written.
    """
    out = Path(out)
    check_target(out, force)
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BacklineError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        manifest = fill(folder)
        manifest = manifest.model_copy(update={"files": hash_files(folder)})
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        for path in folder.iterdir():
            _sync(path)
        folder.chmod(0o755)
        _replace(folder, out)
    except OSError as error:
        raise BacklineError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it holds the bundle
                parent.rmdir()
    return manifest


def check_target(out: Path, force: bool) -> None:
    """Raises BacklineError where a bundle `out` may not be written because something is there."""
    if out.exists() and not force:
        raise BacklineError(f"{out} exists; pass --force to replace it.")
    if out.exists() and not _replaceable(out):
        raise BacklineError(f"{out} exists and is no bundle, so it is not replaced.")


def hash_files(folder: Path) -> dict[str, str]:
    """File name -> sha256 (hex) of every file in `folder` but the manifest, sorted by name."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: _sha256(path) for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sizes(manifest: Manifest, times: Sequence[int]) -> list[dict[str, int]]:
    """Axis sizes to check every graph at: batch and length both change from one set to the next."""
    frames, vocoder = manifest.latent.frames, manifest.vocoder
    return [
        {
            "batch": 1 + i % 2,
            "time": time,
            "frames": time * frames,
            "samples": time * frames * vocoder.hop + vocoder.trim,
            "length": 5 + 2 * i,
        }
        for i, time in enumerate(times)
    ]


def _replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old bundle there steps aside first: `out` is never half of each."""
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(old / out.name)
    try:
        folder.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
