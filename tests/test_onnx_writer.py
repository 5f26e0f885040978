"""Graphs are written, checked against torch, and refused when they do not match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from engine.errors import BacklineError
from engine.manifest import Manifest
from export.bundle_writer import hash_files, write_bundle
from export.onnx_writer import HALF_COMPUTED, ExportMismatch, Input, relative_error, write_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.conv(x)) + step[:, None, None]
        return self.linear(hidden.transpose(1, 2)).transpose(1, 2)


class Wide(Net):
    """Its matrix is large enough for onnx to keep it in another file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 512, 3, padding=1)
        self.linear = nn.Linear(512, 4)


class Baked(Net):
    """Traces its length as a constant."""

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return super().forward(x, step) + torch.arange(int(x.shape[2])).float()


class Deaf(Net):
    """Branches on data, which tracing cannot see."""

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return super().forward(x, step) * (2.0 if int(step.shape[0]) == 1 else 1.0)


class Sliced(nn.Module):
    """Each of its slices is traced with constants of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :2, i : i + 4] * (1 + i) for i in range(6)], -1)


INPUTS = [Input("x", ("batch", 4, "time")), Input("step", ("batch",), "int64")]
OUTPUTS = {"y": ("batch", 4, "time")}
SIZES = [{"batch": 1, "time": 16}, {"batch": 2, "time": 21}]


def test_a_constant_is_written_once(tmp_path: Path) -> None:
    write_graph(Sliced(), INPUTS[:1], {"y": ("batch", 2, 24)}, tmp_path / "y.onnx", sizes=SIZES)
    nodes = onnx.load(str(tmp_path / "y.onnx")).graph.node
    values = [n.attribute[0].t.SerializeToString() for n in nodes if n.op_type == "Constant"]
    assert len(values) == len(set(values)) > 6
    assert not any(n.op_type == "Unsqueeze" for n in nodes)
    used = {name for n in nodes for name in n.input}
    assert all(n.output[0] in used for n in nodes if n.op_type == "Constant")


def test_graph_equals_torch_at_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = Net(), tmp_path / "net.onnx"
    assert write_graph(net, INPUTS, OUTPUTS, path, sizes=SIZES) <= 1e-4
    assert net.training, "the module is left as it was"
    x, step = np.random.default_rng(1).standard_normal((3, 4, 50), np.float32), np.array([1, 2, 3])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x, "step": step})
    with torch.no_grad():
        expected = net(torch.from_numpy(x), torch.from_numpy(step)).numpy()
    assert relative_error(y, expected) <= 1e-4


@pytest.mark.parametrize("external", [False, True])
def test_half_stores_kernels_in_two_bytes_and_external_data_in_one_file(
    tmp_path: Path, external: bool
) -> None:
    path = tmp_path / "net.onnx"
    error = write_graph(Net(), INPUTS, OUTPUTS, path, sizes=SIZES, precision="fp16", external=external)
    assert 0 < error <= 2e-2
    stored = {item.name: item.data_type for item in onnx.load(str(path)).graph.initializer}
    assert stored["conv.weight.float16"] == onnx.TensorProto.FLOAT16
    assert stored["conv.bias"] == onnx.TensorProto.FLOAT
    names = {item.name for item in tmp_path.iterdir()}
    assert names == ({"net.onnx", "net.onnx.data"} if external else {"net.onnx"})


def test_half_compute_casts_products_and_leaves_the_rest_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    error = write_graph(Net(), INPUTS, OUTPUTS, path, sizes=SIZES, precision="fp16-compute")
    assert 0 < error <= 2e-2
    graph = onnx.load(str(path)).graph
    made = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in HALF_COMPUTED]
    assert products
    for node in products:
        casts = [made[name] for name in node.input if name]
        assert all(cast.op_type == "Cast" for cast in casts)
        assert all(cast.attribute[0].i == onnx.TensorProto.FLOAT16 for cast in casts)
        (back,) = (other for other in graph.node if node.output[0] in other.input)
        assert back.op_type == "Cast" and back.attribute[0].i == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("external", [False, True])
def test_int8_keeps_matrices_in_one_byte_and_kernels_in_two(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "net.onnx"
    error = write_graph(Wide(), INPUTS, OUTPUTS, path, sizes=SIZES, precision="int8", external=external)
    assert 1e-4 < error <= 5e-2
    graph = onnx.load(str(path)).graph
    stored = {item.name: item.data_type for item in graph.initializer}
    assert stored["conv.weight.float16"] == onnx.TensorProto.FLOAT16
    assert "linear.weight.float16" not in stored
    assert "MatMulInteger" in {node.op_type for node in graph.node}
    assert (tmp_path / "net.onnx.data").exists() == external


@pytest.mark.parametrize("kind", [Baked, Deaf])
def test_sizes_baked_in_by_tracing_are_caught(tmp_path: Path, kind: type[Net]) -> None:
    with pytest.raises(ExportMismatch):
        write_graph(kind(), INPUTS, OUTPUTS, tmp_path / "net.onnx", sizes=SIZES)
    assert not any(tmp_path.iterdir())


def test_dynamic_axes_need_two_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['time'\]"):
        write_graph(Net(), INPUTS, OUTPUTS, tmp_path / "net.onnx", sizes=[SIZES[0], {"batch": 2, "time": 16}])


def test_relative_error_is_infinite_for_nan() -> None:
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.array([1.0]), np.array([0.0])) == np.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0


def _manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "name": "tiny",
            "licence": "CC0-1.0",
            "stems": ["bass", "drums"],
            "mel": {
                "sample_rate": 16000, "n_fft": 256, "win_length": 256, "hop": 64, "n_mels": 16,
                "f_min": 0, "f_max": 8000, "floor": 1e-5,
            },
            "latent": {"channels": 2, "frames": 4, "freq": 4, "scale_factor": 1.0},
            "vocoder": {"sample_rate": 16000, "hop": 64, "trim": 0},
            "schedule": {"start": 0.0015, "end": 0.0195, "steps": 1000},
            "prediction": "eps",
            "sampling": {"steps": 4},
            "window_frames": 8,
        }
    )  # fmt: skip


def test_bundle_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def broken(folder: Path) -> Manifest:
        (folder / "unet.onnx").write_bytes(b"half a graph")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, broken)
    assert not any(tmp_path.iterdir())

    def whole(folder: Path) -> Manifest:
        (folder / "unet.onnx").write_bytes(b"a graph")
        return _manifest()

    written = write_bundle(out, whole)
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]
    assert written == Manifest.model_validate_json((out / "manifest.json").read_text())
    assert written.files == hash_files(out) and list(written.files) == ["unet.onnx"]

    with pytest.raises(BacklineError, match="exists"):
        write_bundle(out, whole)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, broken, force=True)
    assert (out / "unet.onnx").read_bytes() == b"a graph", "a failed replacement leaves the old bundle"
    write_bundle(out, whole, force=True)
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_force_never_replaces_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "song").mkdir()
    (tmp_path / "song" / "bass.wav").write_bytes(b"precious")
    with pytest.raises(BacklineError, match="no bundle"):
        write_bundle(tmp_path / "song", lambda folder: _manifest(), force=True)
    assert (tmp_path / "song" / "bass.wav").read_bytes() == b"precious"
