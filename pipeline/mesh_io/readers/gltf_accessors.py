"""Buffers, buffer views and accessors of glTF files: the numbers behind meshes and images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Hashable
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import BOMB_BYTES, BOMB_FACTOR
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.gltf_document import (
    Document,
    Element,
    GltfError,
    MissingFileError,
)

# Types of components. 5124 and 5130 belong to KHR_accessor_float64 and its relatives.
DTYPES = {
    5120: "i1",
    5121: "u1",
    5122: "<i2",
    5123: "<u2",
    5124: "<i4",
    5125: "<u4",
    5126: "<f4",
    5130: "<f8",
}
COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
MESHOPT_EXTENSIONS = ("KHR_meshopt_compression", "EXT_meshopt_compression")
# The smallest code of 256 equal bytes is two bits.
MAX_MESHOPT_RATIO = 1024

Values = NDArray[Any]  # of any of DTYPES


class Accessors:
    """Reads the buffers, views and accessors of one document, each at most once.

    Memory is bounded by the bytes that are there: what all accessors together may take is at most
    `BOMB_FACTOR` times the bytes of the file, its side files and its decompressed views.

    Args:
        document: The document.
        content_bytes: Size of the file.
        context: Side files, limits and warnings.
    """

    def __init__(self, document: Document, content_bytes: int, context: ReaderContext):
        self.document = document
        self.context = context
        self.warnings = context.warnings
        self.available = content_bytes
        self.allocated = 0
        self._unpacked = 0
        self._results: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()` of the first call with this key. An error is repeated as well."""
        if key not in self._results:
            try:
                self._results[key] = compute()
            except GltfError as error:
                self._results[key] = error
        result = self._results[key]
        if isinstance(result, GltfError):
            raise result
        return result

    def buffer(self, index: int) -> memoryview:
        """Return the content of a buffer.

        Raises:
            GltfError: If the buffer has no content.
        """
        return self.cached(("buffer", index), lambda: self._read_buffer(index))

    def view(self, index: int) -> memoryview:
        """Return the content of a buffer view, decompressed.

        Raises:
            GltfError: If the view does not exist or leaves its buffer.
        """
        return self.cached(("view", index), lambda: self._read_view(index))

    def stored(self, index: int, *, needs_data: bool = False) -> Values:
        """Return the values of an accessor [count, components] in their stored type.

        Args:
            index: Number of the accessor.
            needs_data: Whether an accessor without any data is an error. Otherwise it is zero.

        Raises:
            GltfError: If the accessor cannot be read.
            Reject: "allocation_bomb".
        """
        element = self.document.element("accessors", index)
        if needs_data and not {"bufferView", "sparse"} & element.data.keys():
            raise GltfError(f"{element.path} has no data")
        return self.cached(("accessor", index), lambda: self._read_accessor(index, element))

    def values(self, index: int, width: int, *, needs_data: bool = False) -> NDArray[np.float64]:
        """Return the values of an accessor as float64 [count, width].

        Normalised integers are scaled.

        Raises:
            GltfError: If the accessor cannot be read or has another number of components.
            Reject: "allocation_bomb".
        """
        return self.cached(
            ("values", index, width),
            lambda: to_floats(
                _of_width(self.stored(index, needs_data=needs_data), width, index),
                normalized=self.is_normalized(index),
            ),
        )

    def integers(self, index: int, width: int) -> NDArray[np.int64]:
        """Return the values of an accessor of integers as int64 [count, width].

        Raises:
            GltfError: If the accessor cannot be read, has another number of components, or holds
                fractions.
            Reject: "allocation_bomb".
        """
        stored = _of_width(self.stored(index, needs_data=True), width, index)
        if stored.dtype.kind == "f" and not (
            np.isfinite(stored).all() and np.array_equal(stored, np.floor(stored))
        ):
            raise GltfError(f"accessors[{index}] must hold integers")
        return stored.astype(np.int64)

    def is_normalized(self, index: int) -> bool:
        """Return whether the integers of an accessor stand for 0 to 1 or -1 to 1."""
        return self.document.element("accessors", index).flag("normalized", False)

    def count(self, index: int) -> int:
        """Return the number of elements that an accessor states.

        Raises:
            GltfError: If the accessor does not exist or states none.
        """
        element = self.document.element("accessors", index)
        count = element.index("count")
        if count is None:
            raise GltfError(f"{element.path} has no count")
        return count

    def charge(self, size: int, what: str) -> None:
        """Count an allocation of `size` bytes.

        Raises:
            Reject: "allocation_bomb" if all allocations are far larger than the bytes that are
                there.
        """
        self.allocated += size
        if self.allocated > max(BOMB_FACTOR * self.available, BOMB_BYTES):
            raise Reject(
                "allocation_bomb", what=what, claimed=self.allocated, available=self.available
            )

    def _read_buffer(self, index: int) -> memoryview:
        element = self.document.element("buffers", index)
        uri = element.data.get("uri")
        if isinstance(uri, str):
            content = memoryview(self.resource(uri))
        else:
            without_uri = [
                number
                for number in range(self.document.count("buffers"))
                if "uri" not in self.document.element("buffers", number).data
            ]
            place = without_uri.index(index) if index in without_uri else len(without_uri)
            if place >= len(self.document.chunks):
                raise GltfError(f"{element.path} has no content")
            content = self.document.chunks[place]
        length = element.index("byteLength")
        if length is not None and length > len(content):
            _check_bomb("buffer", length, self.available)
            self.warnings.add("truncated_data", f"{element.path}: {len(content)} of {length} bytes")
        return content

    def resource(self, uri: str) -> bytes:
        """Return the content of a data URI or a side file.

        Raises:
            MissingFileError: If there is no such file.
            GltfError: If a data URI cannot be decoded.
        """
        if uri[:5].lower() != "data:":
            data = self.context.side_files.read(uri)
            if data is None:
                raise MissingFileError(f"the file {uri[:80]} is missing")
            self.available += len(data)
            return data
        head, comma, text = uri.partition(",")
        if not comma:
            raise GltfError("a data URI has no data")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(text)
        try:
            text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
            return base64.b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError) as error:
            raise GltfError(f"a data URI is not base64: {error}") from error

    def _read_view(self, index: int) -> memoryview:
        element = self.document.element("bufferViews", index)
        for name in MESHOPT_EXTENSIONS:
            extension = element.extension(name)
            if extension is not None:
                return self._decompress(element, extension)
        return self._slice(element)

    def _slice(self, element: Element) -> memoryview:
        """Return the bytes of the buffer that an object names by offset and length."""
        buffer, length = element.index("buffer"), element.index("byteLength")
        offset = element.index("byteOffset") or 0
        if buffer is None or length is None:
            raise GltfError(f"{element.path} has no buffer or no byteLength")
        content = self.buffer(buffer)
        if offset + length > len(content):
            _check_bomb("buffer view", offset + length, self.available)
            raise GltfError(f"{element.path} leaves its buffer of {len(content)} bytes")
        return content[offset : offset + length]

    def _decompress(self, view: Element, element: Element) -> memoryview:
        """Decompress a view of EXT_meshopt_compression or KHR_meshopt_compression."""
        import meshopt

        compressed = self._slice(element)
        count, stride = element.index("count"), element.index("byteStride")
        if count is None or stride is None:
            raise GltfError(f"{element.path} has no count or no byteStride")
        size = count * stride
        self._unpacked += size
        if (
            size > max(MAX_MESHOPT_RATIO * len(compressed), BOMB_BYTES)
            or self._unpacked > self.context.cfg.max_unpacked_bytes
        ):
            raise Reject("allocation_bomb", what="meshopt", claimed=size, available=len(compressed))
        if count == 0:
            return memoryview(b"")
        mode = element.word("mode", ("ATTRIBUTES", "TRIANGLES", "INDICES"))
        filter_name = element.word(
            "filter", ("NONE", "OCTAHEDRAL", "QUATERNION", "EXPONENTIAL", "COLOR")
        )
        try:
            rows = meshopt.decode_gltf_buffer(bytes(compressed), count, stride, mode, filter_name)
        except (ValueError, RuntimeError, TypeError) as error:
            raise GltfError(f"{view.path} cannot be decompressed: {error}") from error
        self.available += rows.nbytes
        return memoryview(np.ascontiguousarray(rows).tobytes())

    def _read_accessor(self, index: int, element: Element) -> Values:
        count, dtype, width = self.count(index), _dtype(element), _width(element)
        view = element.index("bufferView")
        if view is None:
            self.charge(count * dtype.itemsize * width, element.path)
            values = np.zeros((count, width), dtype)
        else:
            values = self._strided(element, view, count, dtype, width)
        sparse = element.child("sparse")
        return self._with_sparse(values, sparse) if sparse.data else values

    def _strided(
        self, element: Element, view: int, count: int, dtype: np.dtype[Any], width: int
    ) -> Values:
        """Return `count` rows of `width` values of a view, at the offset that an object states."""
        layout = self.document.element("bufferViews", view)
        item_bytes = dtype.itemsize * width
        offset = element.index("byteOffset") or 0
        stride = layout.index("byteStride")
        for name in MESHOPT_EXTENSIONS:
            extension = layout.extension(name)
            if extension is not None and extension.data.get("mode", "ATTRIBUTES") == "ATTRIBUTES":
                stride = extension.index("byteStride")
        if not stride:
            stride = item_bytes
        elif stride < item_bytes and count > 1:
            layout.invalid("byteStride", f"at least {item_bytes}")
            stride = item_bytes
        length = (count - 1) * stride + item_bytes if count else 0
        _check_bomb("accessor", offset + length, self.available)
        content = self.view(view)
        if offset + length > len(content):
            raise GltfError(f"{element.path} leaves its view of {len(content)} bytes")
        self.charge(count * item_bytes, element.path)
        return np.ndarray(
            (count, width), dtype, buffer=content, offset=offset, strides=(stride, dtype.itemsize)
        )

    def _with_sparse(self, values: Values, sparse: Element) -> Values:
        """Return a copy of values [count, width] with the sparse ones in their places."""
        count = sparse.index("count") or 0
        indices, replacements = sparse.child("indices"), sparse.child("values")
        views = indices.index("bufferView"), replacements.index("bufferView")
        if views[0] is None or views[1] is None:
            raise GltfError(f"{sparse.path} has no views")
        places = self._strided(indices, views[0], count, _dtype(indices), 1)[:, 0]
        changed = self._strided(replacements, views[1], count, values.dtype, values.shape[1])
        self.charge(values.nbytes, sparse.path)
        if places.dtype.kind != "u":
            raise GltfError(f"{sparse.path}.indices must be unsigned integers")
        is_inside = places < len(values)
        if not is_inside.all():
            outside = int((~is_inside).sum())
            self.warnings.add("invalid_value", f"{sparse.path}: {outside} indices are too large")
        result = values.copy()
        result[places[is_inside].astype(np.int64)] = changed[is_inside]
        return result


