"""Typed access to the JSON document of a glTF file, and the container that holds it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.core.errors import Reject
from pipeline.mesh_io.load_warnings import WarningLog

GLB_HEADER_BYTES = 12
GLB_CHUNK_HEADER_BYTES = 8

Word = TypeVar("Word", bound=str)


class GltfError(ValueError):
    """A part of a document cannot be read. Whoever needs the part leaves it out with a warning."""


class MissingFileError(GltfError):
    """A side file is missing, which `SideFiles` has recorded."""


@dataclass(frozen=True, kw_only=True)
class Element:
    """An object of the document.

    A value that the format does not allow gives the warning "invalid_value" and counts as absent.

    Attributes:
        data: The JSON object.
        path: Where the object stands, for warnings.
        warnings: Receives "invalid_value".
    """

    data: dict[str, Any]
    path: str
    warnings: WarningLog

    def invalid(self, key: str, rule: str) -> None:
        """Record that the value of `key` is not what the format allows."""
        value = repr(self.data.get(key))[:40]
        self.warnings.add("invalid_value", f"{self.path}.{key} must be {rule}, got {value}")

    def child(self, key: str) -> Element:
        """Return the object at `key`, an empty one if there is none."""
        value = self.data.get(key, {})
        if not isinstance(value, dict):
            self.invalid(key, "an object")
            value = {}
        return Element(data=value, path=f"{self.path}.{key}", warnings=self.warnings)

    def children(self, key: str) -> list[Element]:
        """Return the objects of the list at `key`. Other entries become empty objects."""
        items = self.values(key)
        if not all(isinstance(item, dict) for item in items):
            self.invalid(key, "a list of objects")
        return [
            Element(
                data=item if isinstance(item, dict) else {},
                path=f"{self.path}.{key}[{number}]",
                warnings=self.warnings,
            )
            for number, item in enumerate(items)
        ]

    def values(self, key: str) -> list[Any]:
        """Return the list at `key`, an empty one if there is none."""
        value = self.data.get(key, [])
        if not isinstance(value, list):
            self.invalid(key, "a list")
            return []
        return value

    def extension(self, name: str) -> Element | None:
        """Return the object of an extension, or None if the element does not use it."""
        extensions = self.child("extensions")
        return extensions.child(name) if name in extensions.data else None

    def index(self, key: str) -> int | None:
        """Return the index at `key`, or None if there is none."""
        if key not in self.data:
            return None
        index = as_index(self.data[key])
        if index is None:
            self.invalid(key, "an index")
        return index

    def indices(self, key: str) -> list[int]:
        """Return the list of indices at `key`, without entries that are none."""
        values = self.values(key)
        indices = [index for value in values if (index := as_index(value)) is not None]
        if len(indices) < len(values):
            self.invalid(key, "a list of indices")
        return indices

    def number(self, key: str, default: float) -> float:
        """Return the finite number at `key`."""
        value = self.data.get(key, default)
        if not is_number(value):
            self.invalid(key, "a number")
            return default
        return float(value)

    def numbers(self, key: str, default: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the list of finite numbers at `key`.

        Args:
            key: The property.
            default: What is returned if there is none. The list must have as many numbers. None is
                (), and allows any number of them.
        """
        if key not in self.data:
            return tuple(default or ())
        values = self.data[key]
        if (
            not isinstance(values, list)
            or (default is not None and len(values) != len(default))
            or not all(is_number(value) for value in values)
        ):
            count = "" if default is None else f"{len(default)} "
            self.invalid(key, f"a list of {count}numbers")
            return tuple(default or ())
        return tuple(map(float, values))

    def word(self, key: str, choices: Sequence[Word]) -> Word:
        """Return the word at `key`, the first of `choices` if there is none."""
        value = self.data.get(key, choices[0])
        for choice in choices:
            if value == choice:
                return choice
        self.invalid(key, f"one of {', '.join(choices)}")
        return choices[0]

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean at `key`."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.invalid(key, "true or false")
            return default
        return value

    @property
    def name(self) -> str:
        """The name that the file gives, otherwise the path."""
        name = self.data.get("name")
        return name if isinstance(name, str) and name else self.path


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


def as_index(value: object) -> int | None:
    """Return a JSON value as an index of at least 0, or None if it is none. 3.0 counts as 3."""
    if not is_number(value) or value != int(value) or value < 0:  # type: ignore[arg-type,operator]
        return None
    return int(value)  # type: ignore[call-overload]


