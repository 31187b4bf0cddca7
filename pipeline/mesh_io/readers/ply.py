"""Read PLY files: text and both byte orders, polygons, triangle strips, colours and textures."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import check_claimed_bytes, check_face_count
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.binary_rows import (
    BinaryProperty,
    Rows,
    read_rows,
    to_float32,
    to_float64,
)
from pipeline.mesh_io.readers.colors import material_of_colors, to_rgba8
from pipeline.mesh_io.readers.strips import are_drawn
from pipeline.mesh_io.readers.text import (
    count_words_of_lines,
    find_spelling,
    parse_numbers,
    plain_text,
    ranges,
    spellings,
)
from pipeline.mesh_io.readers.text_rows import counts_that_fit
from pipeline.mesh_io.scene import (
    Attribute,
    Geometry,
    Scene,
    SceneImage,
    SceneMaterial,
    TextureSlot,
)

TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("int64", "longlong"), "i8"),
    **dict.fromkeys(("uint64", "ulonglong"), "u8"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
BYTE_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER_LINES = 10_000
INDEX_NAMES = ("vertex_indices", "vertex_index", "vertex_indexes", "indices")
NORMAL_NAMES = (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"))
COLOR_NAMES = (
    ("red", "green", "blue", "alpha"),
    ("r", "g", "b", "a"),
    ("diffuse_red", "diffuse_green", "diffuse_blue", "diffuse_alpha"),
)
UV_NAMES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t"))
TEXTURE_NUMBER = "texnumber"
CORNER_UV = "texcoord"


@dataclass(kw_only=True)
class _Element:
    """An element of the header. A property is [name, type, type of the length or None]."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)


@dataclass(kw_only=True)
class _Header:
    order: str  # "=" for a text, "<" or ">"
    elements: list[_Element]
    textures: list[bytes]  # names of `comment TextureFile`
    end: int  # where the data begins


def read_ply(content: bytes, context: ReaderContext) -> Scene:
    """Read a PLY file.

    Colours are taken as sRGB. Textures are those of MeshLab's `comment TextureFile`. A texture
    replaces the colours of vertices and faces.

    Raises:
        Reject: "unreadable" (also if the data ends before the first face), "allocation_bomb" or
            "too_many_faces".
    """
    header = _read_header(content, context.warnings)
    available = len(content) - header.end
    for element in header.elements:
        # The least size of a value: a digit and a blank in text, an empty list in binary.
        row_bytes = sum(
            2 if header.order == "=" else np.dtype(length or kind).itemsize
            for _, kind, length in element.properties
        )
        check_claimed_bytes(f"element {element.name}", element.count * row_bytes, available)
        if element.name == "face":
            check_face_count(element.count, context.cfg)
    read = _read_text if header.order == "=" else _read_binary
    tables, is_cut = read(content, header, context.warnings)
    if header.order == "=":
        _with_declared_types(tables, header, context.warnings)
    return _Builder(header, tables, context).scene(is_cut=is_cut)


def _read_header(content: bytes, warnings: WarningLog) -> _Header:
    # The first line tells the line ends: data may begin with any of their bytes.
    start = re.match(rb"(?:\xef\xbb\xbf)?ply[ \t]*(\r\n|\n|\r)", content)
    if start is None:
        raise Reject("unreadable", error="no_ply_line")
    line_end = start[1]
    place = start.end()
    header = _Header(order="", elements=[], textures=[], end=0)
    for _ in range(MAX_HEADER_LINES):
        end = content.find(line_end, place)
        line = content[place : end if end >= 0 else len(content)].strip()
        place = end + len(line_end) if end >= 0 else len(content)
        words = line.decode("latin-1").split()
        keyword = words[0] if words else ""
        if keyword == "end_header":
            break
        if end < 0:
            raise Reject("unreadable", error="no_end_header")
        if keyword == "format" and len(words) > 1 and words[1] in BYTE_ORDERS:
            header.order = BYTE_ORDERS[words[1]]
            if words[2:] != ["1.0"]:
                warnings.add("invalid_value", f"version {' '.join(words[2:])[:20]}")
        elif keyword == "element" and len(words) > 2:
            header.elements.append(_Element(name=words[1], count=int(words[2])))
        elif keyword == "property" and header.elements:
            _add_property(header.elements[-1], words)
        elif keyword == "comment":
            texture = re.match(rb"comment\s+TextureFile\s+(.*)", line, re.IGNORECASE)
            if texture is not None:
                header.textures.append(texture[1].strip())
        elif keyword not in ("", "obj_info"):
            warnings.add("unknown_element", f"header: {line[:40].decode('latin-1')}")
    else:
        raise Reject("unreadable", error="no_end_header")
    if not header.order:
        raise Reject("unreadable", error="no_format")
    header.end = place
    return header


