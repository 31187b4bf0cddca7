"""Writes glTF files of any content for tests: every property can be given as it shall stand."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.schema import Mesh
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import LoadReport, load_with_report
from tests.pipeline.mesh_files import FACES, TETRA, glb, write

COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
CFG = LoadConfig()

# A box of side 1 with one corner at the origin, faces outward.
BOX = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype="<f4")
BOX_FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5]),
        *([0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6]),
        *([0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ],
    dtype="<u4",
)


class GltfFile:
    """A document under construction.

    Attributes:
        document: The document, which may be changed at will.
        data: The content of its only buffer.
    """

    def __init__(self, **root: Any):
        self.document: dict[str, Any] = {"asset": {"version": "2.0"}} | root
        self.data = b""

    def add(self, kind: str, **fields: Any) -> int:
        """Append an element of a kind, such as "nodes", and return its number."""
        self.document.setdefault(kind, []).append(fields)
        return len(self.document[kind]) - 1

    def view(self, content: bytes, **fields: Any) -> int:
        """Append a buffer view and return its number."""
        start = len(self.data)
        self.data += content + b"\0" * (-len(content) % 4)
        place = {"buffer": 0, "byteOffset": start, "byteLength": len(content)}
        return self.add("bufferViews", **(place | fields))

    def accessor(self, values: Any, dtype: str = "f4", **fields: Any) -> int:
        """Append an accessor with its view and return its number."""
        array = np.asarray(values, dtype="<" + dtype)
        array = array.reshape(len(array), -1)
        stated = {
            "componentType": COMPONENTS[dtype],
            "count": len(array),
            "type": TYPES[array.shape[1]],
        }
        if "bufferView" not in fields and "sparse" not in fields:
            stated["bufferView"] = self.view(array.tobytes())
        return self.add("accessors", **(stated | fields))

    def primitive(
        self, vertices: Any = TETRA, faces: Any = FACES, attributes: Any = None, **fields: Any
    ) -> dict[str, Any]:
        """Return a primitive. `attributes` has accessors, or arrays of float32."""
        numbers = {} if vertices is None else {"POSITION": self.accessor(vertices)}
        for name, values in (attributes or {}).items():
            numbers[name] = values if isinstance(values, int) else self.accessor(values)
        if faces is not None:
            fields = {"indices": self.accessor(np.ravel(faces), "u4")} | fields
        return {"attributes": numbers} | fields

    def mesh(self, *primitives: dict[str, Any], **fields: Any) -> int:
        """Append a mesh and return its number."""
        return self.add("meshes", primitives=list(primitives), **fields)

    def draw(self, *primitives: dict[str, Any], **fields: Any) -> int:
        """Append a mesh and a node of the scene that draws it. Return the number of the node."""
        return self.root(mesh=self.mesh(*primitives), **fields)

    def root(self, **fields: Any) -> int:
        """Append a node of the scene and return its number."""
        number = self.add("nodes", **fields)
        self.document.setdefault("scenes", [{"nodes": []}])[0]["nodes"].append(number)
        return number

    def image(self, content: bytes, **texture: Any) -> int:
        """Append a texture with an image of its own and return the number of the texture."""
        source = self.add("images", bufferView=self.view(content))
        return self.add("textures", **({"source": source} | texture))

    def glb(self) -> bytes:
        """Return the content of the GLB file."""
        self.document.setdefault("buffers", [{"byteLength": len(self.data)}])
        return glb(self.document, self.data)

    def text(self) -> str:
        """Return the content of the gltf file, with its buffer as a data URI."""
        uri = "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
        return json.dumps(self.document | {"buffers": [{"byteLength": len(self.data), "uri": uri}]})

    def load(self, folder: Path, cfg: LoadConfig = CFG) -> tuple[Mesh, LoadReport]:
        """Write the GLB file and read it."""
        return load_with_report(write(folder / "a.glb", self.glb()), cfg)


def codes(report: LoadReport) -> dict[str, int]:
    """Return {code: count} of the warnings."""
    return {warning.code: warning.count for warning in report.warnings}


def volume(mesh: Mesh) -> float:
    """Return the volume of a closed mesh with outward faces."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


def area(mesh: Mesh) -> float:
    """Return the area of all triangles."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def box_of(mesh: Mesh) -> list[list[float]]:
    """Return the corners of the bounding box."""
    return [mesh.vertices.min(axis=0).tolist(), mesh.vertices.max(axis=0).tolist()]


def by_position(mesh: Mesh, values: Any) -> dict[tuple[float, ...], tuple[float, ...]]:
    """Return {position: value} of all vertices."""
    return {
        tuple(position): tuple(value)
        for position, value in zip(mesh.vertices.round(5).tolist(), values.tolist(), strict=True)
    }
