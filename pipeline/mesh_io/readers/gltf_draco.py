"""Decode primitives of KHR_draco_mesh_compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.readers.gltf_document import GltfError

MESH = 1
EDGEBREAKER = 1
FIRST_VERSION = (2, 2)  # that of the glTF extension
HAS_METADATA = 0x8000
HEADER_BYTES = 11  # "DRACO", two version bytes, geometry, method, two bytes of flags
MAX_POINTS_PER_FACE = 3


@dataclass(frozen=True, kw_only=True)
class DracoMesh:
    """A decoded buffer.

    Attributes:
        indices: int64 [3 * F], rows of the attributes.
        attributes: Unique id -> values [V, components] in their stored type.
    """

    indices: NDArray[np.int64]
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
    indices = np.asarray(decoded.faces, dtype=np.int64).reshape(-1)
    return DracoMesh(indices=indices, attributes=attributes)


class _HeaderReader:
    """Reads the beginning of a Draco buffer."""

    def __init__(self, content: bytes, place: int):
        self.content = content
        self.place = place

    def byte(self) -> int:
        """Return the next byte.

        Raises:
            GltfError: If the buffer has ended.
        """
        if self.place >= len(self.content):
            raise GltfError("the header of a Draco buffer is cut")
        self.place += 1
        return self.content[self.place - 1]

    def varint(self) -> int:
        """Return a number that is stored in groups of seven bits, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        return value

    def skip_metadata(self) -> None:
        """Move behind the metadata of the attributes and of the geometry."""
        attributes = self.varint()
        # Each block has a list of entries and a list of blocks with names.
        for number in range(attributes + 1):
            if number < attributes:
                self.varint()  # id of the attribute
            unread = self._skip_entries()
            while unread:
                self._skip(self.byte())  # name
                unread += self._skip_entries() - 1

    def _skip(self, count: int) -> None:
        self.place += count

    def _skip_entries(self) -> int:
        """Move behind the entries of a block and return the number of blocks in it."""
        for _ in range(self.varint()):
            self._skip(self.byte())  # name
            self._skip(self.varint())  # value
        return self.varint()


def _check_counts(content: bytes, cfg: LoadConfig) -> None:
    """Check the numbers of faces and points that a buffer states before memory is allocated.

    Raises:
        GltfError: If the header is cut, or not that of a mesh in the bitstream of glTF.
        Reject: "too_many_faces".
    """
    if content[:5] != b"DRACO" or len(content) < HEADER_BYTES:
        raise GltfError("a Draco buffer does not begin with DRACO")
    version, (geometry, method) = (content[5], content[6]), content[7:9]
    if version < FIRST_VERSION or geometry != MESH:
        raise GltfError(f"a Draco buffer has version {version} and kind {geometry}")
    header = _HeaderReader(content, HEADER_BYTES)
    if int.from_bytes(content[9:11], "little") & HAS_METADATA:
        header.skip_metadata()
    if method == EDGEBREAKER:
        header.byte()  # kind of the traversal
        points, faces = header.varint(), header.varint()
    else:
        faces, points = header.varint(), header.varint()
    if faces > cfg.max_faces or points > MAX_POINTS_PER_FACE * cfg.max_faces:
        raise Reject("too_many_faces", faces=faces, points=points, max_faces=cfg.max_faces)
