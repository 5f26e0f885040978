#!/usr/bin/env python3
"""Set Backline up and run it, with nothing but a Python: `python3 run.py demo`, `python3 run.py test`.

The first call makes .venv beside this file and installs Backline into it with the tested versions of
constraints.txt; later calls start at once, and install again when pyproject.toml or constraints.txt changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "backline-installed.json"
LOG = VENV / "install.log"
CONSTRAINTS = ROOT / "constraints.txt"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST = (3, 11)
DEFAULT_MARKERS = "not slow and not gpu"
USAGE = """\
python3 run.py demo [options]       the main job on the model that ships with it; leaves wavs and pictures
python3 run.py test [pytest args]   the tests, without arguments on all cores (slow and gpu ones only with -m)
python3 run.py lint                 ruff and mypy
python3 run.py backline COMMAND     any other command of Backline, set up in the same way"""


def main() -> int:
    if sys.version_info < OLDEST:
        return fail("Backline needs Python 3.11 or newer; this is {}.{}.".format(*sys.version_info))
    command, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("help", [])
    more = os.environ.get("BACKLINE_EXTRAS", "").split()  # of pyproject.toml, for the tests that want them
    # -P: a folder named engine or bridge where the user happens to be must not be imported
    backline = [str(PYTHON), "-P", "-m", "bridge.cli"]
    if command == "demo":
        return install([runtime()]) or start([*backline, "demo", *rest])
    if command == "backline":
        return install([runtime()]) or start([*backline, *rest])
    if command == "test":
        markers = [] if any(argument.startswith("-m") for argument in rest) else ["-m", DEFAULT_MARKERS]
        os.chdir(ROOT)
        return install([runtime(), "export", "dev", *more]) or start(
            [str(PYTHON), "-m", "pytest", *markers, *(rest or on_all_cores())]
        )
    if command == "lint":
        os.chdir(ROOT)
        return install([runtime(), "export", "dev", *more]) or lint()
    print(USAGE)
    return 0 if command in ("help", "-h", "--help") else 2


def on_all_cores() -> list[str]:
    """Pytest's arguments for a process per core, up to four, whose networks take one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]


def fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def runtime() -> str:
    """The extra that fits this machine: `gpu` where an NVIDIA driver lists a GPU, else `cpu`."""
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("nvidia-smi"):
        return "cpu"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def install(extras: list[str]) -> int:
    """Bring .venv to what pyproject.toml asks for with `extras`; returns 0, or 1 after saying why not."""
    wanted = {
        "root": str(ROOT),
        "files": hashlib.sha256(
            b"".join(p.read_bytes() for p in (ROOT / "pyproject.toml", CONSTRAINTS))
        ).hexdigest(),
        "runtime": extras[0],
    }
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stamp = {}
    try:
        if not PYTHON.exists() or stamp.get("root", str(ROOT)) != str(ROOT) or not has_pip():
            stamp = {}
            make_venv()
        same = all(stamp.get(key) == value for key, value in wanted.items())
        if same and set(extras) <= set(stamp["extras"]):
            return 0
        known = {*stamp.get("extras", []), *extras} - {"cpu", "gpu"}
        print(f"Installing Backline and what it needs into {VENV} (once; a minute or a few) ...")
        wanted["extras"] = [extras[0], *sorted(known)]
        STAMP.unlink(missing_ok=True)
        pip_install(extras[0], sorted(known))
        STAMP.write_text(json.dumps(wanted), encoding="utf-8")
    except OSError as error:
        return fail(f"Setting up {VENV} failed: {error}.")
    except SetupError as error:
        return fail(str(error))
    return 0


class SetupError(Exception):
    """Why the set-up stopped, as one sentence."""


def has_pip() -> bool:
    """Whether .venv works: a half-made one, or one whose Python was upgraded away, does not."""
    try:
        return subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise SetupError(
            f"This Python lacks venv: install the package {package} (Debian, Ubuntu: apt install {package}) "
            "and run the same command again."
        ) from None
    if VENV.exists():
        shutil.rmtree(VENV)
    venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(VENV)


def pip_install(runtime_extra: str, extras: list[str]) -> None:
    """Install Backline, editable, with one onnxruntime (both wheels hold the same module) and the extras."""
    other = "onnxruntime" if runtime_extra == "gpu" else "onnxruntime-gpu"
    has_other = subprocess.run([str(PYTHON), "-m", "pip", "show", other], capture_output=True).returncode == 0
    if has_other:
        pip(["uninstall", "-y", "onnxruntime", "onnxruntime-gpu"])
    # setuptools comes first, so that the build too uses the tested version and needs no isolation
    pip(["install", "-c", str(CONSTRAINTS), "setuptools"])
    spec = ".[{}]".format(",".join([runtime_extra, *extras]))
    try:
        pip(["install", "-c", str(CONSTRAINTS), "--no-build-isolation", "-e", spec])
    except SetupError:
        if runtime_extra == "cpu":
            raise
        print("onnxruntime for the GPU could not be installed; going on with the CPU.", file=sys.stderr)
        pip_install("cpu", extras)


def pip(arguments: list[str]) -> None:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    with LOG.open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "pip failed")
        raise SetupError(f"Installing the packages failed ({reason}); all of it is in {LOG}.")


def lint() -> int:
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    return max([subprocess.run([str(PYTHON), "-m", *check]).returncode for check in checks])


def start(command: list[str]) -> int:
    """Run `command` in place of this process (as a child on Windows, which has no exec)."""
    sys.stdout.flush()
    if os.name == "nt":
        return subprocess.run(command).returncode
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(fail("Stopped; run the same command again to go on."))
