"""Predicates on metadata, files and geometry: each has a name, a threshold in its config and a measured value."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.licences import licence_of
from pipeline.mesh_io.file_checks import MESH_FORMATS


def filter_metadata(record: Record, cfg: FilterConfig) -> None:
    """What a catalogue says about an asset, before anything is fetched.

    Reject, in this order: "unsupported_format", "licence" (not on the list, or unknown), "age_restricted", "animated",
    "banned_word". Files of one's own folder pass: their owner named it.
    """
    if record.source in ("folder", "procedural"):
        return
    if record.format not in MESH_FORMATS:
        raise Reject("unsupported_format", format=record.format)
    if licence_of(record.licence) not in {licence_of(name) for name in cfg.licences}:
        raise Reject("licence", licence=record.licence)
    said = json.loads(record.metadata or "{}")
    if said.get("age_restricted") and not cfg.age_restricted:
        raise Reject("age_restricted")
    animations = said.get("animations", 0)
    if cfg.max_animations is not None and animations > cfg.max_animations:
        raise Reject("animated", animations=animations, max_animations=cfg.max_animations)
    words = {
        *re.findall(r"[\w-]+", said.get("name", "").lower()),
        *(tag.lower() for tag in said.get("tags", ())),
    }
    banned = sorted(words & {word.lower() for word in cfg.banned_words})
    if banned:
        raise Reject("banned_word", word=banned[0])


def filter_file(path: Path, cfg: FilterConfig) -> dict[str, float]:
    """{"bytes"} of a file. Reject: "file_too_small", "file_too_large"."""
    size = path.stat().st_size
    if size < cfg.min_bytes:
        raise Reject("file_too_small", bytes=size, min_bytes=cfg.min_bytes)
    if size > cfg.max_bytes:
        raise Reject("file_too_large", bytes=size, max_bytes=cfg.max_bytes)
    return {"bytes": size}


def filter_geometry(mesh: Mesh, cfg: FilterConfig) -> dict[str, float]:
    """Numbers for the manifest: faces, vertices, components, area, volume (signed), in the mesh's own frame.

    Reject, checked in this order: "too_many_faces", "degenerate" (a point, a line, or hardly any area), "flat" (one
    plane holds it all), "too_few_faces", "degenerate_faces", "too_many_components".
    """
    faces, vertices = len(mesh.faces), len(mesh.vertices)
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
        raise Reject("degenerate", relative_area=relative_area, extents=extents)
    if extents[2] < cfg.min_thickness * extents[0]:
        raise Reject("flat", extents=extents)
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
    """Area of every triangle [F] and the signed volume that they enclose, from corners [F, 3, 3]."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    middle = corners.mean(
        axis=(0, 1)
    )  # keeps an open mesh's "volume" from growing with its distance to the origin
    volume = float(np.einsum("fi,fi->", corners[:, 0] - middle, normals) / 6)
    return np.linalg.norm(normals, axis=1) / 2, volume


def _principal_extents(points: NDArray[np.float64]) -> list[float]:
    """Extents of points [P, 3] along their principal axes, the longest first."""
    centred = points - points.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return sorted(np.ptp(centred @ axes, axis=0).tolist(), reverse=True)


def count_components(vertices: NDArray[np.float64], faces: NDArray[np.int32]) -> int:
    """Number of connected pieces of a surface, faces being joined where they share a corner's position.

    vertices [V, 3], faces [F, 3]. Vertices that no face uses do not count.
    """
    welded = weld(vertices)[faces]
    count = int(welded.max()) + 1
    rows, cols = welded[:, [0, 1]].ravel(), welded[:, [1, 2]].ravel()
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(count, count))
    _, label = connected_components(graph.tocsr(), directed=False)
    return len(np.unique(label[welded[:, 0]]))


def weld(vertices: NDArray[np.float64]) -> NDArray[np.int64]:
    """For every vertex [V, 3] a number shared by exactly those at the same position (-0.0 is 0.0): [V]."""
    bits = np.ascontiguousarray(vertices + 0.0).view(np.uint64)
    with np.errstate(over="ignore"):
        key = bits[:, 0] * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(29))) + bits[:, 1] * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(31))) + bits[:, 2] * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(32)
    _, first, label = np.unique(key, return_index=True, return_inverse=True)
    if (
        bits != bits[first[label]]
    ).any():  # two positions with one 64-bit key: sort by the positions themselves
        _, label = np.unique(bits, axis=0, return_inverse=True)
    return label.ravel()
