"""The closed mesh of an asset: the zero level set of its finest bricks, which evaluation takes as the true surface."""

from __future__ import annotations

from pipeline.core.errors import Reject
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.schema import Bricks, Mesh


def watertight(bricks: Bricks) -> Mesh:
    """Closed, consistently wound mesh in the normalised frame. Reject: "no_surface" if nothing is inside.

    Vertices lie on grid edges where the bricks interpolate to zero; parts thinner than a voxel that hold no grid point
    leave no surface at this resolution.
    """
    vertices, faces = extract(bricks)
    if len(faces) == 0:
        raise Reject("no_surface", resolution=bricks.resolution, blocks=len(bricks.cells))
    return Mesh(vertices=vertices, faces=faces)
