"""Parse FBX files, binary and text, into a tree of elements. Arrays are decoded on demand."""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.file_checks import check_claimed_bytes
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.text import parse_numbers, spellings

BINARY_SIGNATURE = b"Kaydara FBX Binary  \x00\x1a"
VERSION_OFFSET = 23
HEADER_BYTES = 27
WIDE_VERSION = 7500  # from which on offsets have 64 bits
OLDEST_VERSION = 6000
NEWEST_VERSION = 7999
NEWEST_KNOWABLE = 99_999  # larger numbers are damage
MAX_DEPTH = 64  # of nested elements; real files have fewer than ten levels
MAX_ARRAY_RATIO = 1200  # unpacked to packed bytes that deflate can reach, rounded up
SEPARATOR = "\0\x01"  # between name and class of an object in binary files

SCALARS = {"C": "?", "B": "?", "Z": "B", "Y": "h", "I": "i", "F": "f", "D": "d", "L": "q"}
ARRAYS = {"f": "f4", "d": "f8", "l": "i8", "i": "i4", "b": "u1", "c": "u1"}


@dataclass(frozen=True, kw_only=True)
class FbxArray:
    """An array of numbers as the file stores it.

    Attributes:
        dtype: Type of the numbers.
        count: Number of entries that the file states.
        content: The stored bytes, or the text of the numbers.
        encoding: "raw", "deflate" or "text".
    """

    dtype: str
    count: int
    content: bytes
    encoding: str


@dataclass(kw_only=True)
class FbxElement:
    """An element of the tree.

    Attributes:
        name: Name of the element.
        values: Its values in order.
        children: The elements in it, in order.
    """

    name: str
    values: list[object] = field(default_factory=list)
    children: list[FbxElement] = field(default_factory=list)

    def all(self, *names: str) -> Iterator[FbxElement]:
        """Yield the children with one of the names."""
        return (child for child in self.children if child.name in names)

    def first(self, *names: str) -> FbxElement | None:
        """Return the first child with one of the names, or None."""
        return next(self.all(*names), None)

    def text(self, position: int = 0) -> str:
        """Return a value as text, "" if there is none or if it is a number."""
        value = self.values[position] if position < len(self.values) else ""
        return value if isinstance(value, str) else ""

    def number(self, position: int = 0, default: float = 0.0) -> float:
        """Return a value as number, or the default if it is none."""
        value = self.values[position] if position < len(self.values) else default
        return float(value) if isinstance(value, int | float) else default

    def text_of(self, name: str) -> str:
        """Return the text of the first child with a name, "" if there is none."""
        child = self.first(name)
        return "" if child is None else child.text()


@dataclass(kw_only=True)
class FbxFile:
    """A parsed file.

    Attributes:
        version: The version, such as 7400.
        root: The element that holds all top-level elements.
        arrays: Decodes the arrays.
    """

    version: int
    root: FbxElement
    arrays: ArrayDecoder


