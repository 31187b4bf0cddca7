"""Rewrite glTF features that the parser ignores: normalised integers, texture transforms, skins.

The parser reads integers as they are stored, takes texture coordinates from set 0 without their
transform, and ignores skins, so a character's body and hat would not fit together. Files without
these features are not changed.
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
    """Return the JSON document and the binary chunks of a GLB file that passed `check_file`."""
    (json_bytes,) = struct.unpack_from("<I", data, 12)
    document = json.loads(data[20 : 20 + json_bytes])
    chunks = []
    offset = 20 + json_bytes
    while offset + 8 <= len(data):
        length, chunk_type = struct.unpack_from("<I4s", data, offset)
        if chunk_type == b"BIN\0":
            chunks.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    return document, chunks


def prepare_for_parser(
    data: bytes, extension: str, read_side_file: Callable[[str], bytes]
) -> tuple[bytes, str]:
    """Return a file that the parser reads correctly.

    Args:
        data: Content of a file that passed `check_file`.
        extension: "glb" or "gltf".
        read_side_file: Returns the content of a buffer's file by its URI.

    Returns:
        (content, extension): the arguments if nothing has to be rewritten, otherwise a GLB of the
        same scene.
    """
    if extension == "glb":
        document, chunks = split_glb(data)
    else:
        document = json.loads(data.decode("utf-8-sig"))
        chunks = []
    if not (_is_skinned(document) or any(_attributes_to_rewrite(document))):
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
    return _Rewriter(document, buffers).to_glb(), "glb"


def _primitives(document: Document) -> Iterator[dict[str, Any]]:
    for mesh in document.get("meshes", []):
        yield from mesh["primitives"]


def _is_skinned(document: Document) -> bool:
    return any("skin" in node and "mesh" in node for node in document.get("nodes", []))


def _attributes_to_rewrite(document: Document) -> Iterator[bool]:
    """Yield whether an attribute has to be rewritten, for each attribute of the document."""
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
    """Return the base colour texture of a primitive, {} if it has none."""
    if "material" not in primitive:
        return {}
    material = document["materials"][primitive["material"]]
    return material.get("pbrMetallicRoughness", {}).get("baseColorTexture", {})


class _Rewriter:
    """Rewrites one document. All buffers become a single one, to which new arrays are appended."""

    def __init__(self, document: Document, buffers: list[bytes]):
        self.document = copy.deepcopy(document)
        padded = [buffer + b"\0" * (-len(buffer) % 4) for buffer in buffers]
        starts = np.cumsum([0] + [len(buffer) for buffer in padded]).tolist()
        self.data = b"".join(padded)
        self.added: list[bytes] = []
        self.length = starts[-1]
        for view in self.document["bufferViews"]:
            view["byteOffset"] = view.get("byteOffset", 0) + starts[view["buffer"]]
            view["buffer"] = 0

    def to_glb(self) -> bytes:
        self._pose_skins()  # before the attributes change: it reads those of the file
        for primitive in _primitives(self.document):
            self._rewrite_attributes(primitive)
        data = b"".join([self.data, *self.added])
        self.document["buffers"] = [{"byteLength": len(data)}]
        text = json.dumps(self.document).encode()
        text += b" " * (-len(text) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text
        body += struct.pack("<I4s", len(data), b"BIN\0") + data
        return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body

    def _values(self, index: int) -> Floats:
        """Read an accessor as float64 [count, components]. Normalised integers are scaled."""
        accessor = self.document["accessors"][index]
        if "bufferView" not in accessor or "sparse" in accessor:
            raise NotImplementedError("sparse accessor among attributes that must be rewritten")
        view = self.document["bufferViews"][accessor["bufferView"]]
        dtype = np.dtype(DTYPES[accessor["componentType"]])
        width = COMPONENTS[accessor["type"]]
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
        """Add an array [count, components] as float32 and return the index of its accessor."""
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

    def _rewrite_attributes(self, primitive: dict[str, Any]) -> None:
        """Give a primitive float positions and its transformed texture coordinates in set 0."""
        attributes = primitive["attributes"]
        # Positions that a skin has posed are floats already.
        if self.document["accessors"][attributes["POSITION"]].get("normalized"):
            attributes["POSITION"] = self._append(self._values(attributes["POSITION"]))
        texture = _base_texture(self.document, primitive)
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        chosen = f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}"
        if chosen not in attributes:
            return
        uv = self._values(attributes[chosen]) * transform.get("scale", [1.0, 1.0])
        angle = transform.get("rotation", 0.0)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        uv = uv @ rotation + transform.get("offset", [0.0, 0.0])
        attributes["TEXCOORD_0"] = self._append(uv)

    def _pose_skins(self) -> None:
        """Move skinned meshes into the pose of their joints.

        The result is placed at the root of the scene, because the transform of a skinned mesh's own
        node does not apply.
        """
        nodes = self.document.get("nodes", [])
        world = self._world_matrices()
        scene = self.document["scenes"][self.document.get("scene", 0)]
        for index, matrix in world.items():
            node = nodes[index]
            if "skin" not in node or "mesh" not in node:
                continue
            skin = self.document["skins"][node.pop("skin")]
            mesh = copy.deepcopy(self.document["meshes"][node.pop("mesh")])
            joints = np.stack([world.get(joint, np.eye(4)) for joint in skin["joints"]])
            if "inverseBindMatrices" in skin:
                inverse = self._values(skin["inverseBindMatrices"]).reshape(-1, 4, 4)
                joints = joints @ inverse.transpose(0, 2, 1)  # glTF stores matrices by columns
            for primitive in mesh["primitives"]:
                self._pose(primitive["attributes"], joints, matrix)
            self.document["meshes"].append(mesh)
            nodes.append({"mesh": len(self.document["meshes"]) - 1})
            scene["nodes"].append(len(nodes) - 1)

    def _pose(self, attributes: dict[str, int], joints: Floats, unskinned: Floats) -> None:
        """Apply the joints' matrices [J, 4, 4] to positions and normals of a primitive.

        Vertices without weights are transformed by `unskinned` [4, 4], the matrix of the node.
        """
        position = self._values(attributes["POSITION"])
        # Weighted mean of the matrices of each vertex's joints.
        blend = np.zeros((len(position), 4, 4))
        total = np.zeros(len(position))
        for k in range(4):
            if f"JOINTS_{k}" not in attributes or f"WEIGHTS_{k}" not in attributes:
                break
            joint_of = self._values(attributes[f"JOINTS_{k}"]).astype(np.int64)
            weights = self._values(attributes[f"WEIGHTS_{k}"])
            for corner in range(4):
                blend += weights[:, corner, None, None] * joints[joint_of[:, corner]]
                total += weights[:, corner]
        bound = total > 0
        blend[bound] /= total[bound, None, None]
        blend[~bound] = unskinned
        posed = (blend[:, :3, :3] @ position[..., None])[..., 0] + blend[:, :3, 3]
        # Joints rarely shear, so their linear part also transforms normals. The loader scales
        # normals to length 1.
        if "NORMAL" in attributes:
            normals = blend[:, :3, :3] @ self._values(attributes["NORMAL"])[..., None]
            attributes["NORMAL"] = self._append(normals[..., 0])
        attributes["POSITION"] = self._append(posed)

    def _world_matrices(self) -> dict[int, Floats]:
        """Return the world matrix of each node of the scene, in a fixed order."""
        nodes = self.document.get("nodes", [])
        scenes = self.document.get("scenes", [])
        roots = scenes[self.document.get("scene", 0)].get("nodes", []) if scenes else []
        world: dict[int, Floats] = {}
        pending = [(index, np.eye(4)) for index in reversed(roots)]
        while pending:
            index, parent_matrix = pending.pop()
            if index not in world:
                world[index] = parent_matrix @ _local_matrix(nodes[index])
                pending += [
                    (child, world[index]) for child in reversed(nodes[index].get("children", []))
                ]
        return world


def _local_matrix(node: dict[str, Any]) -> Floats:
    """Return the matrix [4, 4] of a node relative to its parent."""
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", [0, 0, 0, 1]), dtype=np.float64)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", [1.0, 1.0, 1.0]))
    matrix[:3, 3] = node.get("translation", [0.0, 0.0, 0.0])
    return matrix
