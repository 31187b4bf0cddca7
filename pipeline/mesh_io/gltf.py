"""Rewrite the parts of a glTF that its parser passes over: normalised integers, texture transforms, skins.

The parser takes integers as they are stored, texture coordinates from set 0 untransformed, and a skinned mesh as if it
had no skin: a character then stands apart from its own hat. Files without any of these are left as they are.
"""

from __future__ import annotations

import base64
import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.file_checks import COMPONENTS

Document = dict[str, Any]
Floats = NDArray[np.float64]
DTYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
FLOAT = 5126


def split_glb(data: bytes) -> tuple[Document, list[bytes]]:
    """The document and the binary chunks of a GLB that passed `check_file`."""
    (size,) = struct.unpack_from("<I", data, 12)
    document, at, chunks = json.loads(data[20 : 20 + size]), 20 + size, []
    while at + 8 <= len(data):
        length, kind = struct.unpack_from("<I4s", data, at)
        if kind == b"BIN\0":
            chunks.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return document, chunks


def prepared(
    data: bytes, extension: str, read_side_file: Callable[[str], bytes]
) -> tuple[bytes, str]:
    """(bytes, extension) for the parser: the file's own, or a GLB of the same scene that it reads right."""
    document, chunks = (
        split_glb(data) if extension == "glb" else (json.loads(data.decode("utf-8-sig")), [])
    )
    if not (_is_skinned(document) or any(_needs_new_attributes(document))):
        return data, extension
    buffers = []
    for buffer in document["buffers"]:
        uri = buffer.get("uri")
        if uri is None:
            buffers.append(chunks.pop(0))
        elif uri.startswith("data:"):
            buffers.append(base64.b64decode(uri.partition("base64,")[2]))
        else:
            buffers.append(read_side_file(uri))
    return _Rewrite(document, buffers).glb(), "glb"


def _primitives(document: Document) -> Iterator[dict[str, Any]]:
    for mesh in document.get("meshes", []):
        yield from mesh["primitives"]


def _is_skinned(document: Document) -> bool:
    return any("skin" in node and "mesh" in node for node in document.get("nodes", []))


def _needs_new_attributes(document: Document) -> Iterator[bool]:
    for primitive in _primitives(document):
        texture = _base_texture(document, primitive)
        yield (
            "KHR_texture_transform" in texture.get("extensions", {})
            or texture.get("texCoord", 0) != 0
        )
        for name, index in primitive["attributes"].items():
            yield name in ("POSITION", "TEXCOORD_0") and bool(
                document["accessors"][index].get("normalized")
            )


def _base_texture(document: Document, primitive: dict[str, Any]) -> dict[str, Any]:
    if "material" not in primitive:
        return {}
    return (
        document["materials"][primitive["material"]]
        .get("pbrMetallicRoughness", {})
        .get("baseColorTexture", {})
    )


