"""Read the formats that have no reader in `pipeline.mesh_io.readers` yet."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import trimesh
from collada.common import DaeError
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.schema import Material, Mesh, Part
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.file_checks import find_side_file
from pipeline.mesh_io.materials import MaterialConverter


def load_with_trimesh(
    path: Path, extension: str, cfg: LoadConfig, up: str
) -> tuple[Mesh, list[str]]:
    """Read a file whose format has no reader of its own yet. Return the mesh and the warnings."""
    try:
        return _load(path, extension, cfg, up)
    except (DaeError, IndexError, ValueError) as error:
        message = str(error)
        if "out of bounds" in message or "index outside the range" in message:
            raise Reject("index_out_of_range", message=message) from error
        raise ValueError(message) from error


def _load(path: Path, extension: str, cfg: LoadConfig, up: str) -> tuple[Mesh, list[str]]:
    resolver = _SideFileResolver(str(path))
    with _parser_warnings() as parser_warnings:
        data = path.read_bytes()
        if extension == "obj":
            data = use_absolute_indices(data)
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=extension, resolver=resolver, process=False
        )
        geometries, notes = _place_geometries(scene, cfg, linear_colors=False)
    mesh = _concatenate(geometries, up)
    missing = [f"missing side file {name}" for name in resolver.missing]
    return mesh, list(dict.fromkeys(missing + parser_warnings + notes))


def use_absolute_indices(text: bytes) -> bytes:
    """Replace negative vertex numbers in the faces of an OBJ file by positive ones.

    A negative number counts back from the face's own line. The parser counts back from the end of
    the file, which is the same only if no vertex follows the face.

    Args:
        text: Content of the file.

    Returns:
        The rewritten content, or `text` itself if there are no negative numbers.
    """
    if not re.search(rb"(?m)^\s*f\b[^\n]*[ \t/]-\d", text):
        return text
    counts = {b"v": 0, b"vt": 0, b"vn": 0}
    lines = []
    for line in text.split(b"\n"):
        words = line.split()
        if words and words[0] in counts:
            counts[words[0]] += 1
        elif words and words[0] == b"f":
            last = tuple(counts.values())
            # A corner is v, v/vt, v//vn or v/vt/vn.
            corners = (zip(word.split(b"/"), last) for word in words[1:])
            line = b"f " + b" ".join(
                b"/".join(_absolute_index(word, count) for word, count in corner)
                for corner in corners
            )
        lines.append(line)
    return b"\n".join(lines)


def _absolute_index(word: bytes, count: int) -> bytes:
    return b"%d" % (count + 1 + int(word)) if word.startswith(b"-") else word


class _SideFileResolver(trimesh.resolvers.FilePathResolver):
    """Finds side files in the directory of the asset and records the missing ones."""

    def __init__(self, source: str):
        super().__init__(source)
        self.missing: list[str] = []

    def get(self, name: str) -> bytes:
        path = find_side_file(Path(self.parent), name)
        if path is not None:
            with suppress(OSError):
                return path.read_bytes()
        plain_name = unquote(name.strip()).replace("\\", "/")
        self.missing.append(plain_name[:120])
        raise FileNotFoundError(f"no side file {plain_name[:120]}")


@contextmanager
def _parser_warnings() -> Iterator[list[str]]:
    """Collect the parser's log lines about what it left out."""
    handler = _WarningCollector()
    logger = logging.getLogger("trimesh")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _WarningCollector(logging.Handler):
    """Keeps up to 50 log lines that say that something was left out."""

    PHRASES = (
        "failed to load",
        "unable to",
        "skipping",
        "didn't decode",
        "unsupported textures",
        "not loaded",
    )

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if any(phrase in line for phrase in self.PHRASES) and len(self.lines) < 50:
            self.lines.append(line[:200])


@dataclass(frozen=True, kw_only=True)
class _PlacedGeometry:
    """One geometry of a scene in world coordinates, with V vertices and F faces."""

    vertices: NDArray[np.float64]  # [V, 3]
    faces: NDArray[np.int64]  # [F, 3]
    material: Material
    uv: NDArray[np.float32] | None = None  # [V, 2]
    colors: NDArray[np.uint8] | None = None  # [V, 4]
    normals: NDArray[np.float32] | None = None  # [V, 3]

    @property
    def appearance_key(self) -> tuple[object, ...]:
        """Geometries with equal keys can form one part."""
        return (id(self.material), self.uv is None, self.colors is None, self.normals is None)


def _place_geometries(
    scene: trimesh.Scene, cfg: LoadConfig, *, linear_colors: bool
) -> tuple[list[_PlacedGeometry], list[str]]:
    """Return the placed triangle geometries of a scene in its order, and warnings about others."""
    if not scene.geometry:
        raise Reject("empty_scene")
    with_faces = {
        name: geometry
        for name, geometry in scene.geometry.items()
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces)
    }
    if not with_faces:
        kinds = sorted({type(geometry).__name__ for geometry in scene.geometry.values()})
        points = sum(len(getattr(geometry, "vertices", ())) for geometry in scene.geometry.values())
        raise Reject("points_only" if points else "empty_scene", points=points, kinds=kinds)
    nodes = [scene.graph[name] for name in scene.graph.nodes_geometry]
    placed = [(matrix, with_faces[name]) for matrix, name in nodes if name in with_faces]
    if not placed:
        raise Reject("empty_scene", geometries=len(with_faces))
    total = sum(len(geometry.faces) for _, geometry in placed)
    if total > cfg.max_faces or len(placed) > cfg.max_instances:
        raise Reject("too_many_faces", faces=total, instances=len(placed), max_faces=cfg.max_faces)
    converter = MaterialConverter(cfg.max_texture_side, linear_colors=linear_colors)
    geometries = [
        _place(geometry, np.asarray(matrix, dtype=np.float64), converter)
        for matrix, geometry in placed
    ]
    skipped = len(scene.geometry) - len(with_faces)
    notes = [f"left out {skipped} geometries without faces"] if skipped else []
    return geometries, notes + converter.warnings


