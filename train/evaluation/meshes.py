"""Comparison of mesh files: normal maps from all sides, their sharp edges, and distances.

The field reports these numbers for Toys4k. Papers state neither cameras nor frames in full, so ours
are stated in the results.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from pipeline.core.cameras import Camera, look_at_origin
from pipeline.core.errors import Reject, RunError, UserError
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import SampledSurface
from train.evaluation.config import MeshEvaluation
from train.evaluation.image_metrics import normal_map
from train.evaluation.results import markdown_table, write_tables

log = logging.getLogger(__name__)

VIEWS = 22
FOCAL_MM = 100.0
HALF_EXTENT = 0.475  # largest coordinate of a reference in the frame of the comparison
F1_THRESHOLD = 0.001  # in the frame [-1, 1]^3
EDGE_PIXELS = 2  # the neighbourhood of a sharp edge reaches so far
CANNY_SIGMA, CANNY_LOW, CANNY_HIGH = 1.0, 0.1, 0.2  # pixels; thresholds of normals in [0, 1]
HEADS = {
    "normal_mse": "normal MSE x100",
    "sharp_normal_error": "sharp normal error x100",
    "chamfer": "CD x1e5",
    "f1": f"F1({F1_THRESHOLD}) %",
}


@dataclass(frozen=True, kw_only=True)
class MeshResult:
    """How far a mesh is from its reference.

    Args:
        name: Name of both files without their endings.
        normal_mse: Mean squared difference of the normals over the pixels that either mesh covers
            in VIEWS views. Normals are unit vectors, or 0 where a mesh is not. At most 4.
        sharp_normal_error: The same over pixels near the edges of the reference's normal maps. None
            if it has no edge.
        chamfer: Sum of both directions' mean squared distances, in the frame [-1, 1]^3.
        f1: F1 score at F1_THRESHOLD.
    """

    name: str
    normal_mse: float
    sharp_normal_error: float | None
    chamfer: float
    f1: float


def cameras() -> list[Camera]:
    """Return VIEWS cameras in directions that are spread evenly over the sphere."""
    # A Fibonacci lattice: equal steps in height, and in azimuth by the golden angle.
    heights = 1 - (2 * np.arange(VIEWS) + 1) / VIEWS
    golden = 180 * (3 - 5**0.5)
    return [
        look_at_origin((n * golden) % 360, float(np.degrees(np.arcsin(height))), FOCAL_MM)
        for n, height in enumerate(heights)
    ]


def normals_of(
    surface: MeshArrays, camera: Camera, size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the unit normals of a view, [size, size, 3], and the covered pixels.

    The normals are 0 where nothing is covered.
    """
    image = normal_map(*surface, camera, size)
    covered = (image != 255).any(axis=2)
    normals = image / 127.5 - 1
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)
    return np.where(covered[..., None], normals, 0.0), covered


