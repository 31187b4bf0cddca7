"""Write the pieces of a shape as one binary glTF file."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array

from pipeline.core.color import srgb_to_linear
from pipeline.sources.shapes.pieces import Paint, Piece, Points, Triangles

FLOAT = 5126
UINT32 = 5125
ARRAY_BUFFER = 34962
ELEMENT_BUFFER = 34963


def to_glb(pieces: list[Piece]) -> bytes:
    """Encode pieces as GLB: one node and one mesh with a primitive per piece.

    Normals are split at the creases of a piece. Equal pieces give equal bytes.
    """
    writer = _Writer()
    primitives = [writer.primitive(piece) for piece in pieces]
    document = {
        "asset": {"version": "2.0", "generator": "procedural shapes"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": primitives}],
        "materials": writer.materials,
        "accessors": writer.accessors,
        "bufferViews": writer.views,
        "buffers": [{"byteLength": len(writer.data)}],
    }
    if writer.images:
        document |= {
            "images": writer.images,
            "textures": [{"source": i, "sampler": 0} for i in range(len(writer.images))],
            "samplers": [{"wrapS": 10497, "wrapT": 10497}],
        }
    text = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(writer.data), b"BIN\0") + bytes(writer.data)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


class _Writer:
    """Collects the arrays, materials and images of one file. Equal materials are written once."""

    def __init__(self):
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.materials: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self._materials: dict[tuple[object, ...], int] = {}
        self._images: dict[bytes, int] = {}

    def primitive(self, piece: Piece) -> dict[str, Any]:
        """Add the arrays of a piece and return its glTF primitive."""
        vertices, faces, normals, source = split_at_creases(piece)
        uv = piece.uv[source] if piece.uv is not None else None
        if piece.paint.texture is not None and uv is None:
            vertices, faces, normals, uv = _box_mapped(vertices, faces, normals, piece.paint.tiles)
        attributes = {
            "POSITION": self._array(vertices, bounds=True),
            "NORMAL": self._array(normals),
        }
        if piece.paint.texture is not None:
            assert uv is not None
            attributes["TEXCOORD_0"] = self._array(uv * [1, -1] + [0, 1])  # glTF: v = 0 at the top
        if piece.colors is not None:
            attributes["COLOR_0"] = self._array(srgb_to_linear(piece.colors[source]))
        indices = self._view(faces.astype("<u4").tobytes(), ELEMENT_BUFFER)
        self.accessors.append(
            {"bufferView": indices, "componentType": UINT32, "count": faces.size, "type": "SCALAR"}
        )
        return {
            "attributes": attributes,
            "indices": len(self.accessors) - 1,
            "material": self._material(piece.paint),
        }

    def _view(self, data: bytes, target: int | None = None) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)}
        self.views.append(view if target is None else view | {"target": target})
        self.data += data
        self.data += b"\0" * (-len(self.data) % 4)
        return len(self.views) - 1

    def _array(self, values: NDArray[np.float64], *, bounds: bool = False) -> int:
        values = np.ascontiguousarray(values, dtype="<f4")
        accessor = {
            "bufferView": self._view(values.tobytes(), ARRAY_BUFFER),
            "componentType": FLOAT,
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        if bounds:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self.accessors.append(accessor)
        return len(self.accessors) - 1

    def _material(self, paint: Paint) -> int:
        image = None if paint.texture is None else self._image(paint.texture)
        key = (paint.color, image, paint.metallic, paint.roughness)
        if key not in self._materials:
            factor = (
                [1.0] * 4
                if image is not None
                else [*srgb_to_linear(np.array(paint.color, np.float64)).round(6).tolist(), 1.0]
            )
            surface: dict[str, Any] = {
                "baseColorFactor": factor,
                "metallicFactor": paint.metallic,
                "roughnessFactor": paint.roughness,
            }
            if image is not None:
                surface["baseColorTexture"] = {"index": image}
            self.materials.append({"pbrMetallicRoughness": surface, "doubleSided": True})
            self._materials[key] = len(self.materials) - 1
        return self._materials[key]

    def _image(self, texture: NDArray[np.uint8]) -> int:
        file = io.BytesIO()
        Image.fromarray(texture).save(file, format="PNG")
        data = file.getvalue()
        if data not in self._images:
            self.images.append({"bufferView": self._view(data), "mimeType": "image/png"})
            self._images[data] = len(self.images) - 1
        return self._images[data]


def split_at_creases(piece: Piece) -> tuple[Points, Triangles, Points, NDArray[np.int64]]:
    """Repeat the vertices at creases, so that each has one normal.

    The normal of a face's corner is the mean, weighted by area, of the normals of all faces at this
    position that differ from the face's own by less than the crease angle.

    Returns:
        Vertices [W, 3], faces [F, 3], unit normals [W, 3] and the original vertex [W] of each.
    """
    # Normals of faces.
    corners = piece.vertices[piece.faces]
    area_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    face_normals = area_normals / np.maximum(
        np.linalg.norm(area_normals, axis=1, keepdims=True), 1e-30
    )
    # All pairs of a corner and a face at the corner's position.
    _, position_of_vertex = np.unique(piece.vertices, axis=0, return_inverse=True)
    position = position_of_vertex.ravel()[piece.faces].ravel()  # [3F] of each corner
    face_of_corner = np.repeat(np.arange(len(piece.faces)), 3)
    faces_at = coo_array((np.ones(len(position)), (position, face_of_corner))).tocsr()
    degree = np.diff(faces_at.indptr)[position]
    corner = np.repeat(np.arange(len(position)), degree)
    offset = np.arange(len(corner)) - np.repeat(np.cumsum(degree) - degree, degree)
    neighbour = faces_at.indices[faces_at.indptr[position][corner] + offset]
    # Sum over the faces within the crease angle.
    cosine = (face_normals[face_of_corner[corner]] * face_normals[neighbour]).sum(axis=1)
    is_smooth = cosine > np.cos(np.radians(piece.crease_degrees))
    total = np.zeros((len(position), 3))
    np.add.at(total, corner[is_smooth], area_normals[neighbour[is_smooth]])
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normals = np.where(length > 1e-30, total / np.maximum(length, 1e-30), [0.0, 1.0, 0.0])
    # Corners of one vertex with the same normal share a new vertex.
    key = np.column_stack([piece.faces.ravel(), np.rint(normals * 1000).astype(np.int64)])
    _, first, faces = np.unique(key, axis=0, return_index=True, return_inverse=True)
    source = piece.faces.ravel()[first]
    return piece.vertices[source], faces.reshape(-1, 3), normals[first], source


def _box_mapped(
    vertices: Points, faces: Triangles, normals: Points, tiles: float
) -> tuple[Points, Triangles, Points, Points]:
    """Add texture coordinates along the two axes most orthogonal to each face's normal.

    Each corner becomes a vertex of its own.

    Returns:
        Vertices [3F, 3], faces [F, 3], normals [3F, 3] and texture coordinates [3F, 2].
    """
    corners = vertices[faces]
    area_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal_axis = np.abs(area_normals).argmax(axis=1)
    axes = np.array([[2, 1], [0, 2], [0, 1]])[normal_axis]  # [F, 2]
    projected = np.take_along_axis(corners, np.repeat(axes[:, None], 3, axis=1), axis=2)
    uv = projected.reshape(-1, 2) * tiles
    flat = faces.ravel()
    return vertices[flat], np.arange(len(flat)).reshape(-1, 3), normals[flat], uv
