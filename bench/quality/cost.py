"""What a bundle costs: time and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.quality.figures import Figure
from engine.model import Model
from training.evaluate import evaluate_speed

PART = "cost"
REAL_TIME_BAR, SIZE_BAR = 0.5, 60.0


def measure(model: Model) -> list[Figure]:
    """Real-time factor of 10 s of four stems in a process of its own, and the size in MB."""
    path = Path(model.bundle.folder)
    speed = evaluate_speed(path)
    factors = np.array(speed["ten_seconds_s"]) / 10
    spread = (float(factors.min()), float(factors.max()))
    note = (
        f"{speed['threads']} threads; load {speed['load_s']:.2f} s, peak memory {speed['peak_mb']:.0f} MB; "
        "the interval is the range"
    )
    real_time = Figure(
        PART,
        "10 s of four stems, real-time factor",
        float(np.median(factors)),
        spread,
        len(factors),
        bar=REAL_TIME_BAR,
        lower=True,
        note=note,
    )
    megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    return [real_time, Figure(PART, "bundle size", megabytes, None, 1, "MB", bar=SIZE_BAR, lower=True)]
