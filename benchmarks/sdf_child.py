"""One measurement of `benchmarks.sdf`: `python -m benchmarks.sdf_child FOLDER JOB_AS_JSON`.

The numbers are written to FOLDER/result.json. CPU seconds include all threads and exclude
compilation. The peak memory is the largest resident set after the clock was started. It includes
the interpreter and the libraries, whose part is `base_mb`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.memory import peak_memory
from pipeline.core.schema import Bricks, Mesh

CHUNK = 1 << 20  # points per call of libigl
SURE_SIGN_VOXELS = 1e-3  # signs are compared beyond this distance: float16 rounds smaller values


def main(folder: Path, job: dict[str, Any]) -> None:
    """Run the job's method and write its numbers."""
    jobs = {
        "prepare": prepare,
        "ours": ours,
        "libigl": libigl,
        "mesh2sdf": mesh2sdf,
        "mesh2sdf raw": mesh2sdf,
        "full": full,
    }
    try:
        result = jobs[job["method"]](folder, job)
    except Reject as verdict:
        result = {"rejected": verdict.reason}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def prepare(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Load and normalise a file as a build does, and compute the true distances."""
    from benchmarks.sdf_truth import open_edges, sample_truth
    from pipeline.curation.config import FilterConfig
    from pipeline.curation.filters import filter_geometry
    from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
    from pipeline.mesh_io.load import load
    from pipeline.mesh_io.normalize import normalize

    mesh = normalize(load(Path(job["path"]), LoadConfig()), NormalizeConfig())
    filter_geometry(mesh, FilterConfig())
    np.savez(folder / "mesh.npz", vertices=mesh.vertices, faces=mesh.faces)
    for resolution in job["resolutions"]:
        truth = sample_truth(mesh, resolution, job["samples"])
        np.savez(folder / f"truth-{resolution}.npz", **vars(truth))
    return {"faces": len(mesh.faces), "open_edges": len(open_edges(mesh))}


def ours(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Measure topology, distances and sharp bits on the same grid."""
    from pipeline.geometry.config import TopologyConfig
    from pipeline.geometry.sdf import compute_bricks
    from pipeline.geometry.topology import build_topology

    mesh, resolution = _mesh(folder), job["resolution"]
    compute_bricks(build_topology(_warm_up_mesh(), TopologyConfig(resolution=64)), 64)
    clock = Clock()
    topology = build_topology(mesh, TopologyConfig(resolution=resolution))
    clock.lap("topology")
    bricks = compute_bricks(topology, resolution)
    clock.lap("sdf")
    cost = clock.cost()
    active = np.abs(bricks.values) < 1
    if job["keep_band"]:
        rows, points = np.nonzero(active)
        local = np.stack(np.unravel_index(points, (CELL_SIDE,) * 3), axis=1).astype(np.int16)
        np.save(folder / f"band-{resolution}.npy", bricks.cells[rows] * np.int16(CELL_SIDE) + local)
    sizes = {
        "sign_path": topology.sign_path,
        "cells": len(bricks.cells),
        "band_points": int(active.sum()),
    }
    return {
        **cost,
        **sizes,
        **_errors(folder, resolution, lambda points: stored_voxels(bricks, points)),
    }


def full(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Measure all resolutions from one topology.

    Each is written to a store of its own. The seconds exclude the writing.
    """
    from pipeline.geometry.config import TopologyConfig
    from pipeline.geometry.sdf import compute_bricks
    from pipeline.geometry.topology import build_topology
    from pipeline.storage.sdf_shard import write_sdf_shard

    mesh = _mesh(folder)
    warm = compute_bricks(build_topology(_warm_up_mesh(), TopologyConfig(resolution=64)), 64)
    write_sdf_shard(folder / "warm.zarr", 64, [("warm", warm)], "benchmark")
    clock = Clock()
    topology = build_topology(mesh, TopologyConfig(resolution=job["topology_resolution"]))
    clock.lap("topology")
    stored = {}
    for resolution in job["resolutions"]:
        bricks = compute_bricks(topology, resolution)
        clock.lap(f"sdf_{resolution}")
        store = folder / f"{resolution}.zarr"
        cells = write_sdf_shard(store, resolution, [("asset", bricks)], "benchmark")
        stored[str(resolution)] = {
            "cells": cells,
            "bytes": sum(f.stat().st_size for f in store.rglob("*") if f.is_file()),
        }
        clock.skip()
    return {**clock.cost(), "sign_path": topology.sign_path, "stored": stored}


def mesh2sdf(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Measure the dense grid of mesh2sdf, with the same grid points as ours."""
    import mesh2sdf as peer

    def grid_of(mesh: Mesh, size: int) -> Any:
        # its grid point i lies at -1 + 2 * i / R, ours at -0.5 + i / (R - 1)
        vertices = (2 * mesh.vertices + 1) * ((size - 1) / size) - 1
        return peer.compute(
            vertices, mesh.faces, size, fix=job["method"] == "mesh2sdf", level=2 / size
        )

    mesh, resolution = _mesh(folder), job["resolution"]
    grid_of(_warm_up_mesh(), 16)
    clock = Clock()
    grid = grid_of(mesh, resolution)
    clock.lap("sdf")
    cost = clock.cost()
    return {
        **cost,
        **_errors(folder, resolution, lambda points: grid[tuple(points.T)] * (resolution / 2)),
    }


def libigl(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Measure libigl at the grid points of our band: AABB tree and fast winding number."""
    import igl

    def build(mesh: Mesh) -> Callable[[NDArray], NDArray[np.float64]]:
        vertices, faces = np.ascontiguousarray(mesh.vertices), mesh.faces.astype(np.int64)
        tree, winding = igl.AABB(), igl.FastWindingNumberBVH()
        tree.init(vertices, faces)
        winding.init(vertices, faces)

        def voxels(points: NDArray) -> NDArray[np.float64]:
            places = points * h - 0.5
            distance = np.sqrt(tree.squared_distance(vertices, faces, places)[0]) / h
            return np.where(np.asarray(winding.winding_number(places)) > 0.5, -distance, distance)

        return voxels

    mesh, resolution = _mesh(folder), job["resolution"]
    h = spacing(resolution)
    points = np.load(folder / f"band-{resolution}.npy", mmap_mode="r")
    build(_warm_up_mesh())(np.zeros((2, 3), np.int16))
    clock = Clock()
    voxels = build(mesh)
    out = np.empty(len(points), np.float16)
    for start in range(0, len(points), CHUNK):
        out[start : start + CHUNK] = voxels(points[start : start + CHUNK])
    clock.lap("sdf")
    return {**clock.cost(), "band_points": len(points), **_errors(folder, resolution, voxels)}


class Clock:
    """CPU seconds by part, and peak memory since the clock was created."""

    def __init__(self):
        with suppress(OSError):  # other systems than Linux: the peak includes the warm-up
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.base_mb = peak_mb()
        self.parts: dict[str, float] = {}
        self.last = time.process_time()

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap under a name."""
        now = time.process_time()
        self.parts[name], self.last = now - self.last, now

    def skip(self) -> None:
        """Discard the seconds since the last lap."""
        self.last = time.process_time()

    def cost(self) -> dict[str, Any]:
        """Return seconds and memory as columns of a row."""
        return {
            "cpu_s": sum(self.parts.values()),
            "parts_s": self.parts,
            "peak_mb": peak_mb(),
            "base_mb": self.base_mb,
        }


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return peak_memory() / 2**20


def stored_voxels(bricks: Bricks, points: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the stored distances at grid points.

    Args:
        bricks: The stored bricks.
        points: int32 [P, 3] grid indices.

    Returns:
        float64 [P] in voxels, NaN where no cell is stored.
    """
    side = bricks.resolution // CELL_SIDE
    weights = np.array([side * side, side, 1])
    keys = bricks.cells.astype(np.int64) @ weights
    wanted = points // CELL_SIDE @ weights
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    values = bricks.values[
        rows, points % CELL_SIDE @ np.array([CELL_SIDE * CELL_SIDE, CELL_SIDE, 1])
    ].astype(np.float64)
    return np.where(
        keys[rows] == wanted,
        values * (band(bricks.resolution) / spacing(bricks.resolution)),
        np.nan,
    )


def _errors(
    folder: Path, resolution: int, voxels_at: Callable[[NDArray[np.int32]], NDArray]
) -> dict[str, Any]:
    """Compare distances with the true ones, in voxels.

    A positive offset means that the surface lies too far out.
    """
    truth = np.load(folder / f"truth-{resolution}.npz")
    sampled, count = int(truth["sampled"]), len(truth["points"])
    if not count:
        return {"points": 0, "sampled": sampled}
    true, measured = truth["voxels"], voxels_at(truth["points"])
    known = np.isfinite(measured)
    error = true[known] - measured[known]
    wrong_sign = (
        known & (np.signbit(measured) != np.signbit(true)) & (np.abs(true) > SURE_SIGN_VOXELS)
    )
    return {
        "points": count,
        "sampled": sampled,
        "missing": float(1 - known.mean()),
        "wrong_sign": float(wrong_sign.sum() / count),
        "offset_voxels": float(error.mean()) if known.any() else None,
        "error_voxels": float(np.abs(error).mean()) if known.any() else None,
        "max_error_voxels": float(np.abs(error).max()) if known.any() else None,
    }


def _mesh(folder: Path) -> Mesh:
    arrays = np.load(folder / "mesh.npz")
    return Mesh(vertices=arrays["vertices"], faces=arrays["faces"])


def _warm_up_mesh() -> Mesh:
    """Return a box without a lid and a loose sheet, which use all parts of the geometry."""
    box = np.stack(np.meshgrid(*[[-0.4, 0.4]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    sheet = np.array([[-0.2, 0.45, 0.0], [0.2, 0.45, 0.0], [0.0, 0.45, 0.2]])
    sides = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4]])
    faces = np.concatenate([sides[:, [0, 1, 2]], sides[:, [0, 2, 3]], [[8, 9, 10]]]).astype(
        np.int32
    )
    return Mesh(vertices=np.concatenate([box, sheet]), faces=faces)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
