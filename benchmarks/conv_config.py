"""Options of `python -m benchmarks.conv`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Time the sparse convolutions of the SS-VAE."""

    out: Path = Path("runs/bench")
    """Directory that conv.json is written to."""

    peers: bool = True
    """Also time torch and spconv."""
