"""One mesh in, a closed mesh out, with a report of what was done and how far the surface moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.conversion.config import WatertightConfig
from pipeline.core.errors import Reject, RunError, UserError
from pipeline.core.files import write_atomically
from pipeline.core.grid import band, spacing
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.primitives.surface_distance import SurfaceMetrics, compare_surfaces
from pipeline.core.schema import Mesh
from pipeline.core.text import counted
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.holes import undirected_edges, weld
from pipeline.geometry.sdf import SHEET_HALF_VOXELS, compute_bricks
from pipeline.geometry.topology import BURIED, SHEET, SOLID, Topology, build_topology
from pipeline.mesh_io.config import NormalizeConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.normalize import normalize
from pipeline.mesh_io.visible_parts import keep_visible

MAX_TOPOLOGY = 512  # finest grid on which inside and outside are decided
LONGEST_SIDE = 2 * NormalizeConfig().half_extent  # of the normalised mesh


@dataclass(frozen=True, kw_only=True)
class ClosingReport:
    """What closing a mesh did. Shares are of the area of the whole input.

    Attributes:
        input_faces: Number of triangles of the input.
        faces: Number of triangles of the result.
        pieces: Number of connected pieces of the result.
        openings: Number of openings that were closed.
        cap_share: Area of the caps that close them, relative to the input's.
        shells: Number of connected open surfaces that became shells.
        sheet_share: Share of the area that belongs to them.
        shell_thickness: Thickness of the shells, relative to the longest side.
        buried_share: Share of the area that was removed, because nobody sees it from outside.
        hollows: Number of enclosed hollows of the result that were filled.
        voxel: Size of a voxel, relative to the longest side.
        thicken: Distance in voxels by which the surface was moved outwards.
        metrics: Distances between the result and the visible surface of the input.
        warnings: What the reader of the file left out.
    """

    input_faces: int
    faces: int
    pieces: int
    openings: int
    cap_share: float
    shells: int
    sheet_share: float
    shell_thickness: float
    buried_share: float
    hollows: int
    voxel: float
    thicken: float
    metrics: SurfaceMetrics
    warnings: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the report as sentences."""
        yield from (f"The reader left something out: {warning}" for warning in self.warnings)
        if self.openings:
            yield (
                f"{_were(self.openings, 'opening')} closed by caps. They have "
                f"{100 * self.cap_share:.2g} % of the area of the input."
            )
        else:
            yield "No opening had to be closed."
        if self.shells:
            yield (
                f"{_were(self.shells, 'shell')} made of open surfaces, which are "
                f"{100 * self.sheet_share:.3g} % of the area. A shell is "
                f"{100 * self.shell_thickness:.2g} % of the longest side thick."
            )
        else:
            yield "No open surface had to become a shell."
        if self.buried_share > 0:
            yield (
                f"Inner walls were removed. They had {100 * self.buried_share:.3g} % of the area, "
                "which nobody sees from outside."
            )
        else:
            yield "There was no inner wall to remove."
        if self.hollows:
            yield f"{_were(self.hollows, 'enclosed hollow')} filled."
        yield (
            f"The result has {counted(self.faces, 'face')} in "
            f"{counted(self.pieces, 'closed piece')}, the input had "
            f"{counted(self.input_faces, 'face')}. A voxel is "
            f"{100 * self.voxel:.2g} % of the longest side."
        )
        m, unit = self.metrics, LONGEST_SIDE * 2 * self.voxel  # a voxel in the frame [-1, 1]^3
        scores = ", ".join(f"F1({t}) {100 * value:.2f} %" for t, value in m.f1.items())
        yield (
            f"Distances in voxels, to the input and back: mean {m.accuracy / unit:.3f} and "
            f"{m.completeness / unit:.3f}, largest {m.max_accuracy / unit:.2f} and "
            f"{m.max_completeness / unit:.2f}. In the frame [-1, 1]^3: Chamfer "
            f"{m.chamfer:.6f}, {scores}."
        )


def _were(number: int, noun: str) -> str:
    return f"{counted(number, noun)} {'was' if number == 1 else 'were'}"


def close_file(cfg: WatertightConfig) -> tuple[MeshArrays, ClosingReport]:
    """Read a mesh file and close its mesh.

    Returns:
        The vertices and faces in the frame of the file with y up, and the report.

    Raises:
        UserError: If the file cannot be read, or has no surface to close.
    """
    if not cfg.mesh.is_file():
        raise UserError(f"{cfg.mesh} is not a file; name a mesh file")
    try:
        loaded, read = load_with_report(cfg.mesh, cfg.load, up=cfg.up)
        visibility = WarningLog()
        visible, _ = keep_visible(loaded, visibility)
        warnings = tuple(str(warning) for warning in (*read.warnings, *visibility.items()))
        return close_mesh(visible, cfg, warnings)
    except Reject as verdict:
        hint = ""
        if verdict.reason == "no_surface":
            hint = "; its walls are thinner than a voxel: raise --resolution or --thicken"
        raise UserError(f"{cfg.mesh} cannot be closed: {verdict}{hint}") from verdict