def _add_property(element: _Element, words: list[str]) -> None:
    is_list = words[1:2] == ["list"]
    types = words[2:4] if is_list else words[1:2]
    if len(words) < 3 + 2 * is_list or any(name not in TYPES for name in types):
        raise Reject("unreadable", error="ply_property", line=" ".join(words)[:80])
    length = TYPES[types[0]] if is_list else None
    if length is not None and length.startswith("f"):
        raise Reject("unreadable", error="ply_property", line=" ".join(words)[:80])
    # Names are unique, so that a table can be looked up by name.
    name = words[-1]
    names = [known for known, _, _ in element.properties]
    while name in names:
        name += "_again"
    element.properties.append((name, TYPES[types[-1]], length))


def _read_binary(content: bytes, header: _Header, warnings: WarningLog) -> tuple[list[Rows], bool]:
    """Return the rows of each element, and whether the data ends early."""
    counts = [element.count for element in header.elements]
    tables, end = _read_elements(content, header, counts)
    missing = sum(counts) - sum(table.count for table in tables)
    if missing or end < len(content):
        corrected = _corrected_counts(content, header)
        if corrected is not None and corrected[:-1] == counts[:-1] and corrected[-1] < counts[-1]:
            missing = counts[-1] - corrected[-1]
        elif corrected is not None:
            warnings.add("count_mismatch", f"{counts} rows declared, {corrected} found")
            return _read_elements(content, header, corrected)[0], False
    _warn_about_the_end(missing, sum(counts), f"{len(content) - end} bytes", warnings)
    return tables, missing > 0


def _read_elements(
    content: bytes, header: _Header, counts: Sequence[int]
) -> tuple[list[Rows], int]:
    tables = []
    place = header.end
    is_complete = True
    for element, count in zip(header.elements, counts, strict=True):
        properties = [
            BinaryProperty(
                name=name,
                dtype=np.dtype(header.order + kind),
                count_dtype=None if length is None else np.dtype(header.order + length),
            )
            for name, kind, length in element.properties
        ]
        rows = read_rows(content, place, count if is_complete else 0, properties)
        is_complete = is_complete and rows.count == count
        place = rows.end
        tables.append(rows)
    return tables, place


def _corrected_counts(content: bytes, header: _Header) -> list[int] | None:
    """Return counts that use all bytes if one of them is wrong, the last element first."""
    declared = [element.count for element in header.elements]
    for index in reversed(range(len(declared))):
        for count in _possible_counts(content, header, index):
            counts = declared.copy()
            counts[index] = count
            if count == declared[index] or count < 0:
                continue
            tables, end = _read_elements(content, header, counts)
            is_complete = all(
                table.count == number for table, number in zip(tables, counts, strict=True)
            )
            if end == len(content) and is_complete and _is_plausible(header, tables):
                return counts
    return None


