"""Grid points inside a closed mesh, and the intersection over union of masks and of solids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import band, spacing

# Offsets of the lines in y and z, in voxels. Irrational, so that no line meets an edge or a vertex.
OFFSETS = (0.3183098861, 0.2718281828)


@njit(cache=True)
def _crossings(triangles, side, counts, places, capacity):
    """Find where lines along x meet triangles.

    Writes the number of crossings per line to counts [side, side], and the x of up to `capacity` of
    them to places [side, side, capacity]. Lengths are in voxels.
    """
    for t in range(len(triangles)):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        low_y, high_y = min(a[1], b[1], c[1]), max(a[1], b[1], c[1])
        low_z, high_z = min(a[2], b[2], c[2]), max(a[2], b[2], c[2])
        area = (b[1] - a[1]) * (c[2] - a[2]) - (b[2] - a[2]) * (c[1] - a[1])
        if area == 0:
            continue
        # the lines inside the triangle's bounding box in y and z
        first_j = max(np.int64(np.ceil(low_y)), 0)
        last_j = min(np.int64(np.floor(high_y)), side - 1)
        first_k = max(np.int64(np.ceil(low_z)), 0)
        last_k = min(np.int64(np.floor(high_z)), side - 1)
        for j in range(first_j, last_j + 1):
            for k in range(first_k, last_k + 1):
                # barycentric coordinates decide whether the line meets the triangle
                u = ((j - a[1]) * (c[2] - a[2]) - (k - a[2]) * (c[1] - a[1])) / area
                v = ((b[1] - a[1]) * (k - a[2]) - (b[2] - a[2]) * (j - a[1])) / area
                if u < 0 or v < 0 or u + v > 1:
                    continue
                n = counts[j, k]
                if n < capacity:
                    places[j, k, n] = a[0] + u * (b[0] - a[0]) + v * (c[0] - a[0])
                counts[j, k] = n + 1


def inside(vertices: NDArray, faces: NDArray, side: int = 64) -> NDArray[np.bool_]:
    """Find the voxel centres that a closed mesh encloses, by the parity of crossings along x.

    The lines run a fraction of a voxel beside the centres in y and z.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3.
        faces: integer [F, 3].
        side: Voxels along one side of the cube.

    Returns:
        bool [side, side, side].
    """
    shift = np.array([0.5, OFFSETS[0], OFFSETS[1]])
    triangles = np.ascontiguousarray((np.asarray(vertices, np.float64)[faces] + 0.5) * side - shift)
    # repeat with more room if a line has too many crossings
    counts = np.zeros((side, side), np.int64)
    capacity = 64
    while True:
        places = np.full((side, side, capacity), np.inf)
        counts[:] = 0
        _crossings(triangles, side, counts, places, capacity)
        if counts.max(initial=0) <= capacity:
            break
        capacity = int(counts.max())
    before = (places[:, :, None, :] < np.arange(side)[None, None, :, None]).sum(axis=3)
    return (before % 2 == 1).transpose(2, 0, 1)


def intersection_over_union(a: Any, b: Any, axes: tuple[int, ...] | None = None) -> Any:
    """Return the intersection over union (IoU) of two sets, given as masks of the same grid.

    Args:
        a: bool array or tensor of any shape.
        b: bool array or tensor of the same kind and shape.
        axes: The axes of one set. The others count sets. None: all axes.

    Returns:
        float64, of NumPy or of torch as the masks are, without the axes `axes`. It is 1 where both
        sets are empty.
    """
    shared, union = a & b, a | b
    if axes is None:
        shared, union = shared.sum(), union.sum()
    else:
        shared, union = shared.sum(axes), union.sum(axes)
    if not isinstance(a, np.ndarray):  # tensors of integers would be divided in float32
        shared, union = shared.double(), union.double()
    empty = union == 0
    return (shared + empty) / (union + empty)


def solid_intersection_over_union(a: Any, b: Any, resolution: int) -> Any:
    """Return the intersection over union (IoU) of two solids, given as truncated distances.

    Each grid point counts with the share of its voxel that is inside, as a plane at the point's
    distance would cut it. A mask of the grid points would lose or gain a whole layer of points
    where a flat surface passes close to one, which is half the volume of a plate of two voxels.

    Args:
        a: Signed distances of grid points divided by `pipeline.core.grid.band(resolution)`, a
            tensor of any shape.
        b: The same for the other solid.
        resolution: Grid points along one side of the cube.

    Returns:
        A float64 tensor without axes. It is 1 if both solids are empty.
    """
    voxels_per_band = band(resolution) / spacing(resolution)
    a, b = ((0.5 - x.double() * voxels_per_band).clamp(0, 1) for x in (a, b))
    shared, union = a.minimum(b).sum(), a.maximum(b).sum()
    empty = union == 0
    return (shared + empty) / (union + empty)
