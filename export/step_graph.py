"""The graphs beside unet.onnx that keep a sampler on the device: python -m export.step_graph.

A graph of onnxruntime's is all that the engine can run on a GPU, so what lies between two passes of the UNet
is one: the clean latents from its output, guidance, inpainting, the sampler's update, and the UNet's next
input. All samplers are one linear update whose coefficients are a table's row
(`engine.samplers.linear_steps`), and the row's number is counted in the graph: nothing comes from the host
between the first step and the last.

There is one graph for each number of passes that guidance needs: 1, 2 or 4 (the prompt, what is heard, both).
They are package data of the engine, a few kB, and a test writes them again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.loop import COLUMNS, PASSES, step_graph_path

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
LATENTS = ("B", "S", "Z", "T", "F")
OPSET, IR_VERSION = 20, 9
LEAST_DEVIATION = 1e-6  # engine.denoisers does not divide by less


class _Nodes:
    """Collects nodes; `add` returns the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def split(self, value: str, names: list[str], axis: int) -> list[str]:
        """Equal parts along an axis, as many as there are names."""
        self.nodes.append(helper.make_node("Split", [value], names, axis=axis, num_outputs=len(names)))
        return names


def step_graph(passes: int) -> onnx.ModelProto:
    """What follows a run of the UNet over `passes` x B latents, pass by pass in this order.

    1: as told. 2: as told, then without the guiding condition. 4: both conditions, the first only, the second
    only, neither; the second one guides within the first, as `engine.windows` nests them.

    Inputs: prediction (passes x B, S, Z, T, F); x and previous (B, ...), the sampler's latents and the clean
    ones of the step before; counter (), the number of the step; table (steps, columns), timesteps (steps,
    passes x B), draws (steps,), which of `noises` (draws, B, ...) a step adds; held, held_noise and free (B,
    ...), known latents, their noise and what is not known, of sizes that broadcast; scales and rescales (2,
    1, S, 1, 1, 1), the guidance of either condition by stem. Outputs: latents (passes x B, ...) and timestep
    (passes x B,), the UNet's next input; x_next, previous_next, counter_next.
    """
    g = _Nodes()
    row = g.add("Gather", "table", "counter", axis=0)
    column = dict(zip(COLUMNS, g.split(row, [f"row.{name}" for name in COLUMNS], 0), strict=True))

    def arranged(x: str, alpha: str, noise: str) -> str:
        held = g.add("Add", g.add("Mul", column[alpha], "held"), g.add("Mul", column[noise], "held_noise"))
        return g.add("Add", g.add("Mul", "free", x), held)

    seen = g.add("Mul", column["keep"], arranged("x", "alpha", "noise"))
    outputs = ["prediction"]
    if passes > 1:
        outputs = g.split("prediction", [f"prediction.{i}" for i in range(passes)], 0)
    clean = [g.add("Add", seen, g.add("Mul", column["take"], output)) for output in outputs]
    if passes == 4:
        clean = [_guided(g, *clean[:2], level=1), _guided(g, *clean[2:], level=1)]
    estimate = _guided(g, *clean, level=0) if passes > 1 else clean[0]
    g.add("Add", g.add("Mul", "free", estimate), "held", output="previous_next")

    fresh = g.add("Gather", "noises", g.add("Gather", "draws", "counter", axis=0), axis=0)
    terms = [
        g.add("Mul", column[name], value)
        for name, value in (
            ("x", "x"),
            ("clean", "previous_next"),
            ("previous", "previous"),
            ("fresh", fresh),
        )
    ]
    total = g.add("Add", g.add("Add", terms[0], terms[1]), terms[2])
    g.add("Add", total, terms[3], output="x_next")
    latents = arranged("x_next", "alpha_next", "noise_next")
    g.add("Concat", *[latents] * passes, axis=0, output="latents")
    g.add("Add", "counter", g.constant(np.array(1, np.int64)), output="counter_next")
    g.add("Gather", "timesteps", "counter", axis=0, output="timestep")
    return _model(g, passes)


def _guided(g: _Nodes, clean: str, base: str, *, level: int) -> str:
    """`engine.denoisers.guided`, by the scale and the rescale of this level."""
    at = g.constant(np.array(level, np.int64))
    scale, rescale = g.add("Gather", "scales", at, axis=0), g.add("Gather", "rescales", at, axis=0)
    pushed = g.add("Add", base, g.add("Mul", scale, g.add("Sub", clean, base)))
    mean, deviation, _ = _moments(g, clean)
    _, spread, centred = _moments(g, pushed)
    least = g.constant(np.array([LEAST_DEVIATION], np.float32))
    shrink = g.add("Div", deviation, g.add("Max", spread, least))
    shrink = g.add("Min", shrink, g.constant(np.array([1], np.float32)))
    like = g.add("Add", mean, g.add("Mul", shrink, centred))
    return g.add("Add", pushed, g.add("Mul", rescale, g.add("Sub", like, pushed)))


def _moments(g: _Nodes, x: str) -> tuple[str, str, str]:
    """Mean and deviation over time and frequency, and x without its mean."""
    axes = g.constant(np.array([3, 4], np.int64))
    mean = g.add("ReduceMean", x, axes, keepdims=1)
    centred = g.add("Sub", x, mean)
    variance = g.add("ReduceMean", g.add("Mul", centred, centred), axes, keepdims=1)
    return mean, g.add("Sqrt", variance), centred


def _model(g: _Nodes, passes: int) -> onnx.ModelProto:
    wide = ("PB", *LATENTS[1:])
    loose = tuple(f"{axis}_" for axis in LATENTS)  # these broadcast
    inputs = {
        "prediction": (FLOAT, wide),
        "x": (FLOAT, LATENTS),
        "previous": (FLOAT, LATENTS),
        "counter": (INT, ()),
        "table": (FLOAT, ("N", len(COLUMNS))),
        "timesteps": (INT, ("N", "PB")),
        "draws": (INT, ("N",)),
        "noises": (FLOAT, ("K", *(f"{axis}_noises" for axis in LATENTS))),
        "held": (FLOAT, loose),
        "held_noise": (FLOAT, loose),
        "free": (FLOAT, tuple(f"{axis}_free" for axis in LATENTS)),
    }
    if passes > 1:
        inputs |= dict.fromkeys(("scales", "rescales"), (FLOAT, (2, 1, "S", 1, 1, 1)))
    outputs = {
        "latents": (FLOAT, wide),
        "timestep": (INT, ("PB",)),
        "x_next": (FLOAT, LATENTS),
        "previous_next": (FLOAT, LATENTS),
        "counter_next": (INT, ()),
    }
    graph = helper.make_graph(
        g.nodes,
        f"step{passes}",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    for passes in PASSES:
        path = step_graph_path(passes)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(step_graph(passes).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
