"""Options of the commands that inspect a build: verify, report and estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.core.options import at_least, between, check_bounds
from pipeline.storage.config import PathOrUrl


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every shard of a finished build. The exit code is 1 if the format is broken."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]
    """Output directory of the build, or its URL."""

    workers: int = 1
    """Number of shards that are checked at the same time."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write DIR/report/index.html about a build, finished or not."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]
    """Output directory of the build, or its URL."""

    pictures: int = at_least(0, 24)
    """Number of assets on the contact sheet. 0 leaves the pictures out."""

    meshes: int = at_least(0, 100)
    """Number of assets with a 3D view. Each takes about 40 kB of the page, so some hundred are
    possible. 0 leaves the meshes out."""

    mesh_faces: int = between(100, 10_000, 2000)
    """Number of faces to which a mesh of the 3D view is simplified."""

    originals: Literal["local", "all", "none"] = "local"
    """Which original meshes are read from the sources for the 3D view. "local" takes those of
    folders, ShapeNet and procedural shapes, "all" also downloads assets again, "none" reads
    none."""

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Write a list of the finished assets of a build. `pipeline.build --ids` reads it."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]
    """Output directory of the build, or its URL."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("assets.csv")
    """File to write. Its extension is csv, json or parquet."""

    split: Literal["all", "train", "val"] = "all"
    """Split of the listed assets."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Estimate the cost of a large build from the measurements of a small one."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]
    """Output directory or URL of a finished build with the options of the large one."""

    assets: int = 1_000_000
    """Number of source assets of the large build."""

    keep: int = 452_000
    """Number of assets that screening keeps, if the build ranks its assets."""

    best: int = 68_000
    """Number of kept assets that get the additional resolutions of the last pass."""

    deadline_h: float = 168.0
    """Hours in which the large build must end."""

    cores_per_node: int = 64
    """CPU cores of one node of the cluster."""

    busy: float = 0.85
    """Share of its time that a core spends on assets, above 0 and at most 1."""

    start_s: float = 90.0
    """Seconds from the start of a worker to its first asset, for imports and compiled code."""

    core_hour_usd: float = 0.04
    """Price in dollars of one CPU core for an hour."""

    gpu_hour_usd: float = 2.5
    """Price in dollars of one GPU for an hour."""

    terabyte_month_usd: float = 23.0
    """Price in dollars of storing a terabyte for a month."""

    json: Path | None = None
    """File to which the numbers are also written as JSON."""

    def __post_init__(self):
        for name in ("assets", "keep", "best", "deadline_h", "cores_per_node"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.busy <= 1:
            raise ValueError(f"busy must be in (0, 1], got {self.busy}")
