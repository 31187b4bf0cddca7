"""How much of a surface is too thin for the grid of its bricks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.schema import Bricks
from pipeline.geometry.topology import BURIED, SHEET, Topology

SAMPLES = 20_000  # points of the visible surface


def thin_share(topology: Topology, bricks: Bricks) -> float:
    """Return the share of the visible area that leaves no sign change in the bricks.

    A point of a solid's surface leaves a sign change if one of the eight grid points around it is
    inside. Where a closed part is thinner than a voxel, no grid point may fall inside, and the part
    has holes or is missing. Sheets always have their thickness, so they count as present.

    Args:
        topology: The classified triangles.
        bricks: The signed distances of the same asset.

    Returns:
        0 to 1, measured at 20,000 points that are spread by area.
    """
    points, kinds = _sample(topology)
    return float((~_has_inside_corner(points, bricks) & (kinds != SHEET)).mean())


def _sample(topology: Topology) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return points [N, 3] of the visible surface and the kind [N] of the triangle of each."""
    visible = topology.kinds != BURIED
    corners, kinds = topology.triangles[visible], topology.kinds[visible]
    areas = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
    )
    # equal steps along the sum of the areas, and a sequence that fills the triangle evenly
    ends = np.cumsum(areas)
    steps = np.arange(SAMPLES)
    chosen = np.searchsorted(ends, (steps + 0.5) / SAMPLES * ends[-1]).clip(max=len(areas) - 1)
    u, v = (steps * 0.7548776662466927) % 1, (steps * 0.5698402909980532) % 1
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    return a + u[:, None] * (b - a) + v[:, None] * (c - a), kinds[chosen]


def _has_inside_corner(points: NDArray[np.float64], bricks: Bricks) -> NDArray[np.bool_]:
    """Return whether one of the eight grid points around each point [N, 3] is inside."""
    size = bricks.resolution // CELL_SIDE
    brick_of = np.full((size, size, size), -1, np.int64)
    brick_of[tuple(bricks.cells.T.astype(np.int64))] = np.arange(len(bricks.cells))
    low = np.floor((points + 0.5) / spacing(bricks.resolution)).astype(np.int64)
    low = low.clip(0, bricks.resolution - 2)
    inside = np.zeros(len(points), np.bool_)
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (low + corner).T
        brick = brick_of[x // CELL_SIDE, y // CELL_SIDE, z // CELL_SIDE]
        place = (x % CELL_SIDE * CELL_SIDE + y % CELL_SIDE) * CELL_SIDE + z % CELL_SIDE
        # -0.0 is inside, too: a small distance may round to it
        inside |= (brick >= 0) & np.signbit(bricks.values[brick, place])
    return inside
