"""Centre a mesh and scale it into the cube [-0.5, 0.5]^3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh
from pipeline.mesh_io.config import NormalizeConfig


def normalize(mesh: Mesh, cfg: NormalizeConfig) -> Mesh:
    """Return the same shape, centred, with longest side 2 * half_extent.

    The bounding box covers the vertices that faces use. Other vertices are moved to the origin.

    Args:
        mesh: A mesh in any frame.
        cfg: The size of the result.

    Returns:
        The mesh with the same faces and parts. Its `center` and `scale` lead from the loaded frame
        to the new one: p = (p_loaded - center) * scale.

    Raises:
        Reject: "no_faces", or "flat_or_infinite" if the bounding box is a single point or is not
            finite.
    """
    if len(mesh.faces) == 0:
        raise Reject("no_faces", vertices=len(mesh.vertices))
    # Bounding box of the used vertices.
    used = np.zeros(len(mesh.vertices), dtype=bool)
    used[mesh.faces.ravel()] = True
    low = np.where(used[:, None], mesh.vertices, np.inf).min(axis=0)
    high = np.where(used[:, None], mesh.vertices, -np.inf).max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):  # not finite results are rejected below
        center = low / 2 + high / 2
        longest = float((high - low).max())
    if not np.isfinite(center).all() or not np.isfinite(longest) or not longest > 0:
        raise Reject("flat_or_infinite", vertices=len(mesh.vertices), longest=longest)
    factor = 2 * cfg.half_extent / longest
    if not np.isfinite(factor):
        raise Reject("flat_or_infinite", vertices=len(mesh.vertices), longest=longest)
    vertices = np.where(used[:, None], mesh.vertices - center, 0.0) * factor
    # With q the given vertices, s and c the given scale and center: q = (p_loaded - c) * s. The
    # new vertices are (q - center) * factor = (p_loaded - c - center / s) * s * factor.
    loaded_center = np.asarray(mesh.center) + center / mesh.scale
    return replace(
        mesh,
        # Clipping removes a rounding error in the last bit.
        vertices=np.clip(vertices, -cfg.half_extent, cfg.half_extent),
        center=tuple(float(c) for c in loaded_center),
        scale=mesh.scale * factor,
    )