def _place(
    geometry: trimesh.Trimesh, matrix: NDArray[np.float64], converter: MaterialConverter
) -> _PlacedGeometry:
    """Convert a geometry and transform it by its node's matrix [4, 4]."""
    vertices = np.asarray(geometry.vertices, dtype=np.float64)
    faces = np.asarray(geometry.faces, dtype=np.int64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise Reject("index_out_of_range", index=int(faces.max()), vertices=len(vertices))
    material, uv, colors, face_colors = converter.convert(geometry)
    # The cache holds the normals of the file. The property would compute missing ones.
    normals = geometry._cache["vertex_normals"]
    if normals is None or len(normals) != len(vertices):
        normals = None
    else:
        normals = np.asarray(normals, dtype=np.float64)

    # Colours by face: give each corner a vertex of its own.
    if face_colors is not None:
        corners = faces.ravel()
        uv, normals = (None if array is None else array[corners] for array in (uv, normals))
        vertices = vertices[corners]
        colors = np.repeat(face_colors, 3, axis=0)
        faces = np.arange(len(vertices)).reshape(-1, 3)

    # World coordinates. A mirroring matrix reverses the faces.
    with np.errstate(over="ignore", invalid="ignore"):  # not finite vertices are rejected below
        vertices = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    if np.linalg.det(matrix[:3, :3]) < 0:
        faces = faces[:, ::-1]
    if normals is not None:
        normals = _normalized(normals @ _cofactors(matrix[:3, :3]).T)

    # Drop faces with two equal corners, then vertices without faces.
    corners = vertices[faces]
    is_distinct = (corners != np.roll(corners, 1, axis=1)).any(axis=2).all(axis=1)
    used, faces = np.unique(faces[is_distinct], return_inverse=True)
    is_finite = np.isfinite(vertices[used])
    if not is_finite.all():
        raise Reject("non_finite_vertices", vertices=int((~is_finite).any(axis=1).sum()))
    return _PlacedGeometry(
        vertices=vertices[used],
        faces=faces.reshape(-1, 3),
        material=material,
        uv=None if uv is None else np.ascontiguousarray(uv[used], dtype=np.float32),
        colors=None if colors is None else np.ascontiguousarray(colors[used], dtype=np.uint8),
        normals=None if normals is None else np.ascontiguousarray(normals[used], dtype=np.float32),
    )


def _cofactors(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix [3, 3] that transforms normals, up to a positive factor.

    Unlike the inverse transpose it exists for singular matrices too.
    """
    rows = [np.cross(linear[(i + 1) % 3], linear[(i + 2) % 3]) for i in range(3)]
    return np.stack(rows) * (-1 if np.linalg.det(linear) < 0 else 1)


def _normalized(normals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale vectors [V, 3] to length 1. A zero or undefined vector becomes (0, 1, 0)."""
    normals = np.nan_to_num(normals)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 0, normals / np.where(length > 0, length, 1), [0.0, 1.0, 0.0])


def _concatenate(geometries: list[_PlacedGeometry], up: str) -> Mesh:
    """Join all geometries to one mesh. Geometries with the same appearance become one part.

    Raises:
        Reject: "degenerate" if no face has three distinct corners.
    """
    groups: dict[tuple[object, ...], list[_PlacedGeometry]] = {}
    for geometry in geometries:
        if len(geometry.faces):
            groups.setdefault(geometry.appearance_key, []).append(geometry)
    if not groups:
        raise Reject("degenerate", faces=0)
    vertices = []
    faces = []
    parts = []
    num_vertices = num_faces = 0
    for group in groups.values():
        first_vertex, first_face = num_vertices, num_faces
        for geometry in group:
            vertices.append(geometry.vertices)
            faces.append(geometry.faces + num_vertices)
            num_vertices += len(geometry.vertices)
            num_faces += len(geometry.faces)
        parts.append(
            Part(
                vertices=slice(first_vertex, num_vertices),
                faces=slice(first_face, num_faces),
                material=group[0].material,
                uv=_joined_attribute(group, "uv"),
                colors=_joined_attribute(group, "colors"),
                normals=_to_y_up(_joined_attribute(group, "normals"), up),
            )
        )
    return Mesh(
        vertices=_to_y_up(np.concatenate(vertices), up),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts),
    )


def _joined_attribute(group: list[_PlacedGeometry], name: str) -> Any:
    arrays = [getattr(geometry, name) for geometry in group]
    return None if arrays[0] is None else np.concatenate(arrays)


def _to_y_up(vectors: Any, up: str) -> Any:
    """Rotate vectors [N, 3] of a z-up file to y up: (x, y, z) becomes (x, z, -y)."""
    if vectors is None or up == "y":
        return vectors
    return np.ascontiguousarray(vectors[:, [0, 2, 1]] * np.array([1, 1, -1], dtype=vectors.dtype))
