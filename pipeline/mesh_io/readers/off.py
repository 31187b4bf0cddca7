"""Read OFF files: [ST][C][N][4][n]OFF, as text or binary, and the headers of ModelNet."""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import check_claimed_bytes, check_face_count
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.binary_rows import BinaryProperty, read_rows, to_float32, to_float64
from pipeline.mesh_io.readers.colors import material_of_colors, to_rgba8
from pipeline.mesh_io.readers.text import (
    count_words_of_lines,
    parse_numbers,
    plain_text,
    ranges,
)
from pipeline.mesh_io.readers.text_rows import counts_that_fit
from pipeline.mesh_io.scene import Attribute, Geometry, Scene

HEADER = re.compile(rb"\s*(\w*?)OFF(?=[\s\d]|$)", re.IGNORECASE)
BINARY_HEADER = re.compile(rb"\s*(\w*?)OFF[ \t]+BINARY[ \t]*\r?\n", re.IGNORECASE)
FACE_COLOR_SIZES = (0, 1, 3, 4)  # none, an index of a colour map, RGB, RGBA


class _Layout:
    """What a header word says about the values of a vertex."""

    def __init__(self, prefix: str):
        rest = prefix
        # Geomview writes the letters in this order. Lower case "n" is not upper case "N".
        flags = {}
        for flag in ("ST", "C", "N", "4", "n"):
            flags[flag] = rest.startswith(flag)
            rest = rest.removeprefix(flag) if flags[flag] else rest
        if rest:  # another order, or lower case
            flags = {flag: flag in prefix.upper() for flag in ("ST", "C", "N", "4")} | {"n": False}
            if re.fullmatch("(ST|C|N|4)*", prefix.upper()) is None:
                raise Reject("unreadable", error="off_header", header=ascii(prefix + "OFF"))
        self.has_uv, self.has_colors, self.has_normals = flags["ST"], flags["C"], flags["N"]
        self.has_weight, self.has_dimension = flags["4"], flags["n"]
        self.dimension = 3

    @property
    def num_coordinates(self) -> int:
        return self.dimension + self.has_weight

    def columns(self, count: int) -> dict[str, slice] | None:
        """Return where the attributes are in rows of `count` values.

        Colours may have 3 or 4 values, and a header that does not name them may have them. Other
        additional values are called "unknown". Too few values give None.
        """
        fixed = self.num_coordinates + 3 * self.has_normals + 2 * self.has_uv
        extra = count - fixed
        if extra < 0:
            return None
        sizes = {
            "positions": self.num_coordinates,
            "normals": 3 * self.has_normals,
            "colors": extra if extra in (3, 4) else 0,
            "uv": 2 * self.has_uv,
            "unknown": 0 if extra in (3, 4) else extra,
        }
        columns = {}
        start = 0
        for name, size in sizes.items():
            if size:
                columns[name] = slice(start, start + size)
            start += size
        return columns

    @property
    def stated_width(self) -> int:
        """Number of values of a vertex according to the header."""
        return self.num_coordinates + 3 * self.has_normals + 4 * self.has_colors + 2 * self.has_uv


def read_off(content: bytes, context: ReaderContext) -> Scene:
    """Read an OFF file.

    Colours are taken as sRGB. Polygons with one or two corners are points and lines. If the
    declared counts do not fit the lines, the counts that fit are used, with "count_mismatch".

    Raises:
        Reject: "wrong_magic", "unreadable" (also if the data ends before the first face),
            "allocation_bomb" or "too_many_faces".
    """
    binary = BINARY_HEADER.match(content)
    if binary is not None:
        layout = _Layout(binary[1].decode("latin-1"))
        return _read_binary(content, binary.end(), layout, context)
    text = re.sub(rb"#[^\n]*", b"", plain_text(content))
    header = HEADER.match(text)
    if header is None and re.match(rb"\s*\d+\s+\d+\s", text) is None:
        begins = ascii(content[:16].decode("latin-1"))
        raise Reject("wrong_magic", format="off", begins=begins)
    layout = _Layout("" if header is None else header[1].decode("latin-1"))
    num_vertices, num_faces, body = _read_counts(text[header.end() if header else 0 :], layout)
    _check_counts(num_vertices, num_faces, layout, len(content), context)
    values = parse_numbers(body, context.warnings)
    return _read_text(values, body, num_vertices, num_faces, layout, context)


