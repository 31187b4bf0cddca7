"""`python -m benchmarks.estimate --out DIR`: what `pipeline.estimate` predicts from a tenth of a build, and what came.

A folder of procedural meshes is built whole, and before that a random tenth of it; the machine should have nothing
else to do.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError, UserError
from pipeline.inspection.config import EstimateConfig
from pipeline.inspection.cost_estimate import estimate_cost, measure_passes
from pipeline.sources.procedural import ProceduralSource
from train.engine.checkpoint import provenance

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.estimate"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Predict a build ten times as large, and build it."""

    out: Path  # a new folder: meshes, both builds, estimate.json
    assets: int = 240
    times: int = 10
    seed: int = 0  # of the choice of the small build's assets
    workers: int = os.cpu_count() or 1
    preset: str = "smoke"  # of pipeline.build

    def __post_init__(self) -> None:
        if self.times < 2 or self.assets < 2 * self.times:
            raise ValueError(
                f"assets must be at least 2 * times, times 2 or more, got {self.assets} and {self.times}"
            )


def build(cfg: Check, meshes: Path, out: Path) -> float:
    """Seconds of a whole `pipeline.build`. RunError if it fails."""
    options = [
        "--source",
        f"folder:{meshes}",
        "--preset",
        cfg.preset,
        "--workers",
        str(cfg.workers),
        "--out",
        str(out),
    ]
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.build", *options], check=False
    ).returncode
    if ended:
        raise RunError(f"pipeline.build into {out} ended with {ended}")
    return time.monotonic() - began


def check(cfg: Check) -> list[dict[str, float | str]]:
    """Rows of what was predicted and what was measured."""
    whole, part = cfg.out / "meshes", cfg.out / "sample"
    if whole.exists():
        raise UserError(f"{cfg.out} was used already: choose a new folder")
    paths = [
        ProceduralSource().materialize(record, whole)
        for record in ProceduralSource(count=cfg.assets).records()
    ]
    part.mkdir()
    for n in np.random.default_rng(cfg.seed).permutation(len(paths))[: len(paths) // cfg.times]:
        shutil.copy(paths[n], part)
    small, large = cfg.out / "small", cfg.out / "large"
    start_s = build(cfg, part, small) - _busy(
        small, cfg
    )  # of the machine, before and after its work on assets
    log.info("the small build: %.0f s beside its assets", start_s)
    options = EstimateConfig(
        directory=small,
        assets=cfg.assets,
        deadline_h=10_000,
        cores_per_node=cfg.workers,
        start_s=max(start_s, 0.0),
    )
    predicted = estimate_cost(measure_passes(small), options)
    wall = build(cfg, whole, large)
    (cost,) = measure_passes(large).values()
    shards = -(-cost.assets // cost.shard_size)
    pairs = {
        "core-hours": (predicted.core_hours, cost.assets * cost.seconds / 3600),
        "stored GB": (1000 * predicted.stored_tb, cost.assets * cost.stored_bytes / 1e9),
        "files": (predicted.files, shards * cost.files),
        "wall hours": (predicted.wall_hours, wall / 3600),
        "GB of a worker": (predicted.node_memory_gb / cfg.workers, cost.memory_bytes / 1e9),
    }
    return [
        {"what": name, "predicted": guess, "measured": found, "error": guess / found - 1}
        for name, (guess, found) in pairs.items()
    ]


def _busy(out: Path, cfg: Check) -> float:
    """Seconds in which all workers could have done what the assets of a build took, at the estimate's load."""
    (cost,) = measure_passes(out).values()
    return cost.assets * cost.seconds / cfg.workers / EstimateConfig.busy


def main(args: Sequence[str]) -> None:
    cfg = parse(Check, args, prog=PROG)
    rows = check(cfg)
    (cfg.out / "estimate.json").write_text(
        json.dumps({"rows": rows, **provenance()}, indent=1, default=str) + "\n"
    )
    log.info(
        "| %d assets from %d | predicted | measured | error |", cfg.assets, cfg.assets // cfg.times
    )
    log.info("|---|---|---|---|")
    for row in rows:
        log.info(
            "| %s | %.3g | %.3g | %+.0f%% |",
            row["what"],
            row["predicted"],
            row["measured"],
            100 * row["error"],
        )


if __name__ == "__main__":
    command(main)
