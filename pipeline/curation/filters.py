"""Rules on metadata, files and geometry. A rule has a reason code, a threshold and a value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.licences import licence_of
from pipeline.mesh_io.formats import check_format
from pipeline.mesh_io.load_warnings import LoadWarning

NAMED_BY_USER = ("folder", "procedural")  # sources whose assets the user named


def filter_metadata(record: Record, cfg: FilterConfig, blender: str = "") -> None:
    """Check what a catalogue states about an asset, before the asset is downloaded.

    Assets of a folder and of the embedded data set pass, because the user named them.

    Args:
        record: The asset.
        cfg: The thresholds.
        blender: The option --load.blender.

    Raises:
        Reject: In this order, "unsupported_format", "missing_extra" (the libraries of the reader
            are not installed) or "missing_blender", "licence" (not accepted, or unknown),
            "age_restricted", "animated" or "banned_word".
    """
    if record.source in NAMED_BY_USER:
        return
    check_format(record.format, blender)
    if licence_of(record.licence) not in {licence_of(name) for name in cfg.licences}:
        raise Reject("licence", licence=record.licence)
    metadata = json.loads(record.metadata or "{}")
    if metadata.get("age_restricted") and not cfg.age_restricted:
        raise Reject("age_restricted")
    animations = metadata.get("animations", 0)
    if cfg.max_animations is not None and animations > cfg.max_animations:
        raise Reject("animated", animations=animations, max_animations=cfg.max_animations)
    name_words = re.findall(r"[\w-]+", metadata.get("name", "").lower())
    tags = (tag.lower() for tag in metadata.get("tags", ()))
    banned = sorted({*name_words, *tags} & {word.lower() for word in cfg.banned_words})
    if banned:
        raise Reject("banned_word", word=banned[0])


def filter_file(path: Path, cfg: FilterConfig) -> dict[str, float]:
    """Check the size of a file.

    Returns:
        {"bytes": size of the file}.

    Raises:
        Reject: "file_too_small" or "file_too_large".
    """
    size = path.stat().st_size
    if size < cfg.min_bytes:
        raise Reject("file_too_small", bytes=size, min_bytes=cfg.min_bytes)
    if size > cfg.max_bytes:
        raise Reject("file_too_large", bytes=size, max_bytes=cfg.max_bytes)
    return {"bytes": size}


def filter_warnings(warnings: Iterable[LoadWarning], cfg: FilterConfig) -> None:
    """Check the warnings of the reader.

    Args:
        warnings: What the reader left out or could not read.
        cfg: The codes that reject an asset.

    Raises:
        Reject: "load_warning", with the first code in alphabetical order, its count and examples.
    """
    for warning in sorted(warnings, key=lambda item: item.code):
        if warning.code in cfg.reject_warnings:
            raise Reject(
                "load_warning",
                code=warning.code,
                count=warning.count,
                examples=list(warning.examples),
            )


def filter_share(
    reason: Literal["translucent", "too_thin"], share: float, cfg: FilterConfig
) -> None:
    """Check a share of the surface.

    Args:
        reason: What the share states. "translucent": the share of the area that is neither opaque
            nor invisible. "too_thin": the share of the visible area that leaves no sign change in
            the bricks of one resolution.
        share: The share, 0 to 1.
        cfg: The thresholds.

    Raises:
        Reject: The reason, if the share is above its threshold.
    """
    largest = {"translucent": cfg.max_translucent_share, "too_thin": cfg.max_thin_share}[reason]
    if share > largest:
        raise Reject(reason, share=share, max_share=largest)


def filter_geometry(mesh: Mesh, cfg: FilterConfig) -> dict[str, float]:
    """Check the geometry of a mesh.

    Args:
        mesh: A mesh in any frame.
        cfg: The thresholds. They do not depend on position and size of the mesh.

    Returns:
        The values of the manifest by name: faces, vertices, components (connected components of
        the surface), area and volume (signed), both in units of the mesh.

    Raises:
        Reject: In this order, "too_many_faces", "too_few_faces" (none at all), "degenerate" (a
            point, a line, or hardly any area), "flat" (all in one plane), "too_few_faces",
            "degenerate_faces" or "too_many_components".
    """
    faces = len(mesh.faces)
    vertices = len(mesh.vertices)
    if faces > cfg.max_faces:
        raise Reject("too_many_faces", faces=faces, max_faces=cfg.max_faces)
    if faces == 0:
        raise Reject("too_few_faces", faces=0, min_faces=cfg.min_faces)
    corners = mesh.vertices[mesh.faces]  # [F, 3, 3]
    longest = float((corners.max(axis=(0, 1)) - corners.min(axis=(0, 1))).max())
    areas, volume = _areas_and_volume(corners)
    area = float(areas.sum())
    relative_area = area / longest**2 if longest > 0 else 0.0
    extents = _principal_extents(corners.reshape(-1, 3))
    if relative_area < cfg.min_area or extents[1] < cfg.min_width * extents[0]:
        limits = {"min_area": cfg.min_area, "min_width": cfg.min_width}
        raise Reject("degenerate", relative_area=relative_area, extents=extents, **limits)
    if extents[2] < cfg.min_thickness * extents[0]:
        raise Reject("flat", extents=extents, min_thickness=cfg.min_thickness)
    if faces < cfg.min_faces:
        raise Reject("too_few_faces", faces=faces, min_faces=cfg.min_faces)
    share = float((areas < cfg.degenerate_area * longest**2).mean())
    if share > cfg.max_degenerate_share:
        raise Reject("degenerate_faces", share=share, max_share=cfg.max_degenerate_share)
    components = count_components(mesh.vertices, mesh.faces)
    if components > cfg.max_components:
        raise Reject(
            "too_many_components", components=components, max_components=cfg.max_components
        )
    return {
        "faces": faces,
        "vertices": vertices,
        "components": components,
        "area": area,
        "volume": volume,
    }


def _areas_and_volume(corners: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the areas [F] and the signed volume of triangles with the corners [F, 3, 3]."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    # Relative to the middle, the "volume" of an open mesh does not grow with its distance to the
    # origin.
    middle = corners.mean(axis=(0, 1))
    volume = float(np.einsum("fi,fi->", corners[:, 0] - middle, normals) / 6)
    return np.linalg.norm(normals, axis=1) / 2, volume


def _principal_extents(points: NDArray[np.float64]) -> list[float]:
    """Return the extents of points [P, 3] along their principal axes, the longest first."""
    centred = points - points.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return sorted(np.ptp(centred @ axes, axis=0).tolist(), reverse=True)


def count_components(vertices: NDArray[np.float64], faces: NDArray[np.int32]) -> int:
    """Count the connected components of a surface.

    Two faces are connected if corners of them have the same position. Vertices without faces do not
    count.

    Args:
        vertices: [V, 3].
        faces: [F, 3], at least one.
    """
    welded = weld(vertices)[faces]
    count = int(welded.max()) + 1
    # The edges 0-1 and 1-2 of each face connect its three corners.
    rows = welded[:, [0, 1]].ravel()
    cols = welded[:, [1, 2]].ravel()
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(count, count))
    _, label = connected_components(graph.tocsr(), directed=False)
    return len(np.unique(label[welded[:, 0]]))


def weld(vertices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the distinct positions of vertices.

    Args:
        vertices: [V, 3].

    Returns:
        [V]. Two vertices have the same number exactly if their positions are equal. -0.0 equals
        0.0.
    """
    # Sorting one 64-bit hash per vertex is faster than sorting rows of three numbers.
    bits = np.ascontiguousarray(vertices + 0.0).view(np.uint64)
    with np.errstate(over="ignore"):
        key = bits[:, 0] * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(29))) + bits[:, 1] * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(31))) + bits[:, 2] * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(32)
    _, first, label = np.unique(key, return_index=True, return_inverse=True)
    # If two positions have the same hash, sort by the positions themselves.
    if (bits != bits[first[label]]).any():
        _, label = np.unique(bits, axis=0, return_inverse=True)
    return label.ravel()
