"""`python -m benchmarks.mesh_finishing`: hole patches and simplification against known surfaces.

A hole is cut into a ball, and the patch is compared with the ball. A box that no axis of the grid
follows is simplified, and its edges are compared with the true ones. Distances are in voxels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial import KDTree

from model.inference.mesh_cleaning import (
    close_holes,
    count_open_edges,
    drop_unused_vertices,
    simplify,
)
from pipeline.core.cli import command, parse
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.primitives.surface_distance import sample_surface
from pipeline.core.schema import Bricks

log = logging.getLogger(__name__)

RADIUS = 0.35
HALF = np.array([0.3, 0.2, 0.15])
TURN = trimesh.transformations.euler_matrix(0.35, 0.61, 0.17)[:3, :3]
SAMPLES = 200_000


@dataclass(frozen=True, kw_only=True)
class FinishingConfig:
    """Measure hole patches and simplification."""

    resolution: int = 128
    """Resolution of the grid from which the surfaces are extracted."""

    faces: tuple[int, ...] = (2000, 400, 100)
    """Numbers of faces to which the box is simplified."""

    heights: tuple[float, ...] = (0.34, 0.32, 0.28, 0.2)
    """Heights above which the ball, of radius 0.35, is cut off."""


def surface_of(distance: Callable[[NDArray], NDArray], resolution: int) -> MeshArrays:
    """Extract the surface of a distance function of points [..., 3]."""
    line = np.arange(resolution) * spacing(resolution) - 0.5
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1)
    values = np.clip(distance(grid) / band(resolution), -1, 1).astype(np.float16)
    side = resolution // CELL_SIDE
    cells = values.reshape((side, CELL_SIDE) * 3).transpose(0, 2, 4, 1, 3, 5)
    cells = cells.reshape(side, side, side, -1)
    stored = np.argwhere((np.abs(cells) < 1).any(axis=-1))
    sharp = np.zeros((len(stored), CELL_SIDE**3 // 8), np.uint8)
    return extract(
        Bricks(
            resolution=resolution,
            cells=stored.astype(np.int16),
            values=cells[tuple(stored.T)],
            sharp=sharp,
        )
    )


def distance_to_box(points: NDArray) -> NDArray:
    """Return the signed distance of points [..., 3] to the turned box."""
    outside = np.abs(points @ TURN) - HALF
    inside = np.minimum(outside.max(-1), 0)
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + inside


def box_edges() -> NDArray:
    """Return points on the twelve edges of the turned box."""
    corners = HALF * np.array(np.meshgrid(*[[-1, 1]] * 3)).T.reshape(-1, 3)
    lines = [
        np.linspace(a, b, 50)
        for i, a in enumerate(corners)
        for b in corners[:i]
        if (~np.isclose(a, b)).sum() == 1
    ]
    return np.concatenate(lines) @ TURN.T


def measure_patch(height: float, resolution: int) -> str:
    """Cut a ball off above a height, close the hole, and describe the error of the patch."""
    vertices, faces = surface_of(lambda p: np.linalg.norm(p, axis=-1) - RADIUS, resolution)
    kept = faces[vertices[faces].mean(1)[:, 1] < height]
    open_vertices, open_faces = drop_unused_vertices(vertices, kept)
    started = time.perf_counter()
    closed, closed_faces, _ = close_holes(open_vertices, open_faces)
    seconds = time.perf_counter() - started
    patch = np.linalg.norm(closed[len(open_vertices) :], axis=1)
    return (
        f"hole of diameter {2 * np.sqrt(RADIUS**2 - height**2):.3f}: error of the patch mean "
        f"{resolution * np.abs(patch - RADIUS).mean():.2f}, max "
        f"{resolution * np.abs(patch - RADIUS).max():.2f} voxels; a flat patch has "
        f"{resolution * (RADIUS - height):.2f}; {count_open_edges(closed_faces)} open edges; "
        f"{seconds:.2f} s"
    )


def measure_simplification(box: MeshArrays, count: int, resolution: int) -> str:
    """Simplify the box and describe the distances of its faces and of its edges."""
    started = time.perf_counter()
    vertices, faces = simplify(*box, count)
    seconds = time.perf_counter() - started
    points, _, _ = sample_surface(vertices, faces, SAMPLES, seed=0)
    surface = resolution * np.abs(distance_to_box(points))
    edges = resolution * KDTree(points).query(box_edges())[0]
    return (
        f"box of {len(box[1])} faces to {count}: {len(faces)} faces, "
        f"{count_open_edges(faces)} open edges; surface mean {surface.mean():.3f}, max "
        f"{surface.max():.2f} voxels; sharp edges mean {edges.mean():.2f}, max "
        f"{edges.max():.2f} voxels; {seconds:.2f} s"
    )


def main(args: Sequence[str]) -> None:
    """Parse the options and log the measurements."""
    cfg = parse(FinishingConfig, args, prog="python -m benchmarks.mesh_finishing")
    for height in cfg.heights:
        log.info("%s", measure_patch(height, cfg.resolution))
    box = surface_of(distance_to_box, cfg.resolution)
    for count in cfg.faces:
        log.info("%s", measure_simplification(box, count, cfg.resolution))


if __name__ == "__main__":
    command(main)
