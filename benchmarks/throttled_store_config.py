"""Options of `python -m benchmarks.throttled_store`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Serve the files below a folder as the objects of a bucket, slowly."""

    folder: tyro.conf.Positional[Path]
    """Directory of the files."""
    latency_ms: float = 100.0
    """Milliseconds before the first byte of each answer."""
    megabytes_per_s: float = 200.0
    """Bandwidth of all answers together, in megabytes per second."""

    def __post_init__(self) -> None:
        if self.latency_ms < 0:
            raise ValueError(f"latency_ms must be 0 or more, got {self.latency_ms}")
        if not self.megabytes_per_s > 0:
            raise ValueError(f"megabytes_per_s must be positive, got {self.megabytes_per_s}")
