"""Fewer faces of a mesh by quadric edge collapses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_ERROR = 1.0  # of a simplification, relative to the size of the mesh: the count decides


def collapse_edges(
    vertices: NDArray[np.float64], faces: NDArray[np.int32], target: int
) -> NDArray[np.int32]:
    """Reduce a mesh to about `target` faces. Sharp edges are kept.

    Vertices are removed and not moved, and the topology stays. More faces are left where fewer
    would change the topology.

    Args:
        vertices: [V, 3].
        faces: [F, 3].
        target: Number of faces.

    Returns:
        int32 [G, 3], numbers of the same vertices.

    Raises:
        ImportError: If the library meshoptimizer is not installed.
    """
    import meshoptimizer  # it belongs to extras

    corners = np.ascontiguousarray(faces.ravel(), np.uint32)
    left = np.zeros_like(corners)
    size = meshoptimizer.simplify(
        left,
        corners,
        np.ascontiguousarray(vertices, np.float32),
        target_index_count=3 * target,
        target_error=LARGEST_ERROR,
    )
    return left[:size].reshape(-1, 3).astype(np.int32)