class _Rewrite:
    """One pass over a document; its buffers become a single one to which new arrays are appended."""

    def __init__(self, document: Document, buffers: list[bytes]):
        self.document = copy.deepcopy(document)
        padded = [buffer + b"\0" * (-len(buffer) % 4) for buffer in buffers]
        starts = np.cumsum([0] + [len(buffer) for buffer in padded]).tolist()
        self.data, self.added, self.length = b"".join(padded), [], starts[-1]
        for view in self.document["bufferViews"]:
            view["byteOffset"] = view.get("byteOffset", 0) + starts[view["buffer"]]
            view["buffer"] = 0

    def glb(self) -> bytes:
        self._pose_skins()  # first: it reads attributes of the file
        for primitive in _primitives(self.document):
            self._float_attributes(primitive)
        data = b"".join([self.data, *self.added])
        self.document["buffers"] = [{"byteLength": len(data)}]
        text = json.dumps(self.document).encode()
        text += b" " * (-len(text) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text
        body += struct.pack("<I4s", len(data), b"BIN\0") + data
        return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body

    def _values(self, index: int) -> Floats:
        """One of the file's accessors as [count, components], normalised integers as the numbers they stand for."""
        accessor = self.document["accessors"][index]
        if "bufferView" not in accessor or "sparse" in accessor:
            raise NotImplementedError("sparse accessor among attributes that must be rewritten")
        view = self.document["bufferViews"][accessor["bufferView"]]
        dtype, width = np.dtype(DTYPES[accessor["componentType"]]), COMPONENTS[accessor["type"]]
        stored = np.ndarray(
            (accessor["count"], width),
            dtype,
            buffer=self.data,
            offset=view["byteOffset"] + accessor.get("byteOffset", 0),
            strides=(view.get("byteStride", dtype.itemsize * width), dtype.itemsize),
        )
        values = stored.astype(np.float64)
        if accessor.get("normalized") and dtype.kind in "iu":
            values = np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values

    def _append(self, values: Floats) -> int:
        data = np.ascontiguousarray(values, "<f4").tobytes()
        self.document["bufferViews"].append(
            {"buffer": 0, "byteOffset": self.length, "byteLength": len(data)}
        )
        self.added.append(data)
        self.length += len(data)
        accessor = {"bufferView": len(self.document["bufferViews"]) - 1, "componentType": FLOAT}
        accessor |= {"count": len(values), "type": f"VEC{values.shape[1]}"}
        self.document["accessors"].append(accessor)
        return len(self.document["accessors"]) - 1

    def _float_attributes(self, primitive: dict[str, Any]) -> None:
        attributes = primitive["attributes"]
        if self.document["accessors"][attributes["POSITION"]].get(
            "normalized"
        ):  # not one that a skin has posed
            attributes["POSITION"] = self._append(self._values(attributes["POSITION"]))
        texture = _base_texture(self.document, primitive)
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        chosen = f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}"
        if chosen not in attributes:
            return
        uv, spin = self._values(attributes[chosen]), transform.get("rotation", 0.0)
        uv = uv * transform.get("scale", [1.0, 1.0])
        turn = np.array([[np.cos(spin), -np.sin(spin)], [np.sin(spin), np.cos(spin)]])
        attributes["TEXCOORD_0"] = self._append(uv @ turn + transform.get("offset", [0.0, 0.0]))

    def _pose_skins(self) -> None:
        """Skinned meshes in the pose of their joints' nodes, placed at the scene's root: their own node has no say."""
        nodes, world = self.document.get("nodes", []), self._world_matrices()
        scene = self.document["scenes"][self.document.get("scene", 0)]
        for index, matrix in world.items():
            node = nodes[index]
            if "skin" not in node or "mesh" not in node:
                continue
            skin, mesh = (
                self.document["skins"][node.pop("skin")],
                copy.deepcopy(self.document["meshes"][node.pop("mesh")]),
            )
            joints = np.stack([world.get(joint, np.eye(4)) for joint in skin["joints"]])
            if "inverseBindMatrices" in skin:
                joints = joints @ self._values(skin["inverseBindMatrices"]).reshape(
                    -1, 4, 4
                ).transpose(0, 2, 1)
            for primitive in mesh["primitives"]:
                self._pose(primitive["attributes"], joints, matrix)
            self.document["meshes"].append(mesh)
            nodes.append({"mesh": len(self.document["meshes"]) - 1})
            scene["nodes"].append(len(nodes) - 1)

    def _pose(self, attributes: dict[str, int], joints: Floats, unskinned: Floats) -> None:
        position = self._values(attributes["POSITION"])
        blend, total = np.zeros((len(position), 4, 4)), np.zeros(len(position))
        for k in range(4):
            if f"JOINTS_{k}" not in attributes or f"WEIGHTS_{k}" not in attributes:
                break
            which, weights = (
                self._values(attributes[f"JOINTS_{k}"]),
                self._values(attributes[f"WEIGHTS_{k}"]),
            )
            for corner in range(4):
                blend += weights[:, corner, None, None] * joints[which[:, corner].astype(np.int64)]
                total += weights[:, corner]
        bound = total > 0
        blend[bound] /= total[bound, None, None]
        blend[~bound] = unskinned
        moved = (blend[:, :3, :3] @ position[..., None])[..., 0] + blend[:, :3, 3]
        if (
            "NORMAL" in attributes
        ):  # joints rarely shear: their linear part serves normals, the loader makes them unit
            turned = blend[:, :3, :3] @ self._values(attributes["NORMAL"])[..., None]
            attributes["NORMAL"] = self._append(turned[..., 0])
        attributes["POSITION"] = self._append(moved)

    def _world_matrices(self) -> dict[int, Floats]:
        """Of every node that the scene reaches, in a fixed order."""
        nodes, scenes = self.document.get("nodes", []), self.document.get("scenes", [])
        roots = scenes[self.document.get("scene", 0)].get("nodes", []) if scenes else []
        world: dict[int, Floats] = {}
        pending = [(index, np.eye(4)) for index in reversed(roots)]
        while pending:
            index, above = pending.pop()
            if index not in world:
                world[index] = above @ _local_matrix(nodes[index])
                pending += [
                    (child, world[index]) for child in reversed(nodes[index].get("children", []))
                ]
        return world


def _local_matrix(node: dict[str, Any]) -> Floats:
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", [0, 0, 0, 1]), dtype=np.float64)
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = turn * np.array(node.get("scale", [1.0, 1.0, 1.0]))
    matrix[:3, 3] = node.get("translation", [0.0, 0.0, 0.0])
    return matrix