class Document:
    """The JSON document of a file and the binary chunks of its container.

    Args:
        root: The document.
        chunks: The binary chunks of a GLB file.
        warnings: Receives "invalid_value".
    """

    def __init__(self, root: dict[str, Any], chunks: list[memoryview], warnings: WarningLog):
        self.root = Element(data=root, path="document", warnings=warnings)
        self.chunks = chunks
        self.warnings = warnings

    def count(self, kind: str) -> int:
        """Return the number of elements of a kind, such as "meshes"."""
        value = self.root.data.get(kind)
        return len(value) if isinstance(value, list) else 0

    def element(self, kind: str, index: int) -> Element:
        """Return one element of a kind.

        Raises:
            GltfError: If there is none.
        """
        if not 0 <= index < self.count(kind):
            raise GltfError(f"{kind}[{index}] does not exist")
        data = self.root.data[kind][index]
        if not isinstance(data, dict):
            raise GltfError(f"{kind}[{index}] is not an object")
        return Element(data=data, path=f"{kind}[{index}]", warnings=self.warnings)


def parse_container(content: bytes, warnings: WarningLog) -> Document:
    """Parse a GLB file, or a glTF file of JSON text.

    Args:
        content: The whole file.
        warnings: Receives "count_mismatch", "trailing_data", "unknown_element" and "text_encoding".

    Raises:
        Reject: "gltf_1", or "unreadable" if a chunk is cut or the document is no object.
        ValueError: If the text is not JSON.
    """
    if content[:4] != b"glTF":
        return Document(_parse_json(content, warnings), [], warnings)
    _, version, length = struct.unpack_from("<4sII", content)
    if version == 1:
        raise Reject("gltf_1", version=version)
    if version != 2:
        raise Reject("unreadable", error="gltf_version", version=version)
    text = None
    chunks = []
    offset = GLB_HEADER_BYTES
    while offset + GLB_CHUNK_HEADER_BYTES <= len(content):
        size, kind = struct.unpack_from("<I4s", content, offset)
        if offset >= length and kind not in (b"JSON", b"BIN\0"):
            break  # data after the end; some writers state a length that is too small
        start = offset + GLB_CHUNK_HEADER_BYTES
        offset = start + size
        if offset > len(content):
            raise Reject(
                "unreadable",
                error="truncated",
                what="chunk",
                claimed=size,
                available=len(content) - start,
            )
        if kind == b"JSON" and text is None:
            text = content[start:offset]
        elif kind == b"BIN\0":
            chunks.append(memoryview(content)[start:offset])
        else:
            warnings.add("unknown_element", f"chunk {kind.decode('latin-1')!a}")
    if text is None:
        raise Reject("unreadable", error="no_json_chunk")
    if length > len(content) or length < offset:
        warnings.add("count_mismatch", f"length of the file: {length} for {len(content)}")
    if any(content[offset:]):
        warnings.add("trailing_data", f"{len(content) - offset} bytes")
    return Document(_parse_json(text, warnings), chunks, warnings)


def _parse_json(text: bytes, warnings: WarningLog) -> dict[str, Any]:
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        warnings.add("text_encoding", "the document is not UTF-8")
        decoded = text.decode("utf-8-sig", errors="replace")
    root = json.loads(decoded.rstrip("\0 \r\n\t"))
    if not isinstance(root, dict):
        raise Reject("unreadable", error="not_an_object")
    _check_version(root, warnings)
    return root


def _check_version(root: dict[str, Any], warnings: WarningLog) -> None:
    """Accept glTF 2.x.

    Raises:
        Reject: "gltf_1" for glTF 1.x, "unreadable" for later versions.
    """
    asset = root.get("asset")
    version = str(asset.get("version", "")) if isinstance(asset, dict) else ""
    # Documents of version 1 keep their elements by name instead of by number.
    if version.startswith(("0", "1")) or isinstance(root.get("meshes"), dict):
        raise Reject("gltf_1", version=version)
    least = str(asset.get("minVersion", version)) if isinstance(asset, dict) else ""
    if version and not (version.startswith("2") or least.startswith("2")):
        raise Reject("unreadable", error="gltf_version", version=version[:20])
    if not version:
        warnings.add("invalid_value", "asset.version is missing")
