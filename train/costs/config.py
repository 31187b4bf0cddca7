"""Options of `python -m train.estimate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipeline.core.options import at_least, check_bounds
from pipeline.storage.config import PathOrUrl

GpuName = Literal["a100", "h100", "h200"]


@dataclass(frozen=True, kw_only=True)
class EstimateTraining:
    """Estimate time, cost and data of the paper's training from short measured runs.

    Raises:
        ValueError: If there is no run or a number is out of range.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of short runs, such as 50 steps of `python -m train.dit --preset 256`. Each stage
    of the schedule is estimated from the run that is most like it."""
    measured_on: GpuName | None = None
    """GPU that the runs were measured on. None takes what their checkpoints say."""
    steps: int | None = at_least(1, None)
    """Also predict how long the first run would take with this number of steps."""
    data: PathOrUrl | None = None
    """Directory or URL of a build, whose bytes per asset are taken. None takes those of the
    documentation."""
    gpus: int = at_least(1, 8)
    """Number of GPUs of the real runs."""
    gpus_per_node: int = at_least(1, 8)
    """Number of GPUs of a node. The ranks of a node share a cache."""
    assets: int = at_least(1, 452_000)
    """Number of assets, by default those of the paper."""
    best: int = at_least(0, 68_000)
    """Number of the assets that have bricks at R = 1024, by default those of the paper."""
    views: int = at_least(1, 45)
    """Number of renders of each asset."""
    cache_gb: float = at_least(0, 50.0)
    """Size of the cache of a node in gigabytes, as `--cache.max-gb`."""
    scaling: float = 0.95
    """Share of the speed of one GPU that each GPU keeps in the real run. Runs that were measured on
    several GPUs are not corrected."""
    warmup_share: float = 0.2
    """Share of the steps of a run, the first ones, that are left out: they compile and tune."""
    a100_usd: float = at_least(0, 1.8)
    """Price in dollars of an A100 for an hour."""
    h100_usd: float = at_least(0, 2.9)
    """Price in dollars of an H100 for an hour."""
    h200_usd: float = at_least(0, 3.5)
    """Price in dollars of an H200 for an hour."""
    json: Path | None = None
    """File to which the numbers are also written as JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, got none")
        check_bounds(self)
        for name in ("scaling", "warmup_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if not self.scaling:
            raise ValueError("scaling must be positive, got 0")
