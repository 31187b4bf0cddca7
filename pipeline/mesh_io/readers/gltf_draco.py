"""Decode primitives of KHR_draco_mesh_compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.readers.gltf_document import GltfError

MESH, POINT_CLOUD = 1, 0
SEQUENTIAL, EDGEBREAKER = 0, 1
HEADER_BYTES = 11  # "DRACO", two version bytes, geometry, method, two bytes of flags
MAX_POINTS_PER_FACE = 3


@dataclass(frozen=True, kw_only=True)
class DracoMesh:
    """A decoded buffer.

    Attributes:
        indices: int64 [3 * F], rows of the attributes. None for a point cloud.
        attributes: Unique id -> values [V, components] in their stored type.
    """

    indices: NDArray[np.int64] | None
    attributes: dict[int, NDArray[Any]]


def decode_draco(content: bytes, cfg: LoadConfig) -> DracoMesh:
    """Decode a Draco buffer.

    Args:
        content: The compressed bytes.
        cfg: The limit of faces, which bounds the memory.

    Raises:
        GltfError: If the buffer cannot be decoded.
        Reject: "too_many_faces".
    """
    import DracoPy

    _check_counts(content, cfg)
    try:
        decoded = DracoPy.decode(content)
    except (DracoPy.FileTypeException, ValueError, RuntimeError, MemoryError) as error:
        raise GltfError(f"a Draco buffer cannot be decoded: {str(error)[:80]}") from error
    attributes = {}
    for attribute in decoded.attributes:
        values = np.asarray(attribute["data"])
        attributes[int(attribute["unique_id"])] = values.reshape(len(values), -1)
    faces = getattr(decoded, "faces", None)
    indices = None if faces is None else np.asarray(faces, dtype=np.int64).reshape(-1)
    return DracoMesh(indices=indices, attributes=attributes)


def _check_counts(content: bytes, cfg: LoadConfig) -> None:
    """Check the numbers of faces and points that a buffer states before memory is allocated.

    Raises:
        GltfError: If the header is cut or not that of Draco.
        Reject: "too_many_faces".
    """
    if content[:5] != b"DRACO" or len(content) < HEADER_BYTES:
        raise GltfError("a Draco buffer does not begin with DRACO")
    version = content[5], content[6]
    geometry, method = content[7], content[8]
    place = HEADER_BYTES
    if int.from_bytes(content[9:11], "little") & 0x8000:
        return  # metadata stand before the counts; the decoder checks them against its input

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < len(content) and shift < 70:
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise GltfError("the header of a Draco buffer is cut")

    if geometry == MESH and version >= (2, 2):
        if method == EDGEBREAKER:
            place += 1  # kind of the traversal
            points, faces = varint(), varint()
        else:
            faces, points = varint(), varint()
        if faces > cfg.max_faces or points > MAX_POINTS_PER_FACE * cfg.max_faces:
            raise Reject("too_many_faces", faces=faces, points=points, max_faces=cfg.max_faces)