def close_mesh(
    mesh: Mesh, cfg: WatertightConfig, warnings: tuple[str, ...] = ()
) -> tuple[MeshArrays, ClosingReport]:
    """Close a mesh in any frame.

    Args:
        mesh: The mesh.
        cfg: The options. Those of the files do not matter.
        warnings: What the reader left out, for the report.

    Returns:
        The closed mesh in the frame of `mesh`, and the report.

    Raises:
        Reject: If the mesh has no area or nothing of it is visible, or if the result has no
            surface.
    """
    normalized = normalize(mesh, NormalizeConfig())
    topology = build_topology(
        normalized,
        TopologyConfig(resolution=min(cfg.resolution, MAX_TOPOLOGY), max_opening=cfg.max_opening),
    )
    bricks = compute_bricks(topology, cfg.resolution)
    step = spacing(cfg.resolution)
    vertices, faces = extract(bricks, cfg.thicken * step / band(cfg.resolution))
    if not len(faces):
        raise Reject("no_surface", resolution=cfg.resolution, thicken=cfg.thicken)
    vertices, faces, hollows = fill_hollows(vertices, faces)
    _check_closed(faces)
    report = _report(
        topology, normalized, (vertices, faces), cfg, hollows=hollows, warnings=warnings
    )
    center, scale = np.asarray(normalized.center), normalized.scale
    return (vertices / scale + center, faces), report


def fill_hollows(
    vertices: NDArray[np.float64], faces: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int32], int]:
    """Remove the pieces that are inside out, which bound enclosed hollows. Return their number."""
    piece_of, count = _pieces(faces, len(vertices))
    a, b, c = vertices[faces].transpose(1, 0, 2)
    volume = np.bincount(piece_of[faces[:, 0]], (a * np.cross(b, c)).sum(1) / 6, count)
    hollow = (volume < 0) & (np.bincount(piece_of[faces[:, 0]], minlength=count) > 0)
    if not hollow.any():
        return vertices, faces, 0
    faces = faces[~hollow[piece_of[faces[:, 0]]]]
    used = np.zeros(len(vertices), np.bool_)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1)[faces].astype(np.int32), int(hollow.sum())


def _pieces(faces: NDArray[np.integer], count: int) -> tuple[NDArray[np.int32], int]:
    """Return the connected piece of each of `count` vertices, and the number of pieces."""
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    ones = np.ones(len(ends), np.int8)
    graph = coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(count, count))
    pieces, piece_of = connected_components(graph, directed=False)
    return piece_of, pieces


def _check_closed(faces: NDArray[np.int32]) -> None:
    """Check that as many faces pass each edge in one direction as in the other.

    Raises:
        RunError: If not. That is an error of this program.
    """
    edges, edge_of, _ = undirected_edges(faces)
    start = faces[:, [0, 1, 2]].ravel()
    direction = np.where(start == edges[edge_of, 0], 1, -1)
    if np.bincount(edge_of, direction, len(edges)).any():
        raise RunError("the result is not closed; please report the mesh and the options")


def _area(triangles: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b, c = triangles.transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def _report(
    topology: Topology,
    normalized: Mesh,
    result: MeshArrays,
    cfg: WatertightConfig,
    *,
    hollows: int,
    warnings: tuple[str, ...],
) -> ClosingReport:
    kinds, own = topology.kinds, topology.openings < 0
    area = _area(topology.triangles)
    total = area[own].sum()
    sheet = kinds == SHEET
    shells = 0
    if sheet.any():
        corners = topology.triangles[sheet].reshape(-1, 3)
        points, faces = weld(corners, np.arange(len(corners), dtype=np.int32).reshape(-1, 3))
        piece_of, _ = _pieces(faces, len(points))
        shells = len(np.unique(piece_of[faces[:, 0]]))
    visible = topology.triangles[own & (kinds != BURIED)].reshape(-1, 3)
    vertices, faces = result
    metrics = compare_surfaces(
        vertices,
        faces,
        visible,
        np.arange(len(visible)).reshape(-1, 3),
        samples=cfg.samples,
    )
    voxel = spacing(cfg.resolution) / LONGEST_SIDE
    return ClosingReport(
        input_faces=len(normalized.faces),
        faces=len(faces),
        pieces=len(np.unique(_pieces(faces, len(vertices))[0])),
        openings=len(np.unique(topology.openings[~own & (kinds == SOLID)])),
        cap_share=float(area[~own & (kinds == SOLID)].sum() / total),
        shells=shells,
        sheet_share=float(area[sheet & own].sum() / total),
        shell_thickness=2 * (SHEET_HALF_VOXELS + cfg.thicken) * voxel,
        buried_share=float(area[own & (kinds == BURIED)].sum() / total),
        hollows=hollows,
        voxel=voxel,
        thicken=cfg.thicken,
        metrics=metrics,
        warnings=warnings,
    )


def write_report(path: Path, report: ClosingReport) -> None:
    """Write the report as JSON."""
    content = asdict(report)
    content["metrics"]["chamfer"] = report.metrics.chamfer
    write_atomically(path, json.dumps(content, indent=1) + "\n")