def _read_counts(text: bytes, layout: _Layout) -> tuple[int, int, bytes]:
    """Return the declared numbers of vertices and faces, and the text after the counts."""
    words = re.compile(rb"\s*(\S+)")
    place = 0

    def next_number() -> int:
        nonlocal place
        word = words.match(text, place)
        if word is None:
            raise Reject("unreadable", error="truncated", what="counts")
        place = word.end()
        return int(float(word[1]))

    if layout.has_dimension:
        layout.dimension = next_number()
        if not 1 <= layout.dimension <= 3:
            raise Reject("unreadable", error="off_dimension", dimension=layout.dimension)
    vertices, faces = next_number(), next_number()
    # The number of edges may be missing, or stand in a line of its own.
    rest = re.compile(rb" *(\S+)|\s*(\S+) *\n").match(text, place)
    return vertices, faces, text[place if rest is None else rest.end() :]


def _check_counts(
    vertices: int, faces: int, layout: _Layout, size: int, context: ReaderContext
) -> None:
    check_claimed_bytes("vertices", 2 * layout.num_coordinates * vertices, size)
    check_claimed_bytes("faces", 4 * faces, size)
    check_face_count(faces, context.cfg)


def _read_text(
    values: NDArray[np.float64],
    body: bytes,
    num_vertices: int,
    num_faces: int,
    layout: _Layout,
    context: ReaderContext,
) -> Scene:
    warnings = context.warnings
    words = count_words_of_lines(body)
    first = np.cumsum(words) - words  # of each line, in `values`
    width = int(words[0]) if len(words) else 0
    columns = layout.columns(width)

    def scene(num_vertices: int, width: int, faces: _Faces) -> Scene:
        if num_faces and not len(faces.starts):
            raise Reject("unreadable", error="truncated", vertices=num_vertices, faces=0)
        vertices = values[: num_vertices * width].reshape(-1, width)
        return _scene(vertices, layout, values, faces, context)

    # One row a line, as nearly all writers do.
    is_regular = columns is not None and bool((words[:num_vertices] == width).all())
    if is_regular and len(words) == num_vertices + num_faces:
        faces = _faces_of_lines(values, first[num_vertices:], words[num_vertices:])
        if faces is not None:
            return scene(num_vertices, width, faces)

    # Rows that span lines, or several in a line.
    is_known = columns is not None and "unknown" not in columns
    stream_width = width if is_regular and is_known else layout.stated_width
    start = num_vertices * stream_width
    faces = _Faces.empty()
    for line_ends in (None, first + words):
        faces = _walk(values, start, num_faces, line_ends)
        if len(faces.starts) == num_faces and faces.end(start) == len(values):
            return scene(num_vertices, stream_width, faces)

    # One row a line, and one of the counts is wrong.
    if columns is not None:
        with np.errstate(invalid="ignore"):
            sizes = values[first]
            is_face = (sizes == np.rint(sizes)) & (sizes >= 3)
            is_face &= np.isin(words - sizes - 1, FACE_COLOR_SIZES)
        declared = {"vertices": num_vertices, "faces": num_faces}
        counts = counts_that_fit(declared, [words == width, is_face], warnings)
        if counts is not None:
            lines = slice(counts[0], sum(counts))
            found = _faces_of_lines(values, first[lines], words[lines])
            assert found is not None
            return scene(counts[0], width, found)

    # The data ends early, or something else follows it.
    if start > len(values):
        raise Reject("unreadable", error="truncated", vertices=len(values) // stream_width)
    missing = num_faces - len(faces.starts)
    if missing:
        warnings.add("truncated_data", f"{missing} of {num_faces} faces are missing")
    if faces.end(start) < len(values):
        warnings.add("trailing_data", f"{len(values) - faces.end(start)} numbers")
    return scene(num_vertices, stream_width, faces)


@dataclass(frozen=True, kw_only=True)
class _Faces:
    """Where the faces are in a stream of numbers."""

    starts: NDArray[np.int64]  # [F], the place of the number of corners
    sizes: NDArray[np.int64]  # [F], the number of corners
    colors: NDArray[np.int64]  # [F], the number of values after the corners

    @classmethod
    def empty(cls) -> _Faces:
        none = np.empty(0, dtype=np.int64)
        return cls(starts=none, sizes=none, colors=none)

    def end(self, start: int) -> int:
        """Return where the last face ends, if the first begins at `start`."""
        if not len(self.starts):
            return start
        return int(self.starts[-1] + 1 + self.sizes[-1] + self.colors[-1])


def _faces_of_lines(
    values: NDArray[np.float64], first: NDArray[np.int64], words: NDArray[np.int64]
) -> _Faces | None:
    """Return the faces if each line [F] is one, otherwise None.

    Args:
        values: The numbers of the file.
        first: Where each line begins in `values`.
        words: How many numbers each line has.
    """
    sizes = values[first]
    with np.errstate(invalid="ignore"):
        if not ((sizes == np.rint(sizes)) & (sizes >= 0) & (sizes < words)).all():
            return None
    sizes = sizes.astype(np.int64)
    return _Faces(starts=first, sizes=sizes, colors=words - 1 - sizes)


def _walk(
    values: NDArray[np.float64], start: int, count: int, line_ends: NDArray[np.int64] | None
) -> _Faces:
    """Find up to `count` faces in a stream of numbers.

    Args:
        values: [N], the numbers of the file.
        start: Where the faces begin.
        count: Declared number of faces.
        line_ends: Where each line ends in `values`. The numbers after a face up to the end of its
            line are its colour. None if there are no colours.
    """
    numbers = values[start:].tolist()
    ends = [] if line_ends is None else (line_ends[line_ends > start] - start).tolist()
    faces = array("q")
    place = line = 0
    while place < len(numbers) and len(faces) < 3 * count:
        size = numbers[place]
        if not 0 <= size < len(numbers) - place or size != int(size):
            break
        end = place + 1 + int(size)
        colors = 0
        if line_ends is not None:
            while ends[line] < end:
                line += 1
            colors = ends[line] - end if ends[line] - end in FACE_COLOR_SIZES else 0
        faces.extend((start + place, int(size), colors))
        place = end + colors
    table = np.frombuffer(faces, np.int64).reshape(-1, 3)
    return _Faces(starts=table[:, 0], sizes=table[:, 1], colors=table[:, 2])


def _read_binary(content: bytes, start: int, layout: _Layout, context: ReaderContext) -> Scene:
    """Read the binary form: big-endian int32 counts and indices, float32 values."""
    header = np.frombuffer(content, ">i4", 3 + layout.has_dimension, start).tolist()
    start += 4 * len(header)
    if layout.has_dimension:
        layout.dimension = header.pop(0)
        if not 1 <= layout.dimension <= 3:
            raise Reject("unreadable", error="off_dimension", dimension=layout.dimension)
    num_vertices, num_faces, _ = header
    available = len(content) - start
    width = layout.stated_width
    check_claimed_bytes("vertices", 4 * width * num_vertices, available)
    check_claimed_bytes("faces", 8 * num_faces, available)
    check_face_count(num_faces, context.cfg)
    if available < 4 * width * num_vertices:
        raise Reject("unreadable", error="truncated", what="vertices", available=available)
    vertices = to_float64(np.frombuffer(content, ">f4", num_vertices * width, start))
    rows = read_rows(
        content,
        start + 4 * width * num_vertices,
        num_faces,
        [
            BinaryProperty(name="corners", dtype=np.dtype(">i4"), count_dtype=np.dtype(">i4")),
            BinaryProperty(name="colors", dtype=np.dtype(">f4"), count_dtype=np.dtype(">i4")),
        ],
    )
    if rows.count < num_faces:
        context.warnings.add("truncated_data", f"{rows.count} of {num_faces} faces")
    elif rows.end < len(content):
        context.warnings.add("trailing_data", f"{len(content) - rows.end} bytes")
    # The same stream of numbers as a text: size, corners, colour.
    (corners, sizes), (colors, color_sizes) = rows.lists["corners"], rows.lists["colors"]
    totals = 1 + sizes + color_sizes
    starts = np.cumsum(totals) - totals
    values = np.empty(int(totals.sum()))
    values[starts] = sizes
    values[ranges(starts + 1, sizes)] = corners
    values[ranges(starts + 1 + sizes, color_sizes)] = to_float64(colors)
    vertices = vertices.reshape(-1, width)
    faces = _Faces(starts=starts, sizes=sizes, colors=color_sizes)
    return _scene(vertices, layout, values, faces, context)


def _scene(
    vertices: NDArray[np.float64],
    layout: _Layout,
    values: NDArray[np.float64],
    faces: _Faces,
    context: ReaderContext,
) -> Scene:
    """Make the scene.

    Args:
        vertices: [V, W], one row for each vertex.
        layout: What the columns of `vertices` are.
        values: The numbers of the file.
        faces: Where the faces are in `values`.
        context: Receives warnings.
    """
    warnings = context.warnings
    columns = layout.columns(vertices.shape[1])
    assert columns is not None
    positions = np.zeros((len(vertices), 3))
    positions[:, : layout.dimension] = vertices[:, : layout.dimension]
    if layout.has_weight:
        with np.errstate(divide="ignore", invalid="ignore"):  # checked on the drawn vertices
            positions /= vertices[:, layout.dimension, None]
    if not layout.has_colors and "colors" in columns and (vertices[:, columns["colors"]] < 0).any():
        columns["normals"] = columns.pop("colors")
    if "unknown" in columns:
        size = columns["unknown"].stop - columns["unknown"].start
        warnings.add("unknown_attribute", f"{size} more values of each vertex")
    if layout.has_colors and "colors" not in columns:
        warnings.add("attribute_mismatch", "the header states colours, the vertices have none")
    colors = None
    if "colors" in columns:
        rgba = vertices[:, columns["colors"]]
        colors = to_rgba8(rgba[:, :3], rgba[:, 3] if rgba.shape[1] == 4 else None, warnings)
    starts, sizes = faces.starts, faces.sizes
    face_colors = _face_colors(values, starts + 1 + sizes, faces.colors, warnings)

    warnings.add("points_left_out", count=int((sizes == 1).sum()))
    warnings.add("lines_left_out", count=int((sizes == 2).sum()))
    is_polygon = (sizes != 1) & (sizes != 2)
    starts, sizes = starts[is_polygon], sizes[is_polygon]
    corners = values[ranges(starts + 1, sizes)]
    with np.errstate(invalid="ignore"):
        is_index = (corners == np.rint(corners)) & (np.abs(corners) < 2**53)
    corners = np.where(is_index, corners, -1).astype(np.int64)

    attribute = None
    if colors is not None:
        if face_colors is not None:
            warnings.add("appearance_ignored", "face colours beside vertex colours")
        colors, materials = material_of_colors(colors, warnings)
        attribute = None if colors is None else Attribute(values=colors)
    else:
        face_colors = None if face_colors is None else face_colors[is_polygon]
        face_colors, materials = material_of_colors(face_colors, warnings)
        if face_colors is not None:
            attribute = Attribute(values=face_colors, domain="polygon")
    normals = None
    if "normals" in columns:
        normals = Attribute(values=to_float32(vertices[:, columns["normals"]][:, :3]))
    geometry = Geometry(
        positions=positions,
        corners=corners,
        contours=np.concatenate([[0], np.cumsum(sizes)]),
        colors=attribute,
        normals=normals,
        materials=len(materials) - 1,
    )
    return Scene.of_geometries([geometry], materials=materials, points=len(positions))


def _face_colors(
    values: NDArray[np.float64],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    warnings: WarningLog,
) -> NDArray[np.uint8] | None:
    """Return the colours [F, 4] of faces, or None if no face has one.

    Args:
        values: The numbers of the file.
        starts: [F], where the colour of each face begins in `values`.
        sizes: [F], 0 without a colour, 1 for an index of a colour map, 3 or 4.
        warnings: Receives "appearance_ignored" for colours that cannot be known.
    """
    warnings.add("appearance_ignored", "index of a colour map", int((sizes == 1).sum()))
    known = np.isin(sizes, (3, 4))
    warnings.add("unknown_attribute", "values after a face", int((~known & (sizes > 1)).sum()))
    if not known.any():
        return None
    if not known.all():
        warnings.add("attribute_mismatch", "faces without colour are white", int((~known).sum()))
    rgba = np.full((len(starts), 4), np.nan)
    for size in (3, 4):
        chosen = sizes == size
        rgba[chosen, :size] = values[starts[chosen, None] + np.arange(size)]
    has_alpha = sizes == 4
    colors = np.full((len(starts), 4), 255, dtype=np.uint8)
    colors[known] = to_rgba8(rgba[known, :3], None, warnings)
    if has_alpha.any():
        with_alpha = to_rgba8(rgba[has_alpha, :3], rgba[has_alpha, 3], WarningLog())
        colors[has_alpha, 3] = with_alpha[:, 3]
    return colors
