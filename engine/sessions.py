"""How onnxruntime is started: which options for which graph on which device, and a look at where nodes really
run.

What is asked for is decided by functions that start nothing, so that the choices for a GPU are tested without
one.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BacklineError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Nodes that onnxruntime puts on the CPU on purpose, beside a GPU: they reckon with shapes.
SHAPE_OPS = {
    *("Shape", "Size", "Gather", "Concat", "Slice", "Split", "Unsqueeze", "Squeeze", "Reshape", "Expand"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Floor", "Ceil", "Min", "Max", "ReduceProd", "Range", "Cast"),
    *("Constant", "ConstantOfShape", "Identity", "Equal", "Greater", "Less", "Where"),
}
_arenas: set[str] = set()  # providers that have their arena, which all sessions share
_arenas_lock = threading.Lock()


@dataclass(frozen=True)
class Options:
    """What a session is started with. config: onnxruntime's session configuration entries."""

    threads: int
    config: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[tuple[str, Mapping[str, str]], ...] = ((CPU, {}),)


def options_for(graph: str, provider: str, threads: int, *, cuda_graph: bool = False) -> Options:
    """The options that measured fastest on the CPU, and what onnxruntime's documentation advises for CUDA.

    graph: unet, a step graph (step1, ...), vae_encoder, ... cuda_graph: record the UNet's kernels once and
    replay them; onnxruntime refuses a session of which a node is not on the GPU.
    """
    # One arena of the process instead of one a session: what the UNet gives back the decoder takes.
    config = {"session.use_env_allocators": "1", "session.record_ep_graph_assignment_info": "1"}
    # A step's few nodes are over before a second thread is awake, and its pool would spin beside the UNet's.
    threads = 1 if graph.startswith("step") else threads
    if provider != CUDA:
        return Options(threads, config)
    frequent = graph in ("unet", "vae_decoder", "vocoder")
    cuda = {
        # Searched once per shape and process; the UNet and the decoders each run at one shape, many times.
        "cudnn_conv_algo_search": "EXHAUSTIVE" if frequent else "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        "cudnn_conv1d_pad_to_nc1d": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
        # 10 bits of mantissa would be heard in the vocoder's phases and shift the sampler's state.
        "use_tf32": "1" if graph in ("unet", "vae_decoder") else "0",
        "enable_cuda_graph": "1" if cuda_graph and graph == "unet" else "0",
    }
    return Options(threads, config, ((CUDA, cuda), (CPU, {})))


def run_config(provider: str, *, graph: int | None = None, shrink: bool = False) -> dict[str, str]:
    """Run configuration entries. graph: the number of the CUDA graph, None for none. shrink: give the arenas'
    free memory back to the system when this run is over."""
    config = {}
    if provider == CUDA:
        config["gpu_graph_id"] = "-1" if graph is None else str(graph)
    if shrink:
        config["memory.enable_memory_arena_shrinkage"] = "cpu:0;gpu:0" if provider == CUDA else "cpu:0"
    return config


def start(path: Path | str, options: Options) -> Any:
    """An InferenceSession. Raises BacklineError where onnxruntime cannot open the graph."""
    onnxruntime = import_onnxruntime()
    wanted = options.providers[0][0]
    if wanted == CUDA:
        preload_cuda(onnxruntime)
    _share_arena(onnxruntime)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.log_severity_level = 3
    for key, value in options.config.items():
        session_options.add_session_config_entry(key, value)
    providers = [(name, dict(values)) if values else name for name, values in options.providers]
    try:
        return onnxruntime.InferenceSession(str(path), session_options, providers=providers)
    except Exception as error:  # onnxruntime's own classes share no public base
        raise BacklineError(f"onnxruntime cannot open {path}: {first_line(error)}") from error


def nodes_by_provider(session: Any) -> dict[str, Counter[str]]:
    """Provider -> how often each operator was given to it; empty where this onnxruntime does not tell."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    found: dict[str, Counter[str]] = {}
    if ask is None:
        return found
    with contextlib.suppress(Exception):  # not recorded
        for part in ask():
            operators = [node.op_type for node in part.get_nodes()]
            found.setdefault(part.ep_name, Counter()).update(operators)
    return found


def left_on_cpu(nodes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Operators of a session on the GPU that compute on the CPU all the same, most frequent first."""
    operators = Counter(dict(nodes.get(CPU, {})))
    return [name for name, _ in operators.most_common() if name not in SHAPE_OPS]


def preload_cuda(onnxruntime: Any) -> None:
    """CUDA's libraries where pip puts them, which the system's loader does not search."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError, OSError):
            preload()


def import_onnxruntime() -> Any:
    """The module. Raises BacklineError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BacklineError(
            "onnxruntime is not installed: install Backline with the extra 'cpu' or 'gpu'."
        ) from error
    onnxruntime.set_default_logger_severity(4)  # a provider that fails to load is reported in our own words
    return onnxruntime


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _share_arena(onnxruntime: Any) -> None:
    """One arena on the CPU for all sessions of the process, which grows by what is asked for."""
    with _arenas_lock:
        if CPU in _arenas:
            return
        _arenas.add(CPU)
        memory = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        # Largest size (0: no limit), growth (1: as requested), first chunk and largest dead part (-1:
        # default).
        arena = onnxruntime.OrtArenaCfg(0, 1, -1, -1)
        with contextlib.suppress(Exception):  # another library in this process has made one
            onnxruntime.create_and_register_allocator(memory, arena)
