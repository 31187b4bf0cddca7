"""Options of `python -m benchmarks.conv`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Time the sparse convolutions of the SS-VAE."""

    out: Path = Path("runs/bench")
    """Directory that conv.json is written to."""

    peers: tuple[Literal["torch", "spconv", "spconv_triton", "flex_gemm"], ...] = (
        "torch",
        "spconv",
    )
    """Other implementations to time. All but torch must be importable, and their results are
    compared with ours. flex_gemm compiles and times many tiles of every layer, which takes
    minutes."""

    resolutions: tuple[int, ...] = (512, 1024)
    """Resolutions R whose layers are timed: 512, 1024 or both."""

    layers: tuple[int, ...] = tuple(range(12))
    """Numbers of the layers to time, from the encoder's first (0) to the decoder's last (11)."""
