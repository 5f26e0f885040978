"""torch module -> one ONNX graph, checked against torch before anyone can load it.

The graph comes from torch's tracing exporter: on the networks here it is twenty times faster than the
dynamo one, and onnxruntime runs its graphs a little faster. What tracing can silently get wrong is a size
baked in as a constant, so every graph is compared with the module at two or more sizes of its dynamic axes.

Weights are attached here rather than by the exporter: that keeps one code path for a 1 MB and a 3 GB
network, lets them be stored in float16, and writes external data as a single file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.errors import BacklineError

OPSET = 20
INLINE_LIMIT = 500_000_000  # bytes of weights; past 2 GB one protobuf message cannot hold them
Precision = Literal["fp32", "fp16", "fp16-compute", "int8"]
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "fp16-compute": 2e-2, "int8": 0.2}
# What a GPU's matrix units do in half precision; norms, softmax, sums and everything between stay in float32.
HALF_COMPUTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MultiHeadAttention")
_EXTERNAL_ALIGNMENT = 4096  # lets onnxruntime map the weights instead of reading them

Shape = tuple[int | str, ...]
Feed = Callable[[tuple[int, ...], np.random.Generator], NDArray[np.float32]]


@dataclass(frozen=True)
class Input:
    """One graph input. A string in `shape` names a dynamic axis, the same name in two inputs one size.

    `high` bounds the random int64 values (0 .. high - 1) that the check feeds, for step numbers and tokens.
    A "mask" (B, L) is int64 too: ones up to each row's length, at least one, then zeros. A "magnitude" is a
    float32 that is never below zero. `feed` draws values of a shape where noise could be no such input.
    """

    name: str
    shape: Shape
    dtype: Literal["float32", "int64", "mask", "magnitude"] = "float32"
    high: int = 1000
    feed: Feed | None = None


class ExportMismatch(BacklineError):
    """The written graph does not compute what the torch module computes."""


def write_graph(
    module: torch.nn.Module,
    inputs: Sequence[Input],
    outputs: Mapping[str, Shape],
    path: Path,
    *,
    sizes: Sequence[Mapping[str, int]],
    precision: Precision = "fp32",
    tolerance: float | None = None,
    external: bool | None = None,
    seed: int = 0,
) -> float:
    """Write `module`, called with the inputs in order, as the ONNX file `path`; return its worst error.

    `sizes` gives values for every dynamic axis of the inputs, two different sets or more: the module is
    traced at the first and compared at each, max|onnx - torch| / max|torch| per output. `precision`: fp16
    stores matrices and kernels in float16 with a cast to float32 in the graph, which onnxruntime folds away
    when it loads. fp16-compute besides casts what goes into convolutions, matrix products and attention to
    float16 and their results back, for a GPU; a CPU computes the same slower. int8 is fp16 with the matrices
    in 8 bits, see `quantise`. `external` puts the weights in one file `path`.data; None: when they pass
    0.5 GB, because onnxruntime maps such a file and copies a large message several times. `outputs` gives the
    shape of each output; its dynamic axes may have names that no input has.

    Raises ExportMismatch past `tolerance` (default: TOLERANCE) or when an output's shape is not the declared
    one, and ValueError for sizes that cannot prove the dynamic axes. The file is removed then.
    """
    _check_sizes(inputs, sizes)
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    path = Path(path)
    _data_path(path).unlink(missing_ok=True)  # an earlier graph's
    rng = np.random.default_rng(seed)
    feeds = [_random_feed(inputs, size, rng) for size in sizes]
    try:
        with _evaluating(module):
            graph = _trace(module, inputs, outputs, feeds[0], path)
            if precision == "fp16-compute":
                compute_in_half(graph)
            _attach_weights(graph, module, path, half=precision != "fp32", external=external)
            if precision == "int8":
                quantise(path)
            onnx.checker.check_model(str(path))
            return compare(module, path, feeds, outputs, sizes, limit)
    except BaseException:
        path.unlink(missing_ok=True)
        _data_path(path).unlink(missing_ok=True)
        raise


def compare(
    module: torch.nn.Module,
    path: Path,
    feeds: Sequence[Mapping[str, NDArray[np.generic]]],
    outputs: Mapping[str, Shape],
    sizes: Sequence[Mapping[str, int]],
    limit: float,
) -> float:
    """Worst max|onnx - torch| / max|torch| over feeds and outputs. Raises ExportMismatch past `limit`."""
    session = ort.InferenceSession(str(path), _session_options(), providers=["CPUExecutionProvider"])
    worst = 0.0
    for feed, size in zip(feeds, sizes, strict=True):
        expected = _run_torch(module, feed)
        try:
            written = session.run(list(outputs), dict(feed))
        except Exception as failure:  # onnxruntime's exceptions share no base class
            raise ExportMismatch(f"{path.name} at {dict(size)} does not run: {failure}") from failure
        for (name, shape), a, b in zip(outputs.items(), written, expected, strict=True):
            where = f"{path.name}: output {name!r} at {dict(size)}"
            _check_shape(where, np.asarray(a).shape, b.shape, shape, size)
            error = relative_error(np.asarray(a), b)
            if not error <= limit:
                raise ExportMismatch(f"{where} differs from torch by {error:.2e}, more than {limit:.0e}")
            worst = max(worst, error)
    return worst


def relative_error(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """max|a - b| / max|b|; infinite where either is not finite, or b is all zeros and a is not."""
    difference = float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0.0))
    scale = float(np.max(np.abs(np.asarray(b, np.float64)), initial=0.0))
    if difference == 0.0:
        return 0.0
    ratio = difference / scale if scale > 0 else np.inf
    return ratio if np.isfinite(ratio) else np.inf


def _check_sizes(inputs: Sequence[Input], sizes: Sequence[Mapping[str, int]]) -> None:
    axes = {axis for item in inputs for axis in item.shape if isinstance(axis, str)}
    for size in sizes:
        if missing := axes - set(size):
            raise ValueError(f"sizes lack the axes {sorted(missing)}")
    fixed = [axis for axis in sorted(axes) if len({size[axis] for size in sizes}) < 2]
    if not sizes or fixed:
        raise ValueError(f"dynamic axes {fixed} need two different sizes to be checked at")


def _random_feed(
    inputs: Sequence[Input], size: Mapping[str, int], rng: np.random.Generator
) -> dict[str, NDArray[np.generic]]:
    feed: dict[str, NDArray[np.generic]] = {}
    for item in inputs:
        shape = _resolve(item.shape, size)
        if item.feed is not None:
            feed[item.name] = item.feed(shape, rng)
        elif item.dtype == "mask":
            lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
            feed[item.name] = (np.arange(shape[-1]) < lengths[..., None]).astype(np.int64)
        elif item.dtype == "int64":
            feed[item.name] = rng.integers(0, item.high, shape, dtype=np.int64)
        else:
            normal = rng.standard_normal(shape, dtype=np.float32)
            feed[item.name] = np.abs(normal) if item.dtype == "magnitude" else normal
    return feed


def _resolve(shape: Shape, size: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size[axis] if isinstance(axis, str) else axis for axis in shape)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def _trace(
    module: torch.nn.Module,
    inputs: Sequence[Input],
    outputs: Mapping[str, Shape],
    feed: Mapping[str, NDArray[np.generic]],
    path: Path,
) -> onnx.ModelProto:
    """The graph with its weights left out: they appear as extra graph inputs named as in the state dict."""
    declared = {item.name: item.shape for item in inputs} | dict(outputs)
    axes = {
        name: {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}
        for name, shape in declared.items()
    }
    device = _device(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(np.asarray(feed[item.name])).to(device) for item in inputs),
            str(path),
            dynamo=False,
            input_names=[item.name for item in inputs],
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            export_params=False,
            do_constant_folding=False,  # folding renames weights; onnxruntime folds when it loads
        )
    graph = onnx.load(str(path))
    _merge_constants(graph)
    return graph


def _merge_constants(model: onnx.ModelProto) -> None:
    """One node of each constant, in place, and none that unsqueezes one: a traced slice brings nine nodes."""
    values: dict[str, NDArray[np.generic]] = {}
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        value = _constant(node, values)
        if value is None:
            nodes.append(node)
            continue
        name = node.output[0]
        key = (value.dtype.str, value.shape, value.tobytes())
        renamed[name] = first.setdefault(key, name)
        if renamed[name] == name:
            values[name] = value
            nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
    used = {name for node in nodes for name in node.input} | {item.name for item in model.graph.output}
    kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _constant(node: onnx.NodeProto, values: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic] | None:
    """What a node makes where that is a tensor written in it, or such a one, of `values`, unsqueezed."""
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        return numpy_helper.to_array(node.attribute[0].t)
    if node.op_type == "Unsqueeze" and all(name in values for name in node.input):
        return np.expand_dims(values[node.input[0]], tuple(values[node.input[1]].tolist()))
    return None


def compute_in_half(model: onnx.ModelProto) -> None:
    """Puts float16 casts around every node of HALF_COMPUTED, in place; the graph's own types stay."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type not in HALF_COMPUTED:
            nodes.append(node)
            continue
        given, made = list(node.input), node.output[0]
        label = f"{made}.half"
        for i, name in enumerate(given):
            if name:  # an optional input may be left out
                node.input[i] = f"{label}.{i}"
                nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT16))
        node.output[0] = label
        nodes += [node, helper.make_node("Cast", [label], [made], to=TensorProto.FLOAT)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantise(path: Path) -> None:
    """The matrices of the graph at `path` in 8 bits, a scale per column; replaces the file(s).

    What is multiplied with them gets its 8 bits and scale at run time, so nothing has to be calibrated. It
    pays on processors with 8-bit dot products (VNNI); convolutions stay as they are, onnxruntime's in 8 bits
    being slower than its float ones. The matrices use 7 of the 8 bits: without VNNI products are added in
    pairs of 16 bits, which 8 overflow, and a bundle has to be right on every machine.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(str(path))
    apart = _data_path(path).exists()
    path.unlink()
    _data_path(path).unlink(missing_ok=True)
    _fold_matrices(model)
    add_pre_process_metadata(model)  # else it advises to do what has just been done
    quantize_dynamic(
        model,
        str(path),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        use_external_data_format=apart,
    )


def _fold_matrices(model: onnx.ModelProto) -> None:
    """Casts and transposes of weights before a product, in place: quantize_dynamic looks for constants."""
    stored = {item.name: item for item in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    made = {node.output[0]: node for node in model.graph.node}
    folded: dict[str, NDArray[np.generic]] = {}
    for name in {node.input[1] for node in products}:
        chain, source = [], name
        while source in made and made[source].op_type in ("Cast", "Transpose"):
            chain.append(made[source])
            source = made[source].input[0]
        if chain and source in stored:
            array = numpy_helper.to_array(stored[source])
            for node in reversed(chain):
                array = array.astype(np.float32) if node.op_type == "Cast" else array.transpose()
            folded[name] = np.ascontiguousarray(array)
    nodes = [node for node in model.graph.node if node.output[0] not in folded]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in folded.items())
    _drop_unread(model)


def _drop_unread(model: onnx.ModelProto) -> None:
    """Removes nodes and weights that nothing reads any more, in place."""
    graph = model.graph
    read = {item.name for item in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read & set(node.output):
            nodes.append(node)
            read |= set(node.input)
    kept = [item for item in graph.initializer if item.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(kept)


def _attach_weights(
    model: onnx.ModelProto, module: torch.nn.Module, path: Path, *, half: bool, external: bool | None
) -> None:
    """Turn the weight inputs of `model` into initializers and write the file(s)."""
    state = module.state_dict()
    weights = [item.name for item in model.graph.input if item.name in state]
    kept = [item for item in model.graph.input if item.name not in state]
    del model.graph.input[:]
    model.graph.input.extend(kept)

    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}  # tables stay exact
    halved = {name for name in weights if half and name in trained and _survives_half(state[name])}
    casts = [
        helper.make_node("Cast", [f"{name}.float16"], [name], name=f"cast/{name}", to=TensorProto.FLOAT)
        for name in sorted(halved)
    ]
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)

    total = sum(
        state[name].numel() * (2 if name in halved else state[name].element_size()) for name in weights
    )
    apart = external if external is not None else total > INLINE_LIMIT
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(_data_path(path).open("wb")) if apart else None
        for name in weights:
            array = state[name].detach().cpu().contiguous().numpy()
            stored = array.astype(np.float16) if name in halved else array
            tensor = (
                numpy_helper.from_array(np.empty(0, stored.dtype))
                if data
                else numpy_helper.from_array(stored)
            )
            tensor.name = f"{name}.float16" if name in halved else name
            if data:
                _store_outside(tensor, stored, data, _data_path(path).name)
            model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


def _store_outside(tensor: TensorProto, array: NDArray[np.generic], data: BinaryIO, location: str) -> None:
    data.write(b"\0" * (-data.tell() % _EXTERNAL_ALIGNMENT))
    offset = data.tell()
    array.tofile(data)
    tensor.dims[:] = array.shape
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def _survives_half(weight: torch.Tensor) -> bool:
    """Kernels and matrices are halved; biases and norms are few and matter more; float16 ends at 65504."""
    return weight.dtype == torch.float32 and weight.dim() >= 2 and float(weight.abs().max()) < 6e4


def _run_torch(module: torch.nn.Module, feed: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    device = _device(module)
    result = module(*(torch.from_numpy(np.asarray(value)).to(device) for value in feed.values()))
    tensors = result if isinstance(result, tuple | list) else (result,)
    return [tensor.cpu().numpy() for tensor in tensors]


def _check_shape(
    where: str,
    written: tuple[int, ...],
    torch_shape: tuple[int, ...],
    declared: Shape,
    size: Mapping[str, int],
) -> None:
    expected = tuple(size.get(axis) if isinstance(axis, str) else axis for axis in declared)
    fits = len(expected) == len(written) and all(
        want is None or want == got for want, got in zip(expected, written, strict=True)
    )
    if written != torch_shape or not fits:
        raise ExportMismatch(
            f"{where} has shape {written}, torch gives {torch_shape}, declared is {declared}"
        )


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are raised
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _device(module: torch.nn.Module) -> torch.device:
    weight = next(iter(module.state_dict().values()), None)
    return weight.device if weight is not None else torch.device("cpu")


def _data_path(path: Path) -> Path:
    return path.with_name(path.name + ".data")
