"""The four stems, in the order of every array's stem axis."""

from __future__ import annotations

STEMS = ("bass", "drums", "guitar", "piano")