def to_floats(stored: Values, *, normalized: bool) -> NDArray[np.float64]:
    """Return values as float64. Normalised integers are scaled to [0, 1] or [-1, 1]."""
    values = stored.astype(np.float64)
    if normalized and stored.dtype.kind in "iu":
        values = np.maximum(values / np.iinfo(stored.dtype).max, -1.0)
    return values


def _of_width(values: Values, width: int, index: int) -> Values:
    if values.shape[1] != width:
        raise GltfError(f"accessors[{index}] has {values.shape[1]} components, not {width}")
    return values


def _dtype(element: Element) -> np.dtype[Any]:
    name = element.index("componentType")
    if name not in DTYPES:
        raise GltfError(f"{element.path} has the unknown componentType {name}")
    return np.dtype(DTYPES[name])


def _width(element: Element) -> int:
    name = element.data.get("type")
    if not isinstance(name, str) or name not in COMPONENTS:
        raise GltfError(f"{element.path} has the unknown type {str(name)[:20]}")
    return COMPONENTS[name]


def _check_bomb(what: str, claimed: int, available: int) -> None:
    """Reject a claim that is far beyond the bytes that are there."""
    if claimed > max(BOMB_FACTOR * available, BOMB_BYTES):
        raise Reject("allocation_bomb", what=what, claimed=claimed, available=available)
