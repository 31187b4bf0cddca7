"""Read a mesh file of any supported format into one triangle mesh with its appearance; runs in an isolated child."""

from __future__ import annotations

import io
import logging
import re
import struct
import zipfile
import zlib
from contextlib import suppress
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
from pipeline.mesh_io.file_checks import check_file, side_file
from pipeline.mesh_io.gltf import prepared
from pipeline.mesh_io.materials import Looks

# what the parsers of nine formats raise on a broken file
PARSER_ERRORS = (
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    NameError,
    NotImplementedError,
    OSError,
    RecursionError,
    StopIteration,
    SyntaxError,  # lxml
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    DaeError,
    trimesh.exchange.stl.HeaderError,
)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was missing or left out, none of it fatal."""

    warnings: tuple[str, ...] = ()


def load(path: Path, cfg: LoadConfig, *, up: str = "y") -> Mesh:
    """The mesh of a glb, gltf, obj, ply, stl, off, 3mf, dae or zae file; see `load_with_report`."""
    return load_with_report(path, cfg, up=up)[0]


def load_with_report(path: Path, cfg: LoadConfig, *, up: str = "y") -> tuple[Mesh, LoadReport]:
    """One triangle mesh in the file's frame, y up (up="z" turns it), node transforms baked, and what went missing.

    Vertices that no face uses and faces with two equal corners are dropped. Parts with the same look are joined.
    Reject: "empty_file", "lfs_pointer", "wrong_magic", "unreadable" (parser's error), "allocation_bomb",
    "too_many_faces", "empty_scene", "points_only", "index_out_of_range", "non_finite_vertices", "degenerate".
    ValueError if up is not "y" or "z".
    """
    if up not in ("y", "z"):
        raise ValueError(f'up must be "y" or "z", got {up!r}')
    resolver = _Resolver(str(path))
    notes = _Notes()
    logger = logging.getLogger("trimesh")
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.DEBUG)
    try:
        extension = check_file(path, cfg)
        data = path.read_bytes()
        linear_colors = extension in ("glb", "gltf")
        if extension == "obj":
            data = absolute_indices(data)
        elif extension == "stl":
            data = without_trailer(data)
        elif linear_colors:
            data, extension = prepared(data, extension, resolver.get)
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=extension, resolver=resolver, process=False
        )
        pieces, dropped = _pieces(scene, cfg, linear_colors=linear_colors)
    except PARSER_ERRORS as error:
        message = str(error).replace(str(path.parent), "")[:200]  # the same on every machine
        past_the_end = isinstance(error, IndexError) and "out of bounds" in message
        if past_the_end or "index outside the range" in message:
            raise Reject("index_out_of_range", message=message) from error
        raise Reject("unreadable", error=type(error).__name__, message=message) from error
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
    mesh = _concatenate(pieces, up)
    warnings = [f"missing side file {name}" for name in resolver.missing] + notes.lines + dropped
    return mesh, LoadReport(warnings=tuple(dict.fromkeys(warnings)))


def absolute_indices(text: bytes) -> bytes:
    """An OBJ file whose faces count vertices from the start; negative numbers count back from the face's own line.

    The parser below takes -1 for the last vertex of the whole file, which is the same only if no vertex follows.
    """
    if not re.search(rb"(?m)^\s*f\b[^\n]*[ \t/]-\d", text):
        return text
    seen, lines = {b"v": 0, b"vt": 0, b"vn": 0}, []
    for line in text.split(b"\n"):
        words = line.split()
        if words and words[0] in seen:
            seen[words[0]] += 1
        elif words and words[0] == b"f":
            last = tuple(seen.values())
            corners = (
                zip(word.split(b"/"), last) for word in words[1:]
            )  # one, two or three numbers each
            line = b"f " + b" ".join(
                b"/".join(_absolute(word, n) for word, n in corner) for corner in corners
            )
        lines.append(line)
    return b"\n".join(lines)


def _absolute(word: bytes, seen: int) -> bytes:
    return b"%d" % (seen + 1 + int(word)) if word.startswith(b"-") else word


def without_trailer(content: bytes) -> bytes:
    """A binary STL file up to its last triangle; the parser below takes one with more behind it for text."""
    end = 84 + 50 * int.from_bytes(content[80:84], "little")  # of text: farther than any file goes
    return content[:end] if len(content) >= 84 else content


class _Resolver(trimesh.resolvers.FilePathResolver):
    """Finds side files beside the asset, never above it, and remembers those that are not there."""

    def __init__(self, source: str):
        super().__init__(source)
        self.missing: list[str] = []

    def get(self, name: str) -> bytes:
        found = side_file(Path(self.parent), name)
        if found is not None:
            with suppress(OSError):
                return found.read_bytes()
        plain = unquote(name.strip()).replace("\\", "/")
        self.missing.append(plain[:120])
        raise FileNotFoundError(f"no side file {plain[:120]}")


class _Notes(logging.Handler):
    """Collects what the parsers say that they left out."""

    WORDS = (
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
        if any(word in line for word in self.WORDS) and len(self.lines) < 50:
            self.lines.append(line[:200])


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One placed geometry: arrays of its own, and what tells which other pieces look the same."""

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    material: Material
    uv: NDArray[np.float32] | None = None
    colors: NDArray[np.uint8] | None = None
    normals: NDArray[np.float32] | None = None

    @property
    def look(self) -> tuple[object, ...]:
        return (id(self.material), self.uv is None, self.colors is None, self.normals is None)


def _pieces(
    scene: trimesh.Scene, cfg: LoadConfig, *, linear_colors: bool
) -> tuple[list[_Piece], list[str]]:
    """The placed triangle geometries of a scene, in its order, and notes about the rest."""
    if not scene.geometry:
        raise Reject("empty_scene")
    solid = {
        name: g
        for name, g in scene.geometry.items()
        if isinstance(g, trimesh.Trimesh) and len(g.faces)
    }
    if not solid:
        kinds = sorted({type(g).__name__ for g in scene.geometry.values()})
        points = sum(len(getattr(g, "vertices", ())) for g in scene.geometry.values())
        raise Reject("points_only" if points else "empty_scene", points=points, kinds=kinds)
    placed = [(name, *scene.graph[name]) for name in scene.graph.nodes_geometry]
    placed = [(matrix, solid[geometry]) for _, matrix, geometry in placed if geometry in solid]
    if not placed:
        raise Reject("empty_scene", geometries=len(solid))
    total = sum(len(geometry.faces) for _, geometry in placed)
    if total > cfg.max_faces or len(placed) > cfg.max_instances:
        raise Reject("too_many_faces", faces=total, instances=len(placed), max_faces=cfg.max_faces)
    looks = Looks(cfg.max_texture_side, linear_colors=linear_colors)
    pieces = [
        _piece(geometry, np.asarray(matrix, dtype=np.float64), looks) for matrix, geometry in placed
    ]
    skipped = len(scene.geometry) - len(solid)
    notes = [f"left out {skipped} geometries without faces"] if skipped else []
    return pieces, notes + looks.warnings


def _piece(geometry: trimesh.Trimesh, matrix: NDArray[np.float64], looks: Looks) -> _Piece:
    vertices = np.asarray(geometry.vertices, dtype=np.float64)
    faces = np.asarray(geometry.faces, dtype=np.int64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise Reject("index_out_of_range", index=int(faces.max()), vertices=len(vertices))
    material, uv, colors, face_colors = looks.of(geometry)
    normals = geometry._cache[
        "vertex_normals"
    ]  # those of the file; the property would make them up
    normals = (
        None
        if normals is None or len(normals) != len(vertices)
        else np.asarray(normals, dtype=np.float64)
    )
    if face_colors is not None:
        uv, normals = (None if a is None else a[faces.ravel()] for a in (uv, normals))
        vertices, colors = vertices[faces.ravel()], np.repeat(face_colors, 3, axis=0)
        faces = np.arange(len(vertices)).reshape(-1, 3)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told below
        vertices = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    if np.linalg.det(matrix[:3, :3]) < 0:
        faces = faces[:, ::-1]
    if normals is not None:
        normals = _unit(normals @ _cofactors(matrix[:3, :3]).T)
    corners = vertices[faces]
    distinct = (corners != np.roll(corners, 1, axis=1)).any(axis=2).all(axis=1)
    used, faces = np.unique(faces[distinct], return_inverse=True)
    if not np.isfinite(vertices[used]).all():
        raise Reject(
            "non_finite_vertices", vertices=int((~np.isfinite(vertices[used])).any(axis=1).sum())
        )
    return _Piece(
        vertices=vertices[used],
        faces=faces.reshape(-1, 3),
        material=material,
        uv=None if uv is None else np.ascontiguousarray(uv[used], dtype=np.float32),
        colors=None if colors is None else np.ascontiguousarray(colors[used], dtype=np.uint8),
        normals=None if normals is None else np.ascontiguousarray(normals[used], dtype=np.float32),
    )


def _cofactors(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """What normals transform by, [3, 3], up to a positive factor; exists for singular matrices too."""
    rows = [np.cross(linear[(i + 1) % 3], linear[(i + 2) % 3]) for i in range(3)]
    return np.stack(rows) * (-1 if np.linalg.det(linear) < 0 else 1)


def _unit(normals: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(np.nan_to_num(normals), axis=1, keepdims=True)
    return np.where(
        length > 0, np.nan_to_num(normals) / np.where(length > 0, length, 1), [0.0, 1.0, 0.0]
    )


def _concatenate(pieces: list[_Piece], up: str) -> Mesh:
    """One mesh; pieces of one look become one part. Reject: "degenerate" when no face has three distinct corners."""
    groups: dict[tuple[object, ...], list[_Piece]] = {}
    for piece in pieces:
        if len(piece.faces):
            groups.setdefault(piece.look, []).append(piece)
    if not groups:
        raise Reject("degenerate", faces=0)
    vertices, faces, parts = [], [], []
    num_vertices = num_faces = 0
    for group in groups.values():
        first_vertex, first_face = num_vertices, num_faces
        for piece in group:
            vertices.append(piece.vertices)
            faces.append(piece.faces + num_vertices)
            num_vertices += len(piece.vertices)
            num_faces += len(piece.faces)
        parts.append(
            Part(
                vertices=slice(first_vertex, num_vertices),
                faces=slice(first_face, num_faces),
                material=group[0].material,
                uv=_joined(group, "uv"),
                colors=_joined(group, "colors"),
                normals=_turned(_joined(group, "normals"), up),
            )
        )
    return Mesh(
        vertices=_turned(np.concatenate(vertices), up),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts),
    )


def _joined(group: list[_Piece], name: str) -> Any:
    arrays = [getattr(piece, name) for piece in group]
    return None if arrays[0] is None else np.concatenate(arrays)


def _turned(vectors: Any, up: str) -> Any:
    """[n, 3] with the up axis brought to y: (x, y, z) -> (x, z, -y) for z-up sources."""
    if vectors is None or up == "y":
        return vectors
    return np.ascontiguousarray(vectors[:, [0, 2, 1]] * np.array([1, 1, -1], dtype=vectors.dtype))