def sharp_pixels(normals: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the pixels near Canny edges of a normal map, [size, size]."""
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise UserError(
            f'sharp edges need scikit-image ({error}): pip install -e ".[metrics]"'
        ) from error
    edges = np.zeros(normals.shape[:2], bool)
    for channel in np.moveaxis((normals + 1) / 2, 2, 0):
        edges |= canny(channel, CANNY_SIGMA, CANNY_LOW, CANNY_HIGH)
    near = binary_dilation(edges, np.ones((3, 3), bool), iterations=EDGE_PIXELS)
    return np.asarray(near, bool)


def normal_errors(
    surface: MeshArrays, reference: MeshArrays, size: int
) -> tuple[float, float | None]:
    """Return the normal MSE and the sharp normal error of MeshResult.

    Args:
        surface: Vertices in the cube [-0.5, 0.5]^3, and faces.
        reference: The same of the reference.
        size: Pixels per side of each view.
    """
    total = sharp_total = 0.0
    pixels = sharp_count = 0
    for camera in cameras():
        found, covered = normals_of(surface, camera, size)
        wanted, reference_covered = normals_of(reference, camera, size)
        squared = ((found - wanted) ** 2).sum(axis=2)
        either = covered | reference_covered
        sharp = sharp_pixels(wanted) & either
        total, pixels = total + squared[either].sum(), pixels + int(either.sum())
        sharp_total += squared[sharp].sum()
        sharp_count += int(sharp.sum())
    return total / max(pixels, 1), sharp_total / sharp_count if sharp_count else None


def compare_meshes(
    name: str, surface: MeshArrays, reference: MeshArrays, *, size: int, samples: int
) -> MeshResult:
    """Compare a mesh with its reference in the reference's frame.

    The reference is centred and scaled until its longest side is 2 * HALF_EXTENT, and the mesh is
    moved with it.

    Args:
        name: Name of the result.
        surface: Vertices [V, 3] and faces.
        reference: The same of the reference.
        size: Pixels per side of each view.
        samples: Points sampled on each surface.

    Raises:
        ValueError: If a mesh has no faces or the reference has no extent.
    """
    vertices = np.asarray(reference[0], np.float64)
    if not len(reference[1]) or not len(surface[1]):
        raise ValueError("meshes must have faces, got none")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    if not 0 < (high - low).max() < np.inf:
        raise ValueError(f"the reference must have an extent, got {(high - low).tolist()}")
    scale = 2 * HALF_EXTENT / (high - low).max()

    def moved(mesh: MeshArrays) -> MeshArrays:
        return (np.asarray(mesh[0], np.float64) - (low + high) / 2) * scale, mesh[1]

    surface, reference = moved(surface), moved(reference)
    mse, sharp = normal_errors(surface, reference, size)
    a, b = (SampledSurface(*mesh, samples=samples) for mesh in (surface, reference))
    to_reference, from_reference = b.tree.closest(a.points)[0], a.tree.closest(b.points)[0]
    precision, recall = ((d < F1_THRESHOLD).mean() for d in (to_reference, from_reference))
    return MeshResult(
        name=name,
        normal_mse=float(mse),
        sharp_normal_error=None if sharp is None else float(sharp),
        chamfer=float((to_reference**2).mean() + (from_reference**2).mean()),
        f1=float(2 * precision * recall / max(precision + recall, 1e-12)),
    )


def pairs(pred: Path, reference: Path) -> list[tuple[str, Path, Path]]:
    """Return the files of both directories that have one name apart from their endings.

    Raises:
        UserError: If a directory is missing, no name is in both, or one is ambiguous.
    """
    from pipeline.mesh_io.formats import MESH_FORMATS

    found: list[dict[str, Path]] = []
    for folder in (pred, reference):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a directory; name one with mesh files")
        files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower().removeprefix(".") not in MESH_FORMATS:
                continue
            if path.stem in files:
                raise UserError(
                    f"{files[path.stem]} and {path} have one name; keep one of them in {folder}"
                )
            files[path.stem] = path
        found.append(files)
    names = sorted(set(found[0]) & set(found[1]))
    if not names:
        raise UserError(
            f"no mesh of {pred} has the name of one in {reference}; "
            "give both meshes of a pair one name"
        )
    missing = sorted(set(found[1]) - set(found[0]))
    if missing:
        log.warning(
            "%d of %d references have no mesh in %s and are left out, the first one %s.",
            *(len(missing), len(found[1]), pred, missing[0]),
        )
    return [(name, found[0][name], found[1][name]) for name in names]


def evaluate_meshes(cfg: MeshEvaluation) -> dict[str, Any]:
    """Compare the mesh files of two directories and write evaluation.json and table.md.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: If the directories have no common names, or a package is missing.
        RunError: If no pair can be read.
    """
    from pipeline.mesh_io.config import LoadConfig
    from pipeline.mesh_io.load import load

    results = []
    for name, pred, reference in pairs(cfg.pred, cfg.reference):
        try:
            meshes = [load(path, LoadConfig()) for path in (pred, reference)]
            surfaces = [(mesh.vertices, mesh.faces) for mesh in meshes]
            result = compare_meshes(name, *surfaces, size=cfg.size, samples=cfg.samples)
        except (Reject, ValueError) as error:
            log.warning("%s is skipped: %s", name, error)
            continue
        results.append(result)
        log.info("%s: normal MSE %.5f, CD %.3g", name, result.normal_mse, result.chamfer)
    if not results:
        raise RunError(f"none of the meshes of {cfg.pred} can be compared")
    protocol = {
        "frame": f"the reference's, its longest side {4 * HALF_EXTENT} of [-1, 1]^3",
        "normals": f"unit normals in {VIEWS} views of {cfg.size}^2 pixels from a Fibonacci "
        "lattice; 0 where a mesh is not; squared difference per pixel that either covers",
        "sharp": f"pixels within {EDGE_PIXELS} of a Canny edge of the reference's normals, "
        f"sigma {CANNY_SIGMA}, thresholds {CANNY_LOW} and {CANNY_HIGH}",
        "CD": "sum of both directions' mean squared point-to-surface distances",
        "samples": cfg.samples,
    }
    table = markdown_table([_means(results)], HEADS, dict.fromkeys(HEADS, 3))
    return write_tables(cfg.out, protocol, results, table)


def _means(results: Sequence[MeshResult]) -> dict[str, Any]:
    """Return the means over meshes in the units of HEADS."""
    sharp = [r.sharp_normal_error for r in results if r.sharp_normal_error is not None]
    return {
        "name": f"{len(results)} meshes",
        "normal_mse": 100 * float(np.mean([result.normal_mse for result in results])),
        "sharp_normal_error": 100 * float(np.mean(sharp)) if sharp else None,
        "chamfer": 1e5 * float(np.mean([result.chamfer for result in results])),
        "f1": 100 * float(np.mean([result.f1 for result in results])),
    }
