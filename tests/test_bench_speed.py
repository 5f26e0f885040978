"""`backline bench speed`: what is counted, what a floor is, the command on a tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import write_tiny_bundle

from bench.speed import report
from bench.speed.ceilings import COPIED, COPY, PRODUCT, SIDE, read_ceilings
from bench.speed.cost import Cost, graph_cost, node_flops
from bench.speed.networks import torch_unet
from bench.speed.peers import why_slower
from bench.speed.run import measure
from bench.timing import interleaved
from bridge import cli
from engine.bundle import load_bundle


def shaped(op: str, inputs: list[list[int]], output: list[int]) -> dict[str, object]:
    return {
        "op_name": op,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": output}],
    }


@pytest.mark.parametrize(
    ("op", "inputs", "output", "flops"),
    [
        ("MatMul", [[3, 4, 5], [5, 7]], [3, 4, 7], 2 * 3 * 4 * 5 * 7),
        ("Gemm", [[4, 5], [7, 5]], [4, 7], 2 * 4 * 5 * 7),
        ("Gemm", [[5, 4], [7, 5]], [4, 7], 2 * 4 * 5 * 7),
        ("Conv", [[1, 6, 10, 10], [8, 3, 3, 3]], [1, 8, 10, 10], 2 * 8 * 100 * 27),
        ("ConvTranspose", [[1, 6, 10], [6, 4, 8]], [1, 4, 40], 2 * 60 * 32),
        ("MultiHeadAttention", [[2, 9, 16], [2, 5, 16], [2, 5, 16]], [2, 9, 16], 2 * 2 * 2 * 9 * 5 * 16),
        ("Add", [[4], [4]], [4], 0),
    ],
)
def test_flops_are_those_counted_by_hand(
    op: str, inputs: list[list[int]], output: list[int], flops: int
) -> None:
    assert node_flops(shaped(op, inputs, output)) == flops


def test_a_graph_is_counted_with_the_shapes_it_really_has(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((5, 7), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 7])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = tmp_path / "product.onnx"
    onnx.save(model, str(path))
    cost = graph_cost(path, {"x": np.ones((11, 5), np.float32)})
    assert cost.flops == 2 * 11 * 5 * 7
    assert cost.bytes == 4 * 11 * (5 + 7) + path.stat().st_size
    assert cost.activations == 4 * 11 * 7


def test_a_floor_is_the_longer_of_reckoning_and_moving() -> None:
    cost = Cost(flops=100.0, bytes=10.0, activations=0.0)
    assert cost.floor(50.0, 100.0) == 2.0
    assert cost.floor(1000.0, 5.0) == 2.0


def test_ceilings_are_of_the_fastest_product() -> None:
    seconds = {f"{PRODUCT}slow": [2.0, 2.0], f"{PRODUCT}fast": [9.0, 1.0, 1.0], COPY: [0.5, 0.5]}
    found = read_ceilings(seconds, "cpu")
    assert (found.by, found.precision) == ("fast", "float32")
    assert found.flops == 2 * SIDE["cpu"] ** 3
    assert found.bytes == 4 * COPIED["cpu"]


def test_rounds_end_with_the_time_but_two_are_made() -> None:
    assert len(interleaved({"a": lambda: None}, 50, limit=0.0)["a"]) == 2
    assert len(interleaved({"a": lambda: None}, 3)["a"]) == 3


def test_a_slower_engine_gets_a_reason() -> None:
    cost = Cost(1.0, 2e6, 30e6)
    assert why_slower({"torch": 0.7, "torch.compile": 1.1}, cost, 2.0) is None
    assert "30 MB" in str(why_slower({"torch.compile": 1.3}, cost, 2.0))
    assert "0.96 times" in str(why_slower({"torch": 0.9, "torch.compile": 0.9}, cost, 1.2))


def test_torch_runs_the_default_bundles_own_weights() -> None:
    pytest.importorskip("torch")
    network, weights = torch_unet(load_bundle(None))
    assert weights == "the bundle's weights"
    assert not network.training


def test_every_figure_of_a_run_and_its_picture(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    result = measure(bundle, "cpu", full=False, report=lambda phase, fraction: None, threads=1)
    json.dumps(result)
    assert [row["stage"] for row in result["stages"]] == ["encode", "step", "decode", "vocode"]
    for row in result["stages"]:
        assert row["seconds"] > 0
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["bound"] in ("arithmetic", "memory")
    whole = result["end_to_end"]
    assert whole["real_time_factor"] == pytest.approx(whole["seconds"] / whole["window_seconds"])
    [contest] = result["unet"]
    assert contest["seconds"]["engine"] > 0
    assert "UNet" in contest["missing"]["torch"]  # the tiny bundle's manifest does not describe it
    files = report.write(result, tmp_path / "out")
    assert [path.name for path in files] == ["speed.json", "speed.md", "speed.png"]
    assert all(path.stat().st_size for path in files)
    assert "times the floor" in files[1].read_text()


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--model", "nowhere/bundle"]])
def test_a_mistake_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.run(["bench", "speed", "--json", *arguments])
    said = capsys.readouterr()
    assert status == (2 if "tpu" in arguments else 1)
    assert len(said.err.strip().splitlines()) == 1
    assert json.loads(said.out)["status"] == "error"


@pytest.mark.slow
def test_the_rest_runs_on_a_narrow_stand_in(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bundle = write_tiny_bundle(tmp_path / "tiny")
    small = {"width": 32, "frames": 16}
    result = measure(
        bundle, "cpu", full=True, report=lambda phase, fraction: None, threads=1, reference=small
    )
    assert result["unet"][1]["seconds"].keys() >= {"engine", "torch"}
    assert [row["batch"] for row in result["batches"]] == [1, 2, 4, 8]
    assert result["copies"]["nodes"]["copies"] == 0
    assert report.remarks(result)
