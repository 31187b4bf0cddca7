"""Read OBJ files: the polygonal part of the format with its materials."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.file_checks import check_face_count
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.binary_rows import to_float32
from pipeline.mesh_io.readers.colors import material_of_colors, to_rgba8
from pipeline.mesh_io.readers.mtl import MaterialLibrary
from pipeline.mesh_io.readers.text import (
    count_words_of_lines,
    find_spelling,
    parse_numbers,
    plain_text,
    spellings,
)
from pipeline.mesh_io.scene import Attribute, Geometry, Scene, SceneMaterial

ABSENT = np.iinfo(np.int64).min  # the index of an attribute that a corner does not have
SPACE, LINE_END, SLASH = ord(" "), ord("\n"), ord("/")
MAX_KEY = 2**62
CURVES = ("curv", "curv2", "surf")
NOT_DRAWN = ("usemap", "maplib")


def read_obj(content: bytes, context: ReaderContext) -> Scene:
    """Read an OBJ file and its material libraries.

    Colours after the coordinates of a vertex are sRGB. A texture replaces them. Faces that lack
    texture coordinates or normals at some corner are drawn without them.

    Raises:
        Reject: "too_many_faces".
    """
    return _ObjReader(content, context).read()


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The numbers of all lines with one keyword."""

    values: NDArray[np.float64]
    first: NDArray[np.int64]  # where each line begins in `values`
    words: NDArray[np.int64]  # how many numbers it has

    def columns(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return some numbers of each line [N, stop - start]. Missing ones are NaN."""
        if len(self.words) and (self.words == self.words[0]).all() and self.words[0] >= stop:
            return self.values.reshape(-1, int(self.words[0]))[:, start:stop]
        result = np.full((len(self.words), stop - start), np.nan)
        for column in range(start, stop):
            has_column = self.words > column
            result[has_column, column - start] = self.values[self.first[has_column] + column]
        return result


@dataclass(frozen=True, kw_only=True)
class _Faces:
    """All faces, with C corners."""

    lines: NDArray[np.int64]  # [F], the number of the line of each face
    sizes: NDArray[np.int64]  # [F], the number of its corners
    corners: NDArray[np.int64]  # [C, 3], rows of v, vt and vn from 0; ABSENT if not given


class _ObjReader:
    """Reads one file.

    The lines are told apart by their first letters, all at once. The numbers of all lines with one
    keyword are read together.
    """

    def __init__(self, content: bytes, context: ReaderContext):
        self.context = context
        self.warnings = context.warnings
        self.text = _one_statement_a_line(plain_text(content))
        letters = np.frombuffer(self.text, np.uint8)
        ends = np.flatnonzero(letters == LINE_END)
        self.ends = ends
        self.starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        # The keyword. The text ends with blanks, so that three letters exist everywhere.
        a, b, c = (letters[self.starts + k] for k in range(3))
        a, b = a | 32, np.where(b > 32, b | 32, SPACE)
        c = np.where(c > 32, c, SPACE)
        is_v = a == ord("v")
        self.is_position = is_v & (b == SPACE)
        self.is_uv = is_v & (b == ord("t")) & (c == SPACE)
        self.is_normal = is_v & (b == ord("n")) & (c == SPACE)
        self.is_face = (a == ord("f")) & ((b == SPACE) | ((b == ord("o")) & (c == SPACE)))
        known = self.is_position | self.is_uv | self.is_normal | self.is_face
        is_empty = self.starts == ends
        self.others = np.flatnonzero(~known & ~is_empty & (letters[self.starts] != ord("#")))

    def read(self) -> Scene:
        positions = self._rows(self.is_position, b"v")
        faces = self._faces()
        library = MaterialLibrary(self.context)
        lines, names, libraries = self._other_statements()
        self._read_libraries(library, libraries, names)
        materials = self._materials(library, names)
        of_face = np.full(len(faces.lines), -1)
        if names:
            which = np.searchsorted(np.array(lines), faces.lines) - 1
            of_face = np.where(which >= 0, np.array(materials)[which], -1)
        points = self._positions(positions)
        geometries = self._geometries(points, positions, faces, of_face, library)
        return Scene.of_geometries(
            geometries, materials=library.materials, images=library.images, points=len(points)
        )

    def _lines_of(self, is_chosen: NDArray[np.bool_], keyword: bytes) -> bytes:
        """Return the chosen lines as one text without the keyword and comments."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], is_chosen, [0]]).astype(np.int8)))
        first, last = edges[::2], edges[1::2] - 1
        text = b"\n" + b"".join(
            [
                self.text[start : end + 1]
                for start, end in zip(
                    self.starts[first].tolist(), self.ends[last].tolist(), strict=True
                )
            ]
        )
        for spelling in (keyword, keyword.upper(), keyword.capitalize()):
            text = text.replace(b"\n" + spelling + b" ", b"\n ")
            bare = b"\n" + spelling + b"\n"
            while bare in text:  # lines without numbers; neighbours overlap
                text = text.replace(bare, b"\n\n")
        if b"#" in text:
            text = re.sub(rb"#[^\n]*", b"", text)
        return text[1:]

    def _rows(self, is_chosen: NDArray[np.bool_], keyword: bytes) -> _Rows:
        text = self._lines_of(is_chosen, keyword)
        words = count_words_of_lines(text, with_blank_lines=True)[: int(is_chosen.sum())]
        values = parse_numbers(text, self.warnings, count=int(words.sum()))
        return _Rows(values=values, first=np.cumsum(words) - words, words=words)

    def _positions(self, rows: _Rows) -> NDArray[np.float64]:
        """Return the positions [V, 3]. A weight applies to curves only."""
        warnings = self.warnings
        words = rows.words
        warnings.add("invalid_value", "v with fewer than 3 numbers", int((words < 3).sum()))
        is_odd = (words == 5) | (words > 7)
        warnings.add("unknown_attribute", "v with 5, 8 or more numbers", int(is_odd.sum()))
        has_weight = np.flatnonzero(words == 4)
        if len(has_weight):
            weights = rows.values[rows.first[has_weight] + 3]
            warnings.add("unknown_attribute", "weight of v", int((weights != 1).sum()))
        return rows.columns(0, 3)

    def _colors(self, rows: _Rows) -> NDArray[np.uint8] | None:
        """Return the colours [V, 4] after the coordinates, or None."""
        has_color = (rows.words == 6) | (rows.words == 7)
        if b"\n#MRGB" in self.text:
            self.warnings.add("appearance_ignored", "colours in comments #MRGB")
        if not has_color.any():
            return None
        if not has_color.all():
            self.warnings.add(
                "attribute_mismatch", "vertices without colour are white", int((~has_color).sum())
            )
        values = rows.columns(3, 7)
        alpha = np.where(rows.words == 7, values[:, 3], np.nan)
        rgb = np.where(has_color[:, None], values[:, :3], 0)
        colors = to_rgba8(rgb, None, self.warnings)
        colors[~has_color] = 255
        has_alpha = ~np.isnan(alpha)
        if has_alpha.any():
            with_alpha = to_rgba8(rgb[has_alpha], alpha[has_alpha], WarningLog())
            colors[has_alpha, 3] = with_alpha[:, 3]
        return colors

    def _faces(self) -> _Faces:
        text = self._lines_of(self.is_face, b"f")
        text = text.replace(b"\nfo ", b"\n ") if b"fo " in text else text
        text = text.removeprefix(b"fo ")
        lines = np.flatnonzero(self.is_face)
        sizes = count_words_of_lines(text, with_blank_lines=True)[: len(lines)]
        check_face_count(int(np.maximum(sizes - 2, 0).sum()), self.context.cfg)
        self.warnings.add("degenerate_polygon", "f without corners", int((sizes == 0).sum()))
        lines, sizes = lines[sizes > 0], sizes[sizes > 0]
        corners = _corners(text, int(sizes.sum()), self.warnings)
        is_negative = (corners < 0) & (corners != ABSENT)
        if is_negative.any():
            # Negative numbers count back from the last element before the face.
            counts = [
                np.cumsum(mask)[lines] for mask in (self.is_position, self.is_uv, self.is_normal)
            ]
            base = np.repeat(np.stack(counts, axis=1), sizes, axis=0)
            corners = np.where(is_negative, corners + base + 1, corners)
            # Numbers before the first element must not become valid.
            corners[is_negative & (corners < 1)] = 0
        corners[corners != ABSENT] -= 1
        return _Faces(lines=lines, sizes=sizes, corners=corners)

    def _other_statements(self) -> tuple[list[int], list[bytes], list[bytes]]:
        """Return lines and names of `usemtl`, and the values of `mtllib`. Account for the rest."""
        lines, names, libraries = [], [], []
        ignored = IGNORED_ELEMENTS["obj"]
        starts, ends = self.starts[self.others].tolist(), self.ends[self.others].tolist()
        for number, start, end in zip(self.others.tolist(), starts, ends, strict=True):
            words = self.text[start:end].split(None, 1)
            keyword = words[0].decode("latin-1").lower()
            rest = words[1].strip() if len(words) > 1 else b""
            if keyword == "usemtl":
                lines.append(number)
                names.append(rest)
            elif keyword == "mtllib":
                libraries.append(rest)
            elif keyword in ignored:
                continue
            elif keyword == "l":
                self.warnings.add("lines_left_out", "l")
            elif keyword == "p":
                self.warnings.add("points_left_out", "p", max(1, len(rest.split())))
            elif keyword in CURVES:
                self.warnings.add("curves_left_out", keyword)
            elif keyword == "call":
                self.warnings.add("unsupported_primitive", "call of another file")
            elif keyword in NOT_DRAWN:
                self.warnings.add("appearance_ignored", keyword)
            else:
                self.warnings.add("unknown_element", keyword)
        return lines, names, libraries

    def _read_libraries(
        self, library: MaterialLibrary, values: list[bytes], names: list[bytes]
    ) -> None:
        """Read the material libraries, also that beside the file if a material is missing."""
        side_files = self.context.side_files
        done: set[str] = set()
        for value in dict.fromkeys(values):
            for name in self._library_names(value):
                text = find_spelling(name, side_files) or spellings(name)[0]
                path = str(side_files.find(text) or text)
                content = None if path in done else side_files.read(text)
                done.add(path)
                if content is not None:
                    library.read(content, side_files.beside(Path(path)))
        beside = f"{self.context.path.stem}.mtl"
        if any(library.find(name) is None for name in set(names)):
            path = side_files.find(beside)
            if path is not None and str(path) not in done:
                library.read(side_files.read(beside) or b"", side_files.beside(path))

    def _library_names(self, value: bytes) -> list[bytes]:
        """Split the value of `mtllib`: one or several names, which may have blanks."""
        side_files = self.context.side_files
        value = value.strip().strip(b'"')
        without_comment = re.sub(rb"\s#.*", b"", value).strip()
        for name in (value, without_comment):
            if find_spelling(name, side_files) is not None:
                return [name]
        names = []
        words = without_comment.split(b" ")
        while words:
            # The longest name that exists, else up to the first word that ends like a library.
            length = next(
                (
                    k
                    for k in range(min(len(words), 20), 0, -1)
                    if find_spelling(b" ".join(words[:k]), side_files) is not None
                ),
                None,
            ) or next(
                (k + 1 for k, word in enumerate(words) if word.lower().endswith(b".mtl")),
                len(words),
            )
            names.append(b" ".join(words[:length]).strip())
            words = words[length:]
        return [name for name in names if name]

    def _materials(self, library: MaterialLibrary, names: list[bytes]) -> list[int]:
        """Return the number of each material that is used."""
        numbers: dict[bytes, int] = {}
        for name in names:
            if name not in numbers:
                number = library.find(name)
                if number is None:
                    self.warnings.add("material_missing", spellings(name)[0] or "no name")
                numbers[name] = -1 if number is None else number
        return [numbers[name] for name in names]

    def _geometries(
        self,
        points: NDArray[np.float64],
        rows: _Rows,
        faces: _Faces,
        materials: NDArray[np.int64],
        library: MaterialLibrary,
    ) -> list[Geometry]:
        """Return a geometry for each combination of attributes that faces have."""
        if not len(faces.lines):
            return []
        uv_rows = self._rows(self.is_uv, b"vt")
        uv = to_float32(uv_rows.columns(0, 2))
        uv[uv_rows.words == 1, 1] = 0  # the format allows coordinates of one dimension
        normals = to_float32(self._rows(self.is_normal, b"vn").columns(0, 3))
        colors = self._colors(rows)
        has_uv = self._has_attribute(faces, 1, len(uv), "vt")
        has_normals = self._has_attribute(faces, 2, len(normals), "vn")
        drawn_colors = np.zeros(len(faces.lines), dtype=bool)
        if colors is not None:
            is_textured = [item.base_color_texture is not None for item in library.materials]
            drawn_colors = ~np.array([*is_textured, False])[materials]
            if not drawn_colors.all() and (colors != 255).any():
                self.warnings.add("appearance_ignored", "vertex colours beside a texture")
            colors, translucent = material_of_colors(colors, self.warnings)
            if translucent:
                materials = _with_alpha(materials, drawn_colors, library.materials, translucent[0])
        kind = has_uv + 2 * has_normals + 4 * drawn_colors
        geometries = []
        for value in np.unique(kind).tolist():
            chosen = kind == value
            corners, sizes = faces.corners, faces.sizes
            if not chosen.all():
                corners = corners[np.repeat(chosen, sizes)]
                sizes = sizes[chosen]
            geometries.append(
                _geometry(
                    points,
                    corners,
                    sizes,
                    materials[chosen],
                    uv if value & 1 else None,
                    normals if value & 2 else None,
                    colors if value & 4 else None,
                )
            )
        return geometries

    def _has_attribute(
        self, faces: _Faces, column: int, count: int, keyword: str
    ) -> NDArray[np.bool_]:
        """Return whether all corners of each face have an attribute. Warn about partial ones."""
        indices = faces.corners[:, column]
        is_valid = (indices >= 0) & (indices < count)
        if is_valid.all():
            return np.ones(len(faces.sizes), dtype=bool)
        starts = np.cumsum(faces.sizes) - faces.sizes
        has_all = np.logical_and.reduceat(is_valid, starts)
        has_some = np.logical_or.reduceat(indices != ABSENT, starts)
        self.warnings.add(
            "attribute_mismatch",
            f"faces with {keyword} that do not exist or at some corners only",
            int((has_some & ~has_all).sum()),
        )
        return has_all


def _with_alpha(
    of_face: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    materials: list[SceneMaterial],
    default: SceneMaterial,
) -> NDArray[np.int64]:
    """Return the materials of faces [F], where those of the chosen faces draw alpha.

    Args:
        of_face: Index in `materials` of each face, -1 for none.
        chosen: [F].
        materials: Receives the materials that draw alpha.
        default: Such a material for faces without one.
    """
    result = of_face.copy()
    for index in np.unique(of_face[chosen]).tolist():
        material = default if index < 0 else replace(materials[index], alpha_mode="BLEND")
        result[chosen & (of_face == index)] = len(materials)
        materials.append(material)
    return result


def _one_statement_a_line(text: bytes) -> bytes:
    """Join continued lines and remove indentation. A comment does not continue."""
    if re.search(rb"\\ *\n", text) is not None:
        pattern = rb"(?:^|(?<= ))#[^\n]*|\\ *\n"
        text = re.sub(
            pattern,
            lambda match: b" " if match[0].startswith(b"\\") else match[0],
            text,
            flags=re.MULTILINE,
        )
    if b"\n " in text or text.startswith(b" "):
        text = re.sub(rb"^ +", b"", text, flags=re.MULTILINE)
    return text + b"\n   "


def _corners(text: bytes, count: int, warnings: WarningLog) -> NDArray[np.int64]:
    """Return the numbers [count, 3] of v, vt and vn of all corners, ABSENT if not given.

    Args:
        text: Corners separated by blanks and line ends, each v, v/vt, v//vn or v/vt/vn.
        count: Number of corners.
        warnings: Receives the words that are not numbers.
    """
    corners = np.full((count, 3), ABSENT, dtype=np.int64)
    if b"/" not in text:
        corners[:, 0] = parse_numbers(text, warnings, np.int64, count)
        return corners
    letters = np.frombuffer(text, np.uint8)
    is_number = (letters > SPACE) & (letters != SLASH)
    begins = is_number.copy()
    begins[1:] &= ~is_number[:-1]
    begins = np.flatnonzero(begins)
    values = parse_numbers(text.replace(b"/", b" "), warnings, np.int64, len(begins))
    follows_slash = letters[np.maximum(begins - 1, 0)] == SLASH
    # The usual case: all corners have the same numbers.
    num_slashes, num_doubled = text.count(b"/"), text.count(b"//")
    for columns, slashes, doubled in (((0, 1, 2), 2, 0), ((0, 1), 1, 0), ((0, 2), 2, 1)):
        width = len(columns)
        if (len(begins), num_slashes, num_doubled) != (
            count * width,
            count * slashes,
            count * doubled,
        ):
            continue
        pattern = follows_slash.reshape(count, width)
        if not pattern[:, 0].any() and pattern[:, 1:].all():
            corners[:, columns] = values.reshape(count, width)
            return corners
    # Otherwise count the corners and slashes up to each number.
    is_word = letters > SPACE
    first = is_word.copy()
    first[1:] &= ~is_word[:-1]
    corner = np.cumsum(first, dtype=np.int32)[begins] - 1
    slashes = np.cumsum(letters == SLASH, dtype=np.int32)
    before = np.concatenate([[0], slashes[:-1]]) if len(slashes) else slashes
    slot = slashes[begins] - before[np.flatnonzero(first)][corner]
    warnings.add("invalid_value", "corner with more than 3 numbers", int((slot > 2).sum()))
    is_usable = slot <= 2
    corners[corner[is_usable], slot[is_usable]] = values[is_usable]
    return corners


def _geometry(
    points: NDArray[np.float64],
    corners: NDArray[np.int64],
    sizes: NDArray[np.int64],
    materials: NDArray[np.int64],
    uv: NDArray[np.float32] | None,
    normals: NDArray[np.float32] | None,
    colors: NDArray[np.uint8] | None,
) -> Geometry:
    """Return a geometry whose vertices are the distinct corners.

    Args:
        points: [V, 3].
        corners: [C, 3], rows of `points`, `uv` and `normals`.
        sizes: [F], the number of corners of each face.
        materials: [F].
        uv: [T, 2], or None if the faces do not use it.
        normals: [N, 3], or None.
        colors: [V, 4], or None.
    """
    vertex = corners[:, 0]
    is_outside = (vertex < 0) | (vertex >= len(points))
    # A key for each combination of a vertex with its attributes.
    keys = np.where(is_outside, len(points), vertex)
    is_split = False
    for values, column in ((uv, 1), (normals, 2)):
        if values is not None and not np.array_equal(corners[:, column], vertex):
            if int(keys.max(initial=0) + 1) * len(values) >= MAX_KEY:
                keys = np.unique(keys, return_inverse=True)[1]
            keys = keys * len(values) + corners[:, column]
            is_split = True
    index, source = vertex, np.arange(len(points))
    uv_rows = normal_rows = source
    if is_split:
        _, index = np.unique(keys, return_inverse=True)
        chosen = np.empty(int(index.max(initial=-1)) + 1, dtype=np.int64)
        chosen[index] = np.arange(len(index))  # a corner of each combination
        source = np.where(is_outside[chosen], 0, vertex[chosen])
        uv_rows, normal_rows = corners[chosen, 1], corners[chosen, 2]
        index = np.where(is_outside, -1, index)

    def attribute(values: NDArray[Any] | None, rows: NDArray[np.int64]) -> Attribute | None:
        # Without a split there may be vertices that no face uses, and fewer attributes.
        return (
            None if values is None else Attribute(values=values[np.clip(rows, 0, len(values) - 1)])
        )

    coordinates = attribute(uv, uv_rows)
    return Geometry(
        positions=points[source] if len(points) else points,
        corners=index,
        contours=np.concatenate([[0], np.cumsum(sizes)]),
        uv={} if coordinates is None else {0: coordinates},
        normals=attribute(normals, normal_rows),
        colors=attribute(colors, source),
        materials=materials,
    )
