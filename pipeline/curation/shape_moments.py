"""Surface moments: a signature of a shape that turning and mirroring only permute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.core.schema import Mesh
from pipeline.geometry.topology import BURIED, Topology

MAX_DEGREE = 4
# The exponents (a, b, c) of the monomials x^a y^b z^c. Degree 0 is left out: its moment is 1.
EXPONENTS = tuple(
    (a, b, degree - a - b)
    for degree in range(1, MAX_DEGREE + 1)
    for a in range(degree, -1, -1)
    for b in range(degree - a, -1, -1)
)
NUM_MOMENTS = len(EXPONENTS)  # 34
SIGNATURES = ("visible_moments", "face_moments")  # columns with the moments of an asset
TRIANGLES_AT_ONCE = 1 << 16
# Dunavant (1985), rule of degree 4 with 6 points: exact for polynomials up to that degree. Each
# row has the barycentric coordinates of one point, and the weights belong to the rows.
_A, _B = 0.445948490915965, 0.091576213509771
QUADRATURE_POINTS = np.array(
    [
        [1 - 2 * _A, _A, _A],
        [_A, 1 - 2 * _A, _A],
        [_A, _A, 1 - 2 * _A],
        [1 - 2 * _B, _B, _B],
        [_B, 1 - 2 * _B, _B],
        [_B, _B, 1 - 2 * _B],
    ]
)
QUADRATURE_WEIGHTS = np.repeat([0.223381589678011, 0.109951743655322], 3)


@dataclass(frozen=True)
class Motion:
    """A symmetry of the upright frame: an optional mirroring and then a turn about the up axis.

    Args:
        mirrored: Whether x changes its sign first.
        quarter_turns: Number of turns by 90 degrees about +y, counterclockwise seen from above.
    """

    mirrored: bool
    quarter_turns: int

    @property
    def kind(self) -> str:
        """What a copy under this motion is called, such as "same_shape" or "turned_90"."""
        if self.mirrored:
            return "mirrored"
        return f"turned_{90 * self.quarter_turns}" if self.quarter_turns else "same_shape"

    @property
    def inverse(self) -> Motion:
        """The motion that undoes this one. A mirrored motion is its own inverse."""
        return self if self.mirrored else Motion(False, -self.quarter_turns % 4)

    def apply(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move points [..., 3]."""
        x, y, z = np.moveaxis(points, -1, 0)
        if self.mirrored:
            x = -x
        for _ in range(self.quarter_turns):
            x, z = z, -x
        return np.stack([x, y, z], axis=-1)


# In the order in which they are preferred if a symmetric shape matches several.
MOTIONS = tuple(Motion(mirrored, turns) for mirrored in (False, True) for turns in range(4))


def shape_signatures(mesh: Mesh, topology: Topology) -> dict[str, bytes]:
    """Return what copies of a mesh are found by.

    Args:
        mesh: The normalised mesh.
        topology: Its topology.

    Returns:
        {"visible_moments": `surface_moments` of the visible surface, "face_moments": those of all
        faces}, each as 34 float32.
    """
    surfaces = (topology.triangles[topology.kinds != BURIED], mesh.vertices[mesh.faces])
    return {
        name: surface_moments(triangles).astype(np.float32).tobytes()
        for name, triangles in zip(SIGNATURES, surfaces, strict=True)
    }


def decode_moments(values: Sequence[bytes | None]) -> NDArray[np.float32]:
    """Return the moments of N assets, [N, 34]. None becomes zeros, the moments of no surface."""
    joined = b"".join(value or bytes(4 * NUM_MOMENTS) for value in values)
    return np.frombuffer(joined, np.float32).reshape(len(values), NUM_MOMENTS)


def surface_moments(triangles: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the area-weighted means of the monomials of degree 1 to 4 over a surface.

    The moments do not depend on how the surface is divided into triangles, on its colours or on its
    orientation. They are exact: the quadrature integrates polynomials of degree 4.

    Args:
        triangles: [T, 3, 3] corners in the cube [-0.5, 0.5]^3. Coordinates are doubled, so that
            every moment lies in -1..1.

    Returns:
        [34] in the order of EXPONENTS. Zeros if the surface has no area.
    """
    sums = np.zeros(NUM_MOMENTS)
    total = 0.0
    for start in range(0, len(triangles), TRIANGLES_AT_ONCE):
        corners = 2 * triangles[start : start + TRIANGLES_AT_ONCE].astype(np.float64)
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(normals, axis=1)
        points = np.einsum("qk,tkd->qtd", QUADRATURE_POINTS, corners)
        weights = QUADRATURE_WEIGHTS[:, None] * area
        powers = points[..., None] ** np.arange(MAX_DEGREE + 1)  # [Q, T, 3, 5]
        for number, (a, b, c) in enumerate(EXPONENTS):
            values = powers[..., 0, a] * powers[..., 1, b] * powers[..., 2, c]
            sums[number] += np.sum(weights * values)
        total += float(area.sum())
    return sums / total if total > 0 else sums


@lru_cache
def _table(motion: Motion) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return where each moment of a moved surface comes from, and its sign."""
    index = {exponents: number for number, exponents in enumerate(EXPONENTS)}
    sources, signs = [], []
    # A motion permutes x and z and changes signs. Read both from the images of the axes.
    matrix = motion.apply(np.eye(3)).T  # moved = matrix @ point
    for exponents in EXPONENTS:
        source, sign = [0, 0, 0], 1.0
        for axis, power in enumerate(exponents):
            origin = int(np.flatnonzero(matrix[axis])[0])
            source[origin] += power
            sign *= matrix[axis, origin] ** power
        sources.append(index[source[0], source[1], source[2]])
        signs.append(sign)
    return np.array(sources), np.array(signs)


def move_moments(moments: NDArray[np.float64], motion: Motion) -> NDArray[np.float64]:
    """Return the moments [..., 34] of a surface after a motion."""
    sources, signs = _table(motion)
    return moments[..., sources] * signs


def invariants(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers that no motion changes: the means of y^2 and of x^2 + z^2.

    Args:
        moments: [N, 34].

    Returns:
        [N, 2].
    """
    index = {exponents: number for number, exponents in enumerate(EXPONENTS)}
    across = moments[:, index[2, 0, 0]] + moments[:, index[0, 0, 2]]
    return np.stack([moments[:, index[0, 2, 0]], across], axis=1)