class ArrayDecoder:
    """Decodes arrays within the limits of a loaded file.

    Args:
        cfg: The limit of unpacked bytes.
        warnings: Receives "truncated_data", "count_mismatch" and "invalid_value".
    """

    def __init__(self, cfg: LoadConfig, warnings: WarningLog):
        self._free_bytes = cfg.max_unpacked_bytes
        self._warnings = warnings

    def numbers(
        self, element: FbxElement | None, dtype: type[np.generic] = np.float64
    ) -> NDArray[Any]:
        """Return the numbers of an element, [N] of a type. [] without element.

        They are one array, or the values of the element themselves.

        Raises:
            Reject: "allocation_bomb" if the arrays of a file are too large together.
        """
        if element is None:
            return np.empty(0, dtype=dtype)
        arrays = [value for value in element.values if isinstance(value, FbxArray)]
        if arrays:
            values = self._decode(arrays[0], element.name, dtype)
        else:
            scalars = [value for value in element.values if isinstance(value, int | float)]
            values = np.array(scalars, dtype=np.float64)
        if np.dtype(dtype).kind == "i" and values.dtype.kind == "f":
            # Undefined and huge numbers are no indices.
            is_usable = np.abs(values) < 2**62
            values = np.where(is_usable, values, np.iinfo(np.int64).min)
        return values.astype(dtype)

    def _decode(self, array: FbxArray, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        if array.encoding == "text":
            wanted = np.int64 if np.dtype(dtype).kind == "i" else np.float64
            text = _COMMENT.sub(b"", array.content).replace(b",", b" ").translate(_BLANKS)
            values = parse_numbers(text, self._warnings, wanted)
            if array.count >= 0 and len(values) != array.count:
                self._warnings.add("count_mismatch", f"{name}: {len(values)} for {array.count}")
            return values
        kind = np.dtype(array.dtype)
        claimed = array.count * kind.itemsize
        content = array.content
        if array.encoding == "deflate":
            if claimed > self._free_bytes:
                raise Reject("allocation_bomb", what=name, claimed=claimed, available=len(content))
            ratio = MAX_ARRAY_RATIO * len(content)
            check_claimed_bytes(name, claimed, max(ratio, len(content)))
            unpacker = zlib.decompressobj()
            try:
                content = unpacker.decompress(content, claimed) if claimed else b""
            except zlib.error as error:
                self._warnings.add("truncated_data", f"{name}: {error}")
                content = b""
            self._free_bytes -= len(content)
        count = len(content) // kind.itemsize
        if count < array.count:
            self._warnings.add("truncated_data", f"{name}: {count} of {array.count} numbers")
        return np.frombuffer(content, kind, min(count, array.count))


def parse_fbx(content: bytes, cfg: LoadConfig, warnings: WarningLog) -> FbxFile:
    """Parse a file.

    Args:
        content: The bytes of the file.
        cfg: The limit of unpacked bytes.
        warnings: Receives "truncated_data" and "invalid_value".

    Raises:
        Reject: "unsupported_version" for versions before 6.0 and after 7.x, or "unreadable".
    """
    if content.startswith(BINARY_SIGNATURE[:-2]):
        version, root = _BinaryParser(content, warnings).parse()
    else:
        version, root = _TextParser(content, warnings).parse()
    return FbxFile(version=version, root=root, arrays=ArrayDecoder(cfg, warnings))


def _check_version(version: int) -> None:
    if version > NEWEST_KNOWABLE:
        raise Reject("unreadable", error="damaged_header", version=version)
    if not OLDEST_VERSION <= version <= NEWEST_VERSION:
        raise Reject("unsupported_version", format="fbx", version=version)


class _BinaryParser:
    """Parses the records of a binary file one after the other, without recursion."""

    def __init__(self, content: bytes, warnings: WarningLog):
        self.content = content
        self.warnings = warnings
        self.is_truncated = False

    def _warn_truncated(self, detail: str) -> None:
        """Record the first place that is damaged. What follows it is damaged as well."""
        if not self.is_truncated:
            self.is_truncated = True
            self.warnings.add("truncated_data", detail)

    def parse(self) -> tuple[int, FbxElement]:
        content = self.content
        if len(content) < HEADER_BYTES:
            raise Reject("unreadable", error="truncated", bytes=len(content))
        # The byte after the signature states the byte order.
        self.order = ">" if content[VERSION_OFFSET - 1] == 1 else "<"
        (version,) = struct.unpack_from(f"{self.order}I", content, VERSION_OFFSET)
        _check_version(version)
        wide = version >= WIDE_VERSION
        head = struct.Struct(self.order + ("QQQB" if wide else "IIIB"))
        root = FbxElement(name="")
        # (element, where it ends) of all open elements.
        open_elements = [(root, len(content))]
        place = HEADER_BYTES
        while open_elements:
            element, end = open_elements[-1]
            if place >= end and len(open_elements) > 1:
                open_elements.pop()
                place = end
                continue
            if place + head.size > len(content):
                self._warn_truncated(f"the file ends in {element.name or 'itself'}")
                break
            following, count, value_bytes, name_bytes = head.unpack_from(content, place)
            if following == 0:  # the end of a list of elements
                open_elements.pop()
                place = end
                continue
            first = place + head.size + name_bytes
            name = content[place + head.size : first].decode("latin-1")
            if following <= place or following > end or first + value_bytes > following:
                self._warn_truncated(f"{name[:40]} at byte {place}")
                if following <= place or (len(open_elements) == 1 and following > len(content) * 2):
                    break
                following = min(max(following, first), end)
                value_bytes = max(0, min(value_bytes, following - first))
            child = FbxElement(name=name)
            child.values = self._values(first, first + value_bytes, count, name)
            element.children.append(child)
            if first + value_bytes < following:
                if len(open_elements) >= MAX_DEPTH:
                    raise Reject("unreadable", error="nested_too_deeply", depth=MAX_DEPTH)
                open_elements.append((child, following))
                place = first + value_bytes
            else:
                place = following
        return version, root

    def _values(self, place: int, end: int, count: int, name: str) -> list[object]:
        """Return the values of a record. The first one that is damaged ends the list."""
        values: list[object] = []
        content = self.content
        try:
            while place < end and len(values) < count:
                kind = chr(content[place])
                place += 1
                if kind in SCALARS:
                    item = struct.Struct(self.order + SCALARS[kind])
                    values.append(item.unpack_from(content, place)[0])
                    place += item.size
                elif kind in "SR":
                    (size,) = struct.unpack_from(f"{self.order}I", content, place)
                    data = content[place + 4 : min(place + 4 + size, end)]
                    if len(data) < size:
                        self._warn_truncated(name)
                    values.append(_decoded(data, self.warnings) if kind == "S" else data)
                    place += 4 + size
                elif kind in ARRAYS:
                    length, encoding, size = struct.unpack_from(f"{self.order}III", content, place)
                    dtype = self.order + ARRAYS[kind]
                    if encoding == 0:
                        size = length * np.dtype(dtype).itemsize
                    elif encoding != 1:
                        self.warnings.add("invalid_value", f"{name}: array encoding {encoding}")
                        return values
                    values.append(
                        FbxArray(
                            dtype=dtype,
                            count=length,
                            content=content[place + 12 : min(place + 12 + size, end)],
                            encoding="deflate" if encoding else "raw",
                        )
                    )
                    place += 12 + size
                else:
                    self.warnings.add("invalid_value", f"{name}: value of type {kind!r}")
                    return values
        except (struct.error, IndexError):
            self._warn_truncated(name)
        return values


def _decoded(data: bytes, warnings: WarningLog) -> str:
    """Return a text, which is UTF-8 in most files."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = spellings(data)[0]
        warnings.add("text_encoding", text)
        return text


# A number, in any spelling that writers use, also for those that are not finite.
_NUMBER = rb"[-+]?(?:\d[\d.]*|\.\d+|nan|inf|1\.#\w+)[\w.#+\-()]*"
_BLANK = re.compile(rb"(?:\s|;[^\n]*)*+")
_COMMENT = re.compile(rb";[^\n]*")
_BLANKS = bytes(32 if byte < 32 else byte for byte in range(256))
_NAME = re.compile(rb"([^\s:;,{}\"]{1,200}+)[ \t]*:")
_NUMBERS = re.compile(_NUMBER + rb"(?:\s*+,\s*+" + _NUMBER + rb")*+", re.IGNORECASE)
_STRING = re.compile(rb'"([^"]*+)"')
_WORD = re.compile(rb"[^\s,{}\"]++")
_COUNT = re.compile(rb"\*(\d+)")
_COMMA = re.compile(rb"[ \t\r\n]*+,")
_NEXT_LINE = re.compile(rb"[ \t\r\n]++(?=[-+.\d\"*])")
LONG_LIST = 32  # characters from which on a list of numbers is kept as text


class _TextParser:
    """Parses a text file, without recursion."""

    def __init__(self, content: bytes, warnings: WarningLog):
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            content = content.decode("utf-16", errors="replace").encode()
        self.content = content.removeprefix(b"\xef\xbb\xbf")
        self.warnings = warnings

    def parse(self) -> tuple[int, FbxElement]:
        _check_version(self._version())
        content = self.content
        root = FbxElement(name="")
        open_elements = [root]
        place = 0
        while True:
            blank = _BLANK.match(content, place)
            place = place if blank is None else blank.end()
            if place >= len(content):
                break
            if content[place : place + 1] == b"}":
                place += 1
                if len(open_elements) > 1:
                    open_elements.pop()
                else:
                    self.warnings.add("invalid_value", "a closing brace without element")
                continue
            name = _NAME.match(content, place)
            if name is None:
                self._skip(content, place)
                line = content.find(b"\n", place)
                place = len(content) if line < 0 else line + 1
                continue
            element = FbxElement(name=name[1].decode("latin-1"))
            open_elements[-1].children.append(element)
            place, is_open = self._values(element, name.end())
            if is_open:
                if len(open_elements) >= MAX_DEPTH:
                    raise Reject("unreadable", error="nested_too_deeply", depth=MAX_DEPTH)
                open_elements.append(element)
        if len(open_elements) > 1:
            self.warnings.add("truncated_data", f"{open_elements[-1].name} is not closed")
        return self._version(), root

    def _version(self) -> int:
        found = re.search(rb"FBXVersion:[ \t]*(\d{4,5})", self.content[:20_000])
        if found is None:
            found = re.search(rb";[ \t]*FBX[ \t]+(\d+)\.(\d+)\.(\d+)", self.content[:1000])
            if found is None:
                raise Reject("unreadable", error="no_version")
            major, minor, patch = (int(digits[:3]) for digits in found.groups())
            return 1000 * major + 100 * minor + 10 * patch
        return int(found[1])

    def _skip(self, content: bytes, place: int) -> None:
        self.warnings.add("invalid_value", content[place : place + 40].decode("latin-1"))

    def _values(self, element: FbxElement, place: int) -> tuple[int, bool]:
        """Read the values after a name.

        Returns:
            (place, is_open): where they end, and whether the element has children.
        """
        content = self.content
        needs_value = False
        while True:
            if needs_value:  # a list goes on after a comma, on the next line too
                blank = _BLANK.match(content, place)
                place = place if blank is None else blank.end()
                needs_value = False
            else:
                while content[place : place + 1] in (b" ", b"\t"):
                    place += 1
            start = content[place : place + 1]
            if start == b",":
                place += 1
                needs_value = True
                continue
            if start == b"{":
                return place + 1, True
            if start in (b"", b"\r", b"\n", b";", b"}"):
                # Some writers begin the next line with the comma, or begin the values there.
                comma = (_COMMA if element.values else _NEXT_LINE).match(content, place)
                if comma is None:
                    return place, False
                place = comma.end()
                needs_value = True
                continue
            if start == b"*":
                counted = _COUNT.match(content, place)
                if counted is not None:
                    return self._array(element, counted)
            if start == b'"':
                text = _STRING.match(content, place)
                if text is None:
                    self.warnings.add("truncated_data", f"{element.name}: a text does not end")
                    return len(content), False
                element.values.append(_decoded(text[1].replace(b"&quot;", b'"'), self.warnings))
                place = text.end()
                continue
            numbers = _NUMBERS.match(content, place)
            if numbers is not None:
                element.values += self._numbers(numbers[0])
                place = numbers.end()
                continue
            word = _WORD.match(content, place)
            assert word is not None
            element.values.append({b"T": True, b"Y": True}.get(word[0], word[0].decode("latin-1")))
            place = word.end()

    def _numbers(self, text: bytes) -> list[object]:
        if len(text) > LONG_LIST * 8:
            return [FbxArray(dtype="f8", count=-1, content=text, encoding="text")]
        values: list[object] = []
        for word in text.split(b","):
            try:
                values.append(int(word))
            except ValueError:
                values += parse_numbers(word, self.warnings).tolist()
        return values

    def _array(self, element: FbxElement, counted: re.Match[bytes]) -> tuple[int, bool]:
        """Read "*count { a: ... }"."""
        content = self.content
        count = int(counted[1][:18])
        opening = content.find(b"{", counted.end(), counted.end() + 100)
        closing = content.find(b"}", opening)
        if opening < 0 or closing < 0:
            self.warnings.add("truncated_data", element.name)
            return len(content) if closing < 0 else counted.end(), False
        text = content[opening + 1 : closing].partition(b":")[2]
        element.values.append(FbxArray(dtype="f8", count=count, content=text, encoding="text"))
        return closing + 1, False


def embedded_bytes(element: FbxElement | None) -> bytes | None:
    """Return the content of an embedded file, None if there is none.

    Binary files store bytes, and text files one or several pieces in base 64.

    Raises:
        ValueError: If the text is not base 64.
    """
    if element is None:
        return None
    pieces = []
    for value in element.values:
        if isinstance(value, bytes):
            pieces.append(value)
        elif isinstance(value, str):
            try:
                pieces.append(base64.b64decode("".join(value.split()), validate=True))
            except binascii.Error as error:
                raise ValueError(f"the content is not base 64: {error}") from error
    content = b"".join(pieces)
    return content or None
