"""Points on the closed surface of an asset: spread evenly, and along its sharp edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.primitives.surface_distance import sample_surface
from pipeline.geometry.point_sdf import PointSdf
from pipeline.geometry.topology import SHEET, SOLID, Topology

ON_SURFACE = 1e-6  # largest |sdf| of a sample, in cube units
MEETS = 1e-6  # distance within which a triangle meets a point of a sharp edge, in cube units
MAX_ROUNDS = 50  # of drawing points again in place of those that a shell hides
MARCH_STEPS = 60  # from a sheet to the surface of its shell

Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # positions [N, 3], unit normals [N, 3]


class SurfaceSampler:
    """Draws points on the zero level of an asset's signed distance, with outward normals.

    On solids that are the visible triangles and the caps of closed openings. A sheet has the two
    sides of its shell. The rims of shells, less than two voxels wide, get no points.

    Args:
        topology: The classified triangles.
        sdf: Its signed distances.
    """

    def __init__(self, topology: Topology, sdf: PointSdf):
        self.sdf = sdf
        solid, sheet = topology.kinds == SOLID, topology.kinds == SHEET
        # A sheet is listed twice, once for each of its sides.
        triangles = topology.triangles
        parts = (triangles[solid], triangles[sheet], triangles[sheet][:, [0, 2, 1]])
        self._vertices = np.concatenate(parts).reshape(-1, 3)
        self._faces = np.arange(len(self._vertices)).reshape(-1, 3)
        self._solids = int(solid.sum())
        edges = topology.sharp_edges
        self._edges = edges
        self._edge_ends = np.cumsum(np.linalg.norm(edges[:, 1] - edges[:, 0], axis=1))

    @property
    def sharp_length(self) -> float:
        """Length of all visible sharp edges, in cube units."""
        return float(self._edge_ends[-1]) if len(self._edge_ends) else 0.0

    def uniform(self, count: int, rng: np.random.Generator) -> Points:
        """Draw points evenly by area.

        Args:
            count: Number of points.
            rng: Source of the random numbers.

        Raises:
            Reject: "no_surface_samples" if nearly all points lie inside shells.
        """

        def draw(number: int) -> Points:
            seed = int(rng.integers(2**63))
            points, normals, faces = sample_surface(self._vertices, self._faces, number, seed)
            # from the middle of a shell to its side
            points[faces >= self._solids] += self.sdf.sheet_half * normals[faces >= self._solids]
            return points, normals

        return self._fill(count, draw)

    def sharp(self, count: int, rng: np.random.Generator) -> Points:
        """Draw points evenly by length on the visible sharp edges.

        The normal is the mean of the distinct normals of the faces that meet there. An edge of a
        sheet gets points on both sides of its shell.

        Args:
            count: Number of points.
            rng: Source of the random numbers.

        Raises:
            Reject: "no_sharp_samples" if the asset has no sharp edge, or nearly all points lie
                inside shells.
        """
        if not self.sharp_length > 0:
            raise Reject("no_sharp_samples", edges=len(self._edges))

        def draw(number: int) -> Points:
            places = rng.random(number) * self.sharp_length
            chosen = np.minimum(
                np.searchsorted(self._edge_ends, places, side="right"), len(self._edges) - 1
            )
            start, end = self._edges[chosen].transpose(1, 0, 2)
            points = start + rng.random((number, 1)) * (end - start)
            normals, is_solid = self.sdf.normals_at(points, MEETS)
            sides = np.where(is_solid | (rng.random(number) < 0.5), 1.0, -1.0)
            normals *= sides[:, None]
            return self._march(points, normals, ~is_solid), normals

        return self._fill(count, draw, reason="no_sharp_samples")

    def _fill(
        self,
        count: int,
        draw: Callable[[int], Points],
        reason: str = "no_surface_samples",
    ) -> Points:
        """Draw until `count` points lie on the surface and have a normal."""
        points, normals, have = np.empty((count, 3)), np.empty((count, 3)), 0
        for _ in range(MAX_ROUNDS):
            new_points, new_normals = draw(count - have)
            keep = np.abs(self.sdf.at(new_points)) <= ON_SURFACE
            keep &= (new_normals != 0).any(axis=1)
            end = have + int(keep.sum())
            points[have:end], normals[have:end] = new_points[keep], new_normals[keep]
            have = end
            if have == count:
                return points, normals
        raise Reject(reason, wanted=count, found=have)

    def _march(self, points: NDArray, normals: NDArray, move: NDArray) -> NDArray[np.float64]:
        """Move points from the middle of a shell along their normals to its surface.

        The distance never exceeds the way that is left, so steps of the distance do not pass the
        surface.
        """
        points = points.copy()
        moving = np.flatnonzero(move)
        for _ in range(MARCH_STEPS):
            distance = self.sdf.shells_at(points[moving])
            inside = distance < -ON_SURFACE / 10
            moving, distance = moving[inside], distance[inside]
            if not len(moving):
                break
            points[moving] -= distance[:, None] * normals[moving]
        return points
