"""python -m bench.memory: peak memory of splits by their length, and over many jobs of one process.

Each length is a process of its own that splits a file of noise as `backline split` does; the jobs are splits
of ten seconds in one process. Large arrays of the engine are mapped from files, which the system may take
back, so what it may not take (RssAnon) is told beside the resident set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe_machine

MINUTES = (1, 10, 30)
JOBS = 100
FLAT = 1.1  # times the memory of the first tenth, or of the shortest file, that still counts as flat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES)
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--rate", type=int, default=44100)
    parser.add_argument("--folder", type=Path, help="for some 4 GB of files; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for memory.json and memory.md")
    parser.add_argument("--part", choices=["split", "jobs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            run = split_once if args.part == "split" else many_jobs
            print(json.dumps(run(Path(folder), args)))
        return
    result = {
        "machine": describe_machine(),
        "splits": [_child("split", args, minutes=minutes) for minutes in args.minutes],
        "jobs": _child("jobs", args),
    }
    print(as_markdown(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "memory.md").write_text(as_markdown(result))


def split_once(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One file of noise, in stereo, through the command's own code; MiB before, at the peak, and how much."""
    minutes = args.minutes[0]
    mix = write_noise(folder / "mix.wav", minutes * 60, args.rate)
    before = resident()
    highest = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            highest[0] = max(highest[0], resident()["anonymous"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_split(mix, folder / "stems")
    finally:
        done.set()
        watcher.join()
    return {"minutes": minutes, "before": before["resident"], "peak_anonymous": highest[0], **resident()}


def many_jobs(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MiB of anonymous memory after each of many short jobs."""
    mix = write_noise(folder / "mix.wav", 10, args.rate)
    after = []
    for number in range(args.jobs):
        run_split(mix, folder / str(number))
        after.append(resident()["anonymous"])
    return {"jobs": args.jobs, "anonymous_after": after, **resident()}


def write_noise(path: Path, seconds: float, rate: int) -> Path:
    """Stereo noise at -20 dB, written in blocks."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    left = round(seconds * rate)
    with soundfile.SoundFile(path, "w", rate, 2, "FLOAT") as file:
        while left:
            block = min(left, 10 * rate)
            file.write(0.1 * rng.standard_normal((block, 2), np.float32))
            left -= block
    return path


def run_split(mix: Path, out: Path) -> None:
    """`backline split` in this process."""
    from bridge.cli import run

    arguments = ["split", str(mix), "--out", str(out), "--seed", "1", "--no-picture", "--device", "cpu"]
    if run(arguments):
        raise SystemExit("the split failed")


def resident() -> dict[str, float]:
    """MiB: the peak of this process, what it holds now, and of that what is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    named = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: round(int(values[key]) / 1024, 1) for name, key in named.items()}


def as_markdown(result: dict[str, Any]) -> str:
    """The report: a row a length, and the jobs."""
    splits, jobs = result["splits"], result["jobs"]
    lines = [
        "# Memory",
        "",
        "| a split of | before | peak resident | of it anonymous |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['minutes']:g} min | {row['before']:.0f} MiB | {row['peak']:.0f} MiB "
        f"| {row['peak_anonymous']:.0f} MiB |"
        for row in splits
    ]
    grown = splits[-1]["peak"] / splits[0]["peak"]
    after = jobs["anonymous_after"]
    tenth = max(1, len(after) // 10)
    first, last = median(after[:tenth]), median(after[-tenth:])
    ratio = last / first
    lines += [
        "",
        f"The longest takes {grown:.2f} times the memory of the shortest: {_verdict(grown)}.",
        f"{jobs['jobs']} jobs of ten seconds in one process: {first:.0f} MiB after the first {tenth}, "
        f"{last:.0f} MiB after the last {tenth} (medians; {max(after):.0f} at most): {_verdict(ratio)}.",
    ]
    return "\n".join([*lines, ""])


def _verdict(ratio: float) -> str:
    return "flat" if ratio <= FLAT else "not flat"


def _child(part: str, args: argparse.Namespace, minutes: float = 0.0) -> Any:
    command = [sys.executable, "-m", "bench.memory", "--part", part, "--rate", str(args.rate)]
    command += ["--minutes", str(minutes), "--jobs", str(args.jobs)]
    command += ["--folder", str(args.folder)] if args.folder else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
