"""The phases that a search begins with, guessed from how magnitudes lie beside each other.

Magnitudes are those of frames under Hann windows, each of which begins a quarter of its length after the one
before.
"""

from __future__ import annotations

import math

import torch
from torch import nn

FLATTEST = 0.5  # log magnitudes bend at least so much at a peak
SHARPNESS = 8.0  # power of the magnitudes that decides which peak a bin belongs to
QUIETEST = 1e-4  # magnitude under which nothing begins
STRUCK = 2.0  # rise of a log magnitude over two frames that is a stroke as likely as not
SUDDEN = 3.0  # how much surer a larger one is


def first_phases(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, F, bins) -> cosines and sines of phases: those of held tones, and of strokes where it rises."""
    held, struck, share = sustained(magnitude), strokes(magnitude), sudden(magnitude)
    # without whole turns, of which a large angle's cosine would lose more than it does elsewhere
    held, struck = (2 * math.pi * (turns - turns.floor()) for turns in (held, struck))
    return (
        held.cos() + share * (struck.cos() - held.cos()),
        held.sin() + share * (struck.sin() - held.sin()),
    )


def peaks_around(magnitude: torch.Tensor) -> torch.Tensor:
    """(N, F, bins) -> how many bins above each the peak that it belongs to is, which keeps all its digits.

    A parabola through three log magnitudes gives it for the bin itself. Instead of picking peaks, each takes
    what those within two of it say, weighed by a high power of their magnitudes: no rounding error can turn
    that over.
    """
    pad = nn.functional.pad
    level = pad((magnitude + 1e-7).log(), (2, 2), value=-16.0)
    count = magnitude.shape[-1]
    low, middle, high = level[..., 1 : count + 1], level[..., 2 : count + 2], level[..., 3 : count + 3]
    off = 0.5 * (high - low) / (2 * middle - low - high).clamp_min(FLATTEST)
    off = pad(off.clamp(-0.5, 0.5), (2, 2))
    around = [level[..., k : k + count] for k in range(5)]
    loudest = torch.stack(around).amax(0)
    weights = [(SHARPNESS * (a - loudest)).exp() for a in around]
    total = weights[0] * (off[..., :count] - 2)
    for k in range(1, 5):
        total = total + weights[k] * (off[..., k : k + count] + (k - 2))
    return total / (weights[0] + weights[1] + weights[2] + weights[3] + weights[4])


def sustained(magnitude: torch.Tensor) -> torch.Tensor:
    """(N, F, bins) -> phases in turns, after single pass spectrogram inversion (Beauregard and others 2015).

    Every peak is a sinusoid, and the bins around it turn with it, with alternating signs.
    """
    number = torch.arange(magnitude.shape[-1], device=magnitude.device, dtype=torch.float32)
    # whole turns are left out, so that long sounds lose no precision
    step = (peaks_around(magnitude) + number % 4) / 4
    return torch.cumsum(step - step.floor(), 1) + 0.5 * (number % 2)


def strokes(magnitude: torch.Tensor) -> torch.Tensor:
    """(N, F, bins) -> phases in turns of clicks, each where its magnitudes in neighbouring frames say.

    What happens x frames after the middle of one is under a window of cos(pi x / 4)^2 there, and of the same
    at x + 1 and x - 1 in the one before and the one after: half the logarithm of their ratio is
    2 artanh(tan(pi x / 4)). Phases fall by x / 4 of a turn from bin to bin then. Phase gradient heap
    integration (Prusa, Balazs and Sondergaard 2017) reads the same off Gaussian windows.
    """
    before, _, after = _neighbours(magnitude)
    late = 4 / math.pi * torch.atan(torch.tanh((after - before) / 4))
    number = torch.arange(magnitude.shape[-1], device=magnitude.device, dtype=torch.float32)
    return 0.5 * (number % 2) - torch.cumsum(late / 4, 2)


def sudden(magnitude: torch.Tensor) -> torch.Tensor:
    """(N, F, bins) -> how sure it is, 0 .. 1, that what a frame hears begins in it."""
    before, now, after = _neighbours(magnitude)
    earlier = torch.cat([before[:, :1], before[:, :-1]], 1)
    return torch.sigmoid(SUDDEN * (torch.maximum(after - before, now - earlier) - STRUCK))


def _neighbours(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log magnitudes of the frame before, of each and of the one after."""
    level = (magnitude + QUIETEST).log()
    return (
        torch.cat([level[:, :1], level[:, :-1]], 1),
        level,
        torch.cat([level[:, 1:], level[:, -1:]], 1),
    )
