"""Centre a mesh and scale it into the cube [-0.5, 0.5]^3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh
from pipeline.mesh_io.config import NormalizeConfig


def normalize(mesh: Mesh, cfg: NormalizeConfig) -> Mesh:
    """Same shape and parts, centred, largest side 2 * half_extent; center and scale tell the way from the loaded frame.

    The bounding box is that of the vertices which faces use. Reject: "no_faces", "flat_or_infinite" (a single point,
    or a coordinate or an extent that is not finite).
    """
    if len(mesh.faces) == 0:
        raise Reject("no_faces", vertices=len(mesh.vertices))
    used = np.zeros(len(mesh.vertices), dtype=bool)
    used[mesh.faces.ravel()] = True
    low = np.where(used[:, None], mesh.vertices, np.inf).min(axis=0)
    high = np.where(used[:, None], mesh.vertices, -np.inf).max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        center = low / 2 + high / 2
        longest = float((high - low).max())
    if not np.isfinite(center).all() or not np.isfinite(longest) or not longest > 0:
        raise Reject("flat_or_infinite", vertices=len(mesh.vertices), longest=longest)
    factor = 2 * cfg.half_extent / longest
    if not np.isfinite(factor):
        raise Reject("flat_or_infinite", vertices=len(mesh.vertices), longest=longest)
    vertices = np.where(used[:, None], mesh.vertices - center, 0.0) * factor
    # p = (q / s - c - center) * factor where q is what came in, so that p refers to the frame of loading
    loaded_center = np.asarray(mesh.center) + center / mesh.scale
    return replace(
        mesh,
        vertices=np.clip(
            vertices, -cfg.half_extent, cfg.half_extent
        ),  # the last bit of a rounding error
        center=tuple(float(c) for c in loaded_center),
        scale=mesh.scale * factor,
    )
