"""Whether a mesh can be printed: closed, one piece, thick enough, and without steep overhangs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.config import PrintOptions
from model.inference.mesh_cleaning import Faces, Vertices, count_open_edges, label_pieces
from pipeline.core.errors import UserError
from pipeline.core.primitives.surface_distance import sample_surface

SAMPLES = 20_000  # points at which the thickness of the wall is measured
MAX_THIN_SHARE = 1e-3  # of the points that may lie on thin walls, such as slivers of the mesh
STEP_INSIDE = 1e-4  # of the size of the mesh, from the surface to the start of a ray
BED_SHARE = 0.005  # of the height: faces this close to the lowest point rest on the bed


@dataclass(frozen=True, kw_only=True)
class PrintCheck:
    """What was measured of a mesh for printing.

    Attributes:
        options: What was asked for.
        open_edges: Number of open edges.
        pieces: Number of separate pieces.
        thin_share: Share of the surface whose wall is thinner than asked for.
        thinnest_mm: Thickness below which MAX_THIN_SHARE of the surface lies.
        overhang_share: Share of the surface that overhangs more than asked for.
    """

    options: PrintOptions
    open_edges: int
    pieces: int
    thin_share: float
    thinnest_mm: float
    overhang_share: float

    @property
    def problems(self) -> list[str]:
        """What keeps the mesh from being printed as it is, one phrase each."""
        found = []
        if self.open_edges:
            found.append(f"the surface is not closed, it has {self.open_edges} open edges")
        if self.pieces > 1:
            found.append(f"it has {self.pieces} separate pieces")
        if self.thin_share > MAX_THIN_SHARE:
            found.append(
                f"{100 * self.thin_share:.1f} % of the surface has walls below "
                f"{self.options.min_wall_mm:g} mm, the thinnest about {self.thinnest_mm:.2f} mm"
            )
        if self.overhang_share > 0:
            found.append(
                f"{100 * self.overhang_share:.1f} % of the surface overhangs more than "
                f"{self.options.max_overhang_degrees:g} degrees and needs supports"
            )
        return found

    def __str__(self) -> str:
        size = f"at {self.options.size_mm:g} mm"
        if not self.problems:
            return f"print check {size}: closed, one piece, thick enough, no steep overhang"
        return f"print check {size}: {'; '.join(self.problems)}"


def check_print(vertices: Vertices, faces: Faces, options: PrintOptions) -> PrintCheck:
    """Measure whether a mesh can be printed, standing upright.

    The thickness of the wall at a point is the distance to the surface on the other side, straight
    inwards.

    Args:
        vertices: [V, 3], y up.
        faces: [F, 3], counterclockwise seen from outside.
        options: Size of the print, and the limits.

    Raises:
        UserError: If a library is missing.
    """
    check_libraries()
    low, high = vertices.min(0), vertices.max(0)
    mm = options.size_mm / float((high - low).max())
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_areas = np.linalg.norm(cross, axis=1)
    # The angle of a face from the vertical is the angle of its normal from the horizontal.
    steep = -cross[:, 1] > math.sin(math.radians(options.max_overhang_degrees)) * double_areas
    bed = low[1] + BED_SHARE * (high[1] - low[1])
    steep &= ~(corners[:, :, 1] <= bed).all(1)
    thickness = mm * wall_thickness(vertices, faces)
    used = label_pieces(len(vertices), faces)[faces[:, 0]]
    return PrintCheck(
        options=options,
        open_edges=count_open_edges(faces),
        pieces=len(np.unique(used)),
        thin_share=float((thickness < options.min_wall_mm).mean()),
        thinnest_mm=float(np.quantile(thickness, MAX_THIN_SHARE)),
        overhang_share=float(double_areas[steep].sum() / double_areas.sum()),
    )


def wall_thickness(vertices: Vertices, faces: Faces) -> NDArray[np.float64]:
    """Return the thickness of the wall at points that are spread over the surface by area.

    Args:
        vertices: [V, 3].
        faces: [F, 3], counterclockwise seen from outside.

    Returns:
        float64 [SAMPLES] in the unit of the vertices, infinite where nothing lies behind.
    """
    import trimesh

    points, normals, _ = sample_surface(vertices, faces, SAMPLES, seed=0)
    step = STEP_INSIDE * float(np.ptp(vertices, axis=0).max())
    mesh = trimesh.Trimesh(vertices, faces, process=False, validate=False)
    origins = points - step * normals
    hits, rays, _ = mesh.ray.intersects_location(origins, -normals, multiple_hits=False)
    thickness = np.full(len(points), np.inf)
    thickness[rays] = np.linalg.norm(hits - origins[rays], axis=1) + step
    return thickness


def check_libraries() -> None:
    """Check that the library for rays is installed.

    Raises:
        UserError: If it is not.
    """
    try:
        import embreex  # noqa: F401
    except ImportError as error:
        raise UserError("--check-print needs the library embreex: pip install embreex") from error
