"""`python -m benchmarks.sdf_cost`: CPU seconds of topology and bricks of mesh files.

The work runs in one thread. The digests tell whether two commits give equal results: run the
command on both.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.sdf import markdown_table
from pipeline.core.cli import command, parse
from pipeline.core.grid import check_resolution
from pipeline.core.schema import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SdfCostBenchmark:
    """Measure CPU seconds of the topology and the bricks of mesh files."""

    meshes: tuple[Path, ...]
    """Mesh files to measure."""

    resolution: int = 512
    """Grid points along one side, of the topology and of the bricks."""

    repeats: int = 2
    """Number of times that each file is measured in one process. The least time counts, because
    other work on the machine only adds to it."""

    def __post_init__(self):
        check_resolution(self.resolution)
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        missing = [str(path) for path in self.meshes if not path.is_file()]
        if missing or not self.meshes:
            raise ValueError(f"meshes must be files, got {missing[0] if missing else 'none'}")


def measure(cfg: SdfCostBenchmark) -> Iterator[dict[str, Any]]:
    """Yield one row per file."""
    from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
    from pipeline.mesh_io.load import load
    from pipeline.mesh_io.normalize import normalize
    from pipeline.orchestration.asset_stages import warm_up

    warm_up()
    for path in cfg.meshes:
        mesh = normalize(load(path, LoadConfig()), NormalizeConfig())
        runs = [measure_once(mesh, cfg.resolution) for _ in range(cfg.repeats)]
        topology_s = min(run["topology_s"] for run in runs)
        bricks_s = min(run["bricks_s"] for run in runs)
        yield {
            "mesh": path.name,
            "R": cfg.resolution,
            "faces": len(mesh.faces),
            "pieces": runs[0]["pieces"],
            "topology": f"{topology_s:.2f}",
            "bricks": f"{bricks_s:.2f}",
            "sum": f"{topology_s + bricks_s:.2f}",
            "topology digest": runs[0]["topology_digest"],
            "bricks digest": runs[0]["bricks_digest"],
        }


def measure_once(mesh: Mesh, resolution: int) -> dict[str, Any]:
    """Return CPU seconds, number of pieces and digests of one normalised mesh."""
    from pipeline.geometry.config import TopologyConfig
    from pipeline.geometry.sdf import compute_bricks
    from pipeline.geometry.topology import build_topology

    start = time.process_time()
    topology = build_topology(mesh, TopologyConfig(resolution=resolution))
    middle = time.process_time()
    bricks = compute_bricks(topology, resolution)
    end = time.process_time()
    flood = topology.flood
    return {
        "topology_s": middle - start,
        "bricks_s": end - middle,
        "pieces": len(topology.triangles),
        "topology_digest": digest(
            *(topology.triangles, topology.kinds, topology.sharp_edges),
            *(flood.barrier, flood.outside, flood.whole_cells),
        ),
        "bricks_digest": digest(bricks.cells, bricks.values, bricks.sharp),
    }


def digest(*arrays: NDArray[Any]) -> str:
    """Return 16 hexadecimal digits that depend on types, shapes and all values of arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cfg = parse(SdfCostBenchmark, args, prog="python -m benchmarks.sdf_cost")
    rows = []
    for row in measure(cfg):
        log.info("%s: %s CPU-s", row["mesh"], row["sum"])
        rows.append(row)
    sys.stdout.write(markdown_table(iter(rows)) + "\n")


if __name__ == "__main__":
    command(main)