def _possible_counts(content: bytes, header: _Header, index: int) -> list[int]:
    """Return what the count of an element can be if all others are right."""
    declared = [element.count for element in header.elements]
    if index == len(declared) - 1:
        before = declared.copy()
        before[index] = len(content)  # as many as there are
        return [_read_elements(content, header, before)[0][index].count]
    # Elements of a fixed size, and lists of three or four items.
    counts = []
    for items in (3, 4):
        sizes = [
            sum(
                np.dtype(kind).itemsize * (1 if length is None else items)
                + (0 if length is None else np.dtype(length).itemsize)
                for _, kind, length in element.properties
            )
            for element in header.elements
        ]
        others = sum(
            size * count
            for k, (size, count) in enumerate(zip(sizes, declared, strict=True))
            if k != index
        )
        rest = len(content) - header.end - others
        if sizes[index] and rest >= 0 and rest % sizes[index] == 0:
            counts.append(rest // sizes[index])
    return counts


def _is_plausible(header: _Header, tables: list[Rows]) -> bool:
    """Return whether all faces refer to vertices that exist."""
    by_name = {element.name: table for element, table in zip(header.elements, tables, strict=True)}
    faces, vertices = by_name.get("face"), by_name.get("vertex")
    if faces is None or vertices is None or not faces.count:
        return False
    lists = [faces.lists[name] for name in INDEX_NAMES if name in faces.lists]
    if not lists:
        return False
    corners, sizes = lists[0]
    is_inside = (corners >= 0) & (corners < vertices.count)
    return bool(is_inside.all() and (sizes >= 3).all())


def _read_text(content: bytes, header: _Header, warnings: WarningLog) -> tuple[list[Rows], bool]:
    """Return the rows of each element, and whether the data ends early."""
    body = plain_text(content[header.end :])
    values = parse_numbers(body, warnings)
    counts = [element.count for element in header.elements]
    tables, end = _rows_of_stream(values, header, counts)
    missing = sum(counts) - sum(table.count for table in tables)
    if not missing and end == len(values):
        return tables, False

    # One row a line, and one of the counts is wrong.
    words = count_words_of_lines(body)
    first = np.cumsum(words) - words
    lengths = [_row_lengths_of_lines(values, first, words, item) for item in header.elements]
    fits = [length == words for length in lengths]
    declared = {element.name: element.count for element in header.elements}
    if len(declared) == len(counts) and counts:
        found = counts_that_fit(declared, fits, warnings)
        if found is not None:
            tables, _ = _rows_of_stream(values, header, found)
            return tables, sum(found) < sum(counts)
        # Some exporters write more numbers in a line than the header declares.
        if sum(counts) <= len(words) and sum(counts):
            owner = np.repeat(np.arange(len(counts)), counts)
            used = np.array(lengths)[owner, np.arange(len(owner))]
            if (used > 0).all():
                prefixes = values[ranges(first[: len(owner)], used)]
                tables, _ = _rows_of_stream(prefixes, header, counts)
                longer = int((words[: len(owner)] > used).sum())
                detail = f"{longer} lines with more numbers than declared"
                warnings.add("trailing_data", detail, longer + len(words) - len(owner))
                return tables, False
    _warn_about_the_end(missing, sum(counts), f"{len(values) - end} numbers", warnings)
    return tables, missing > 0


def _warn_about_the_end(missing: int, declared: int, trailer: str, warnings: WarningLog) -> None:
    """Report rows that are missing, or what follows the last row ("0 ..." is nothing)."""
    if missing:
        warnings.add("truncated_data", f"{missing} of {declared} rows are missing")
    elif not trailer.startswith("0 "):
        warnings.add("trailing_data", trailer)


def _row_lengths_of_lines(
    values: NDArray[np.float64],
    first: NDArray[np.int64],
    words: NDArray[np.int64],
    element: _Element,
) -> NDArray[np.int64]:
    """Return how many numbers of each line [L] a row of an element takes.

    It is 0 where the line has fewer numbers, or cannot be such a row.
    """
    place = first.copy()
    end = first + words
    fits = np.ones(len(first), dtype=bool)
    for _, _, length in element.properties:
        fits &= place < end
        if length is not None:
            sizes = values[np.where(fits, place, 0)] if len(values) else np.zeros(len(first))
            with np.errstate(invalid="ignore"):
                fits &= (sizes >= 0) & (sizes == np.rint(sizes)) & (sizes <= end - place)
            place = place + np.where(fits, sizes, 0).astype(np.int64)
        place = place + 1
    return np.where(fits & (place <= end), place - first, 0)


def _rows_of_stream(
    values: NDArray[np.float64], header: _Header, counts: Sequence[int]
) -> tuple[list[Rows], int]:
    """Read the rows of all elements from the numbers of a text, wherever its lines end."""
    tables = []
    place = 0
    is_complete = True
    for element, count in zip(header.elements, counts, strict=True):
        rows = _rows_of_numbers(values, place, count if is_complete else 0, element)
        is_complete = is_complete and rows.count == count
        place = rows.end
        tables.append(rows)
    return tables, place


def _rows_of_numbers(
    values: NDArray[np.float64], start: int, count: int, element: _Element
) -> Rows:
    """Read up to `count` rows of an element from the numbers of a text."""
    lengths = [length is not None for _, _, length in element.properties]
    width = len(lengths)
    if not any(lengths):
        complete = count if not width else min(count, (len(values) - start) // width)
        end = start + complete * width
        table = values[start:end].reshape(complete, width)
        rows = Rows(count=complete, end=end)
        for column, (name, _, _) in enumerate(element.properties):
            rows.scalars[name] = table[:, column]
    else:
        starts, sizes = _find_rows(values, start, count, lengths)
        complete = len(starts)
        rows = Rows(count=complete, end=start)
        place = starts
        which = 0
        for (name, _, _), is_list in zip(element.properties, lengths, strict=True):
            if is_list:
                lists = values[ranges(place + 1, sizes[:, which])]
                rows.lists[name] = (lists, sizes[:, which])
                place = place + 1 + sizes[:, which]
                which += 1
            else:
                rows.scalars[name] = values[place]
                place = place + 1
        if complete:
            rows.end = int(place[-1])
    return rows


def _with_declared_types(tables: list[Rows], header: _Header, warnings: WarningLog) -> None:
    """Convert the numbers of a text to the types that the header declares, where they fit.

    Numbers that do not fit give "invalid_value". An index is what the text says, whatever its
    declared type is. A column with fractions stays one of floats, and other scalars are limited to
    the range of their type.
    """
    for element, rows in zip(header.elements, tables, strict=True):
        for name, kind, length in element.properties:
            if kind.startswith("f"):
                continue
            values = rows.scalars[name] if length is None else rows.lists[name][0]
            # A negative number in 8 bits is what some writers make of 128 to 255.
            info = np.iinfo("u1" if kind == "i1" else kind)
            low, high = (-128 if kind == "i1" else info.min), info.max
            with np.errstate(invalid="ignore"):
                is_whole = values == np.rint(values)
                fits = is_whole & (values >= low) & (values <= high)
            detail = f"{element.name}: {name} beyond its type"
            warnings.add("invalid_value", detail, int((~fits).sum()))
            if length is not None:
                rows.lists[name] = (_as_indices(values), rows.lists[name][1])
            elif is_whole.all():
                whole = np.clip(values, low, min(high, 2**62)).astype(np.int64)
                is_narrow = kind in ("u1", "i1", "u2", "i2")
                rows.scalars[name] = whole.astype(kind) if is_narrow else whole


def _as_indices(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return numbers as integers. What is no integer becomes -1, which no vertex has."""
    with np.errstate(invalid="ignore"):
        is_usable = (np.abs(values) < 2**62) & (values == np.rint(values))
    return np.where(is_usable, np.where(is_usable, values, 0), -1).astype(np.int64)


def _find_rows(
    values: NDArray[np.float64], start: int, count: int, is_list: list[bool]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each row begins in `values`, and the lengths of its lists [N, lists]."""
    num_lists = sum(is_list)
    # All rows like the first, which is usual.
    row = _row_lengths(values[start : start + 1000].tolist(), 0, is_list)
    if row is not None and count:
        width = len(is_list) + sum(row)
        complete = min(count, (len(values) - start) // width)
        if complete == count:
            table = values[start : start + count * width].reshape(count, width)
            place = which = 0
            is_uniform = True
            for item in is_list:
                if item:
                    is_uniform = is_uniform and bool((table[:, place] == row[which]).all())
                    place += row[which]
                    which += 1
                place += 1
            if is_uniform:
                starts = start + width * np.arange(count)
                return starts, np.tile(np.array(row, dtype=np.int64), (count, 1))
    numbers = values[start:].tolist()
    starts, sizes = array("q"), array("q")
    place = 0
    while len(starts) < count:
        row = _row_lengths(numbers, place, is_list)
        if row is None:
            break
        starts.append(start + place)
        sizes.extend(row)
        place += len(is_list) + sum(row)
    return np.frombuffer(starts, np.int64), np.frombuffer(sizes, np.int64).reshape(-1, num_lists)


def _row_lengths(numbers: list[float], place: int, is_list: list[bool]) -> list[int] | None:
    """Return the lengths of the lists of a row, or None if the numbers end before the row does."""
    row = []
    for item in is_list:
        if item:
            if place >= len(numbers):
                return None
            size = numbers[place]
            if not 0 <= size <= len(numbers) or size != int(size):
                return None
            row.append(int(size))
            place += int(size)
        place += 1
    return row if place <= len(numbers) else None


class _Builder:
    """Makes the scene of one file from the rows of its elements."""

    def __init__(self, header: _Header, tables: list[Rows], context: ReaderContext):
        self.header = header
        self.context = context
        self.warnings = context.warnings
        self.tables: dict[str, Rows] = {}
        for element, rows in zip(header.elements, tables, strict=True):
            if element.name in self.tables:
                self.warnings.add("unknown_element", f"second element {element.name}", rows.count)
            else:
                self.tables[element.name] = rows
        self.used: dict[str, set[str]] = {name: set() for name in self.tables}

    def scene(self, *, is_cut: bool) -> Scene:
        """Return the scene. `is_cut` says that the data ends early."""
        vertices = self.tables.get("vertex", Rows(count=0, end=0))
        columns = self._columns("vertex", (("x", "y", "z"),))
        if vertices.count and columns is None:
            raise Reject("unreadable", error="vertices_without_positions")
        positions = np.empty((0, 3)) if columns is None else to_float64(np.stack(columns, axis=1))
        corners, sizes, is_face = self._polygons(positions)
        check_face_count(len(sizes), self.context.cfg)
        if is_cut and not len(sizes):
            raise Reject("unreadable", error="truncated", vertices=len(positions), faces=0)
        normals = self._columns("vertex", NORMAL_NAMES)
        uv, texture_of_face = self._texture_coordinates(corners, sizes, is_face)
        materials, images = self._textures(uv)
        if materials:
            colors, translucent = None, []
            self._account_for_colors_beside_a_texture()
        else:
            colors, translucent = self._colors(sizes, is_face)
        self._account_for_the_rest()
        of_face: NDArray[np.int64] | int = -1
        if materials:
            of_face = np.full(len(sizes), 0) if texture_of_face is None else texture_of_face
        elif translucent:
            of_face = 0
        geometry = Geometry(
            positions=positions,
            corners=corners,
            contours=np.concatenate([[0], np.cumsum(sizes)]),
            uv={} if uv is None else {0: uv},
            colors=colors,
            normals=None
            if normals is None
            else Attribute(values=to_float32(np.stack(normals, axis=1))),
            materials=of_face,
        )
        return Scene.of_geometries(
            [geometry], materials=materials or translucent, images=images, points=len(positions)
        )

    def _columns(
        self, element: str, choices: Sequence[tuple[str, ...]]
    ) -> list[NDArray[Any]] | None:
        """Return the scalars of the first choice of names that an element has."""
        rows = self.tables.get(element)
        for names in choices:
            if rows is not None and all(name in rows.scalars for name in names):
                self.used[element] |= set(names)
                return [rows.scalars[name] for name in names]
        return None

    def _polygons(
        self, positions: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return the corners, their number for each polygon, and which polygons are faces."""
        corners, sizes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        count = 0
        for element in ("face", "tristrips"):
            rows = self.tables.get(element)
            if rows is None:
                continue
            name = next((name for name in INDEX_NAMES if name in rows.lists), None)
            if name is None:
                self.warnings.add(
                    "primitive_unreadable", f"{element} without vertex_indices", rows.count
                )
                continue
            self.used[element].add(name)
            items, lengths = rows.lists[name]
            if items.dtype.kind == "f":
                items = _as_indices(to_float64(items))
            items = items.astype(np.int64)
            if element == "face":
                corners.append(items)
                sizes.append(lengths)
                count = len(lengths)
            else:
                triangles = _strip_triangles(items, lengths)
                triangles = triangles[are_drawn(triangles, positions)]
                corners.append(triangles.reshape(-1))
                sizes.append(np.full(len(triangles), 3))
        lengths = np.concatenate(sizes)
        return np.concatenate(corners), lengths, np.arange(len(lengths)) < count

    def _texture_coordinates(
        self, corners: NDArray[np.int64], sizes: NDArray[np.int64], is_face: NDArray[np.bool_]
    ) -> tuple[Attribute | None, NDArray[np.int64] | None]:
        """Return texture coordinates, and the texture of each polygon if the file states it."""
        num_faces = int(is_face.sum())
        textures = None
        faces = self.tables.get("face")
        number = self._columns("face", ((TEXTURE_NUMBER,),))
        if number is not None:
            textures = np.full(len(sizes), 0)
            textures[:num_faces] = number[0]
        if faces is not None and CORNER_UV in faces.lists:
            self.used["face"].add(CORNER_UV)
            items, lengths = faces.lists[CORNER_UV]
            is_given = lengths == 2 * sizes[:num_faces]
            self.warnings.add(
                "attribute_mismatch",
                "faces with another number of texture coordinates than corners",
                int((~is_given & (lengths > 0)).sum()),
            )
            if is_given.any():
                uv = np.zeros((int(sizes.sum()), 2), dtype=np.float32)
                starts = np.cumsum(sizes)[:num_faces] - sizes[:num_faces]
                targets = ranges(starts[is_given], sizes[:num_faces][is_given])
                begins = (np.cumsum(lengths) - lengths)[is_given]
                uv[targets] = to_float32(items[ranges(begins, lengths[is_given])]).reshape(-1, 2)
                textures = np.zeros(len(sizes), dtype=np.int64) if textures is None else textures
                textures[:num_faces][~is_given] = -1
                textures[num_faces:] = -1
                return Attribute(values=uv, domain="corner"), textures
        columns = self._columns("vertex", UV_NAMES)
        if columns is None:
            return None, None
        number = self._columns("vertex", ((TEXTURE_NUMBER,),))
        if number is not None and textures is None and len(number[0]):
            # The texture of the first corner.
            first = np.minimum(np.cumsum(sizes) - sizes, max(len(corners) - 1, 0))
            owner = corners[first] if len(corners) else np.empty(0, dtype=np.int64)
            textures = number[0][np.clip(owner, 0, len(number[0]) - 1)].astype(np.int64)
        return Attribute(values=to_float32(np.stack(columns, axis=1))), textures

    def _textures(self, uv: Attribute | None) -> tuple[list[SceneMaterial], list[SceneImage]]:
        """Return a material for each texture of the header."""
        if not self.header.textures or uv is None:
            self.warnings.add(
                "texture_without_uv", "TextureFile", len(self.header.textures) if uv is None else 0
            )
            return [], []
        side_files = self.context.side_files
        images = []
        for name in self.header.textures:
            text = find_spelling(name, side_files) or spellings(name)[0]
            images.append(SceneImage(name=text, content=side_files.read(text)))
        if all(image.content is None for image in images):
            return [], []
        materials = [
            SceneMaterial(
                name=image.name,
                base_color=(1.0, 1.0, 1.0, 1.0),
                base_color_texture=TextureSlot(image=index),
            )
            for index, image in enumerate(images)
        ]
        return materials, images

    def _colors(
        self, sizes: NDArray[np.int64], is_face: NDArray[np.bool_]
    ) -> tuple[Attribute | None, list[SceneMaterial]]:
        """Return the colours of the vertices, or else those of the faces."""
        colors = self._rgba("vertex")
        face_colors = self._rgba("face")
        if colors is not None:
            if face_colors is not None:
                self.warnings.add("appearance_ignored", "face colours beside vertex colours")
            colors, materials = material_of_colors(colors, self.warnings)
            return (None if colors is None else Attribute(values=colors)), materials
        if face_colors is None:
            return None, []
        rgba = np.full((len(sizes), 4), 255, dtype=np.uint8)
        rgba[is_face] = face_colors
        rgba, materials = material_of_colors(rgba, self.warnings)
        assert rgba is not None
        return Attribute(values=rgba, domain="polygon"), materials

    def _rgba(self, element: str) -> NDArray[np.uint8] | None:
        names = next(
            (names for names in COLOR_NAMES if self._columns(element, (names[:3],)) is not None),
            None,
        )
        columns = None if names is None else self._columns(element, (names[:3],))
        if names is None or columns is None:
            return None
        alpha = self._columns(element, (names[3:], ("alpha",)))
        rgb = np.stack(columns, axis=1)
        return to_rgba8(rgb, None if alpha is None else alpha[0], self.warnings)

    def _account_for_colors_beside_a_texture(self) -> None:
        for element in ("vertex", "face"):
            colors = self._rgba(element)
            if colors is not None and (colors != 255).any():
                self.warnings.add("appearance_ignored", f"{element} colours beside a texture")

    def _account_for_the_rest(self) -> None:
        """Warn about elements and properties that were not used."""
        ignored = IGNORED_ELEMENTS["ply"]
        for element in self.header.elements:
            name = element.name
            if name not in self.tables or not element.count:
                continue
            rows = self.tables[name]
            if name == "edge":
                self.warnings.add("lines_left_out", "edge", rows.count)
            elif name in ("vertex", "face", "tristrips"):
                for item, _, _ in element.properties:
                    if item not in self.used[name] and item not in ignored:
                        self.warnings.add("unknown_attribute", f"{name}: {item}")
            elif name not in ignored:
                self.warnings.add("unknown_element", name)


def _strip_triangles(items: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the triangles [F, 3] of strips. -1 ends a strip, and every second triangle turns."""
    ends = np.zeros(len(items), dtype=bool)  # whether a new strip begins at an item
    starts = np.cumsum(lengths) - lengths
    ends[starts[lengths > 0]] = True
    is_separator = items == -1
    # The place of each item in its strip.
    place = np.arange(len(items))
    restart = np.where(is_separator, place + 1, np.where(ends, place, 0))
    begin = np.maximum.accumulate(restart) if len(items) else restart
    place = place - begin
    last = np.flatnonzero((place >= 2) & ~is_separator)
    triangles = np.stack([items[last - 2], items[last - 1], items[last]], axis=1)
    is_odd = place[last] % 2 == 1
    triangles[is_odd] = triangles[is_odd][:, [1, 0, 2]]
    return triangles
