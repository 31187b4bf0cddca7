"""`python -m benchmarks.estimate --out DIR`: compare `pipeline.estimate` with a real build.

A tenth of a set of procedural meshes is built and measured, then the whole set is built and
compared with the prediction. Nothing else should run on the machine.
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
class EstimateBenchmark:
    """Predict the cost of a large build from a small one, then run the large build and compare."""

    out: Path
    """New directory for the meshes, both builds and estimate.json."""

    assets: int = 240
    """Number of assets of the large build."""

    times: int = 10
    """How many times more assets the large build has than the small one. At least 2."""

    seed: int = 0
    """Seed for choosing the assets of the small build."""

    workers: int = os.cpu_count() or 1
    """Number of assets processed at the same time in both builds."""

    preset: str = "smoke"
    """Preset of `pipeline.build` for both builds."""

    def __post_init__(self) -> None:
        if self.times < 2 or self.assets < 2 * self.times:
            raise ValueError(
                "times must be 2 or more and assets at least 2 * times, "
                f"got times {self.times} and assets {self.assets}"
            )


def timed_build(cfg: EstimateBenchmark, meshes: Path, out: Path) -> float:
    """Run `pipeline.build` on a directory of meshes and return its wall time in seconds.

    Raises:
        RunError: If the build fails.
    """
    options = {
        "--source": f"folder:{meshes}",
        "--preset": cfg.preset,
        "--workers": str(cfg.workers),
        "--out": str(out),
    }
    words = [word for option in options.items() for word in option]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipeline.build", *words], check=False)
    if done.returncode:
        raise RunError(f"pipeline.build into {out} failed with exit code {done.returncode}")
    return time.monotonic() - started


def compare(cfg: EstimateBenchmark) -> list[dict[str, float | str]]:
    """Run both builds and return one row per quantity: prediction, measurement, relative error.

    Raises:
        UserError: If the output directory was used before.
        RunError: If a build fails.
    """
    all_meshes = cfg.out / "meshes"
    sampled_meshes = cfg.out / "sample"
    if all_meshes.exists():
        raise UserError(f"{cfg.out} was used before; choose a new directory")
    paths = [
        ProceduralSource().materialize(record, all_meshes)
        for record in ProceduralSource(count=cfg.assets).records()
    ]
    sampled_meshes.mkdir()
    order = np.random.default_rng(cfg.seed).permutation(len(paths))
    for number in order[: len(paths) // cfg.times]:
        shutil.copy(paths[number], sampled_meshes)
    # The small build: what it takes beside the work on its assets is the start of the machine.
    small = cfg.out / "small"
    start_s = timed_build(cfg, sampled_meshes, small) - _asset_seconds(small, cfg)
    log.info("The small build took %.0f s beside the work on its assets.", start_s)
    options = EstimateConfig(
        directory=small,
        assets=cfg.assets,
        deadline_h=10_000,
        cores_per_node=cfg.workers,
        start_s=max(start_s, 0.0),
    )
    estimate = estimate_cost(measure_passes(small), options)
    # The large build.
    large = cfg.out / "large"
    wall_s = timed_build(cfg, all_meshes, large)
    (cost,) = measure_passes(large).values()
    shards = -(-cost.assets // cost.shard_size)
    pairs = {
        "core-hours": (estimate.core_hours, cost.assets * cost.seconds / 3600),
        "stored GB": (1000 * estimate.stored_tb, cost.assets * cost.stored_bytes / 1e9),
        "files": (estimate.files, shards * cost.files),
        "wall hours": (estimate.wall_hours, wall_s / 3600),
        "GB of a worker": (estimate.node_memory_gb / cfg.workers, cost.memory_bytes / 1e9),
    }
    return [
        {"what": name, "predicted": predicted, "measured": value, "error": predicted / value - 1}
        for name, (predicted, value) in pairs.items()
    ]


def _asset_seconds(out: Path, cfg: EstimateBenchmark) -> float:
    """Return the wall time that all workers need for the assets of a build.

    The workers are busy for the share of time that `pipeline.estimate` assumes.
    """
    (cost,) = measure_passes(out).values()
    return cost.assets * cost.seconds / cfg.workers / EstimateConfig.busy


def main(args: Sequence[str]) -> None:
    """Parse the options, run both builds, write estimate.json and log a table."""
    cfg = parse(EstimateBenchmark, args, prog=PROG)
    rows = compare(cfg)
    (cfg.out / "estimate.json").write_text(
        json.dumps({"rows": rows, **provenance()}, indent=1, default=str) + "\n", encoding="utf-8"
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
