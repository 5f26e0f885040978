"""Who may import what: the rooms of docs/architecture.md, held by reading every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELPERS = {"numpy", "typer", "rich", "pydantic", "yaml", "platformdirs", "tokenizers"}
SOUND = {"soundfile", "soxr"}

# What each room's code may import beside the standard library and itself, wherever the statement stands.
ALLOWED = {
    "engine": HELPERS | SOUND | {"onnxruntime"},
    "plugin_host": HELPERS | SOUND | {"engine", "filelock", "pedalboard", "pythonosc"},
    "bridge": HELPERS | SOUND | {"engine", "plugin_host", "pythonosc", "matplotlib", "onnxruntime"},
}
FORBIDDEN = {"export": {"bridge", "plugin_host", "training"}, "training": {"bridge", "plugin_host"}}
LATE = {"export", "training", "bench"}  # only in COMMANDS, inside the command that needs them
COMMANDS = ("commands.py", "bench_commands.py")


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names of all modules that are imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def late_imports(tree: ast.AST) -> set[str]:
    """Those inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for name in imports(function)}


def early_imports(tree: ast.Module) -> set[str]:
    """Those that run when the module is imported: outside functions, and not for type checkers only."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(imports(node))
        waiting.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_producers_room_imports_only_what_its_install_has(room: str) -> None:
    assert sources(room)
    for path in sources(room):
        tree = ast.parse(path.read_text("utf-8"))
        allowed = ALLOWED[room] | {room} | set(sys.stdlib_module_names)
        commands = path.parent == ROOT / "bridge" and path.name in COMMANDS
        excused = LATE & late_imports(tree) if commands else set()
        assert set(imports(tree)) - allowed - excused == set(), path
        assert not LATE & early_imports(tree), path


@pytest.mark.parametrize("room", FORBIDDEN)
def test_the_workshop_does_not_reach_into_the_daemon(room: str) -> None:
    assert sources(room)
    for path in sources(room):
        assert not set(imports(ast.parse(path.read_text("utf-8")))) & FORBIDDEN[room], path


def test_the_reader_of_imports_sees_them_all() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx\n"
        "try:\n    import soxr\nexcept ImportError:\n    pass\ndef f():\n    from bridge.cli import main\n"
    )
    assert set(imports(tree)) == {"torch", "typing", "onnx", "soxr", "bridge"}
    assert early_imports(tree) == {"torch", "typing", "soxr"}
    assert late_imports(tree) == {"bridge"}


def test_the_command_starts_without_torch_and_onnxruntime() -> None:
    code = "import bridge.commands, sys; print([m for m in ('torch', 'onnxruntime') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
