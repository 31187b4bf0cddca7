"""Read STL files: text and binary, several solids, and the colours of VisCAM and Magics."""

from __future__ import annotations

import codecs
import re

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import check_claimed_bytes, check_face_count
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.binary_rows import to_float64
from pipeline.mesh_io.readers.text import parse_numbers, plain_text
from pipeline.mesh_io.scene import Attribute, Geometry, Scene

HEADER_BYTES = 84  # 80 free bytes and the number of triangles
TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
# How often each word occurs in a facet, longer words first.
FACET_WORDS = {
    b"endfacet": 1,
    b"facet": 1,
    b"normal": 1,
    b"outer": 1,
    b"endloop": 1,
    b"loop": 1,
    b"vertex": 3,
}
DEFAULT_COLOR = (231, 231, 231)  # sRGB of the default material, for triangles without colour

# Triangles beyond the declared count must lie within this multiple of the extent of the others.
MAX_EXTENT_RATIO = 100
MAX_COORDINATE = 1e9  # if there are no others


def read_stl(content: bytes, context: ReaderContext) -> Scene:
    """Read an STL file.

    The length of the file decides between text and binary before its first word does. A binary
    file with more triangles than declared is read to its end if the rest consists of triangles.

    Raises:
        Reject: "unreadable", "allocation_bomb" or "too_many_faces".
    """
    count = int.from_bytes(content[80:84], "little")
    is_exact = len(content) == HEADER_BYTES + TRIANGLE.itemsize * count
    if not (is_exact and len(content) >= HEADER_BYTES) and _is_text(content):
        return _read_text(plain_text(content), context)
    return _read_binary(content, context)


def _is_text(content: bytes) -> bool:
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    head = content[:4096]
    if b"\0" in head and not is_wide:
        return False
    head = plain_text(head).lower()
    return re.search(rb"^\s*solid\b|\bfacet +normal\b", head) is not None


def _read_binary(content: bytes, context: ReaderContext) -> Scene:
    if len(content) < HEADER_BYTES:
        raise Reject(
            "unreadable",
            error="truncated",
            what="header",
            claimed=HEADER_BYTES,
            available=len(content),
        )
    count = int.from_bytes(content[80:84], "little")
    available = len(content) - HEADER_BYTES
    check_claimed_bytes("triangles", TRIANGLE.itemsize * count, available)
    check_face_count(max(count, 0), context.cfg)
    warnings = context.warnings
    complete = min(count, available // TRIANGLE.itemsize)
    if complete < count:
        if not complete:
            raise Reject("unreadable", error="truncated", what="triangles", claimed=count)
        warnings.add("truncated_data", f"{complete} of {count} triangles")
    tables = [np.frombuffer(content, TRIANGLE, complete, HEADER_BYTES)]
    headers = [content[:80]]
    end = HEADER_BYTES + complete * TRIANGLE.itemsize
    if complete == count and end < len(content):
        solids = _further_solids(content, end)
        if solids:
            warnings.add("count_mismatch", f"{len(solids) + 1} binary files in one")
            tables += [table for _, table in solids]
            headers += [header for header, _ in solids]
        else:
            extra = _further_triangles(content, end, tables[0])
            if len(extra):
                warnings.add("count_mismatch", f"{count} declared, {count + len(extra)} found")
                tables.append(extra)
                headers.append(headers[0])
                end += extra.nbytes
            if end < len(content):
                warnings.add("trailing_data", f"{len(content) - end} bytes")
    check_face_count(sum(map(len, tables)), context.cfg)
    colors = [
        _colors(header, table["attribute"], warnings)
        for header, table in zip(headers, tables, strict=True)
    ]
    return _scene(np.concatenate([table["corners"] for table in tables]), _joined(colors, tables))


def _further_solids(content: bytes, start: int) -> list[tuple[bytes, NDArray[np.void]]]:
    """Return the headers and triangles of binary files that follow, if they fill the rest."""
    solids = []
    while start + HEADER_BYTES <= len(content):
        count = int.from_bytes(content[start + 80 : start + 84], "little")
        end = start + HEADER_BYTES + count * TRIANGLE.itemsize
        if end > len(content):
            return []
        table = np.frombuffer(content, TRIANGLE, count, start + HEADER_BYTES)
        solids.append((content[start : start + 80], table))
        start = end
    return solids if start == len(content) else []


def _further_triangles(content: bytes, start: int, declared: NDArray[np.void]) -> NDArray[np.void]:
    """Return the triangles after the declared ones, or none if the bytes look like something else.

    All coordinates must be finite and lie near the declared triangles.
    """
    table = np.frombuffer(content, TRIANGLE, (len(content) - start) // TRIANGLE.itemsize, start)
    rest = content[start:]
    if re.fullmatch(rb"[\t\n\r -~]*", rest) is not None or not rest.strip(b"\0"):
        return table[:0]
    corners = to_float64(table["corners"])
    limit = np.full(3, MAX_COORDINATE)
    centre = np.zeros(3)
    if len(declared):
        points = to_float64(declared["corners"].reshape(-1, 3))
        low, high = points.min(axis=0), points.max(axis=0)
        centre, limit = (low + high) / 2, np.full(3, MAX_EXTENT_RATIO * (high - low).max())
    # Random bytes are often far too small as well as too large.
    size = np.abs(corners)
    is_tiny = (size > 0) & (size < 1e-30)
    with np.errstate(invalid="ignore"):
        is_near = (np.abs(corners - centre) <= limit).all()
    return table if is_near and not is_tiny.any() else table[:0]


def _colors(
    header: bytes, attributes: NDArray[np.uint16], warnings: WarningLog
) -> NDArray[np.uint8] | None:
    """Return the colours [F, 4] of triangles, or None if the file has none.

    VisCAM and SolidView set bit 15 of a triangle with a colour, and store blue in the lowest bits.
    Magics writes the colour of the object into the header after "COLOR=", sets bit 15 of triangles
    that have this colour, and stores red in the lowest bits of the others.
    """
    has_bit = (attributes & 0x8000) != 0
    channels = [(attributes >> shift) & 31 for shift in (0, 5, 10)]
    place = header.find(b"COLOR=")
    if 0 <= place <= 70:
        default = header[place + 6 : place + 9]
        if header[place + 9] != 255:
            warnings.add("appearance_ignored", "alpha of the object's colour")
        if b"MATERIAL=" in header:
            warnings.add("appearance_ignored", "material in the header")
        is_own = ~has_bit
    else:
        if not has_bit.any():
            return None
        default = bytes(DEFAULT_COLOR)
        is_own = has_bit
        channels = channels[::-1]
    colors = np.full((len(attributes), 4), 255, dtype=np.uint8)
    colors[:, :3] = list(default)
    own = np.rint(np.stack(channels, axis=1) * (255 / 31)).astype(np.uint8)
    colors[is_own, :3] = own[is_own]
    return colors


def _joined(
    colors: list[NDArray[np.uint8] | None], tables: list[NDArray[np.void]]
) -> NDArray[np.uint8] | None:
    """Join the colours of several solids. Solids without colours get the default one."""
    if all(item is None for item in colors):
        return None
    default = np.array([*DEFAULT_COLOR, 255], dtype=np.uint8)
    return np.concatenate(
        [
            np.tile(default, (len(table), 1)) if item is None else item
            for item, table in zip(colors, tables, strict=True)
        ]
    )


def _read_text(text: bytes, context: ReaderContext) -> Scene:
    """Read a text. The names of solids are free text, so they are taken out first."""
    lowered = text.lower()
    lowered = re.sub(rb"endfacet +endsolid", b"endfacet\nendsolid", lowered)
    # A name ends with its line, or with the first facet if all stands in one line.
    names = rb"^ *(end *)?solid(?![^\s])(?:[^\n](?!facet +normal +[-+.0-9ni]))*"
    ends = sum(1 for name in re.finditer(names, lowered, re.MULTILINE) if name[1])
    body = re.sub(names, b"", lowered, flags=re.MULTILINE)
    if b"vertex" not in body and not body.strip():
        return Scene()
    if not ends:
        context.warnings.add("truncated_data", "there is no endsolid")
    check_face_count(body.count(b"endfacet"), context.cfg)
    corners = _regular_facets(body)
    if corners is not None:
        return _scene(corners, None)
    return _read_words(body.split(), context.warnings, is_cut=not ends)


def _regular_facets(body: bytes) -> NDArray[np.float64] | None:
    """Return the corners [F, 3, 3] if the text is nothing but facets of three vertices."""
    letters = np.frombuffer(body, np.uint8)
    # "x" is only in "vertex", and "c" only in "facet" and "endfacet".
    vertices, facets = np.flatnonzero(letters == ord("x")), np.flatnonzero(letters == ord("c"))
    count = len(facets) // 2
    inside = np.searchsorted(vertices, facets)
    expected = np.repeat(3 * np.arange(count + 1), 2)[1:-1]
    if len(vertices) != 3 * count or not np.array_equal(inside, expected):
        return None
    for word, occurrences in FACET_WORDS.items():
        if body.count(word) != occurrences * count:
            return None
        body = body.replace(word, b" ")
    log = WarningLog()
    numbers = parse_numbers(body, log)
    if log.items() or len(numbers) != 12 * count:
        return None
    return numbers.reshape(count, 4, 3)[:, 1:]


def _read_words(words: list[bytes], warnings: WarningLog, *, is_cut: bool) -> Scene:
    """Read facets word by word. A facet may have more than three vertices.

    Args:
        words: The words of the file in lower case, without the names of solids.
        warnings: Receives the words that are not understood.
        is_cut: Whether the end of the file is missing, so that it is reported already.
    """
    points: list[list[float]] = []
    sizes: list[int] = []
    facet: list[list[float]] = []
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if word in (b"vertex", b"normal"):
            numbers, place = _numbers(words, place)
            if word == b"vertex" and len(numbers) == 3:
                facet.append(numbers)
            elif word == b"vertex":
                warnings.add("invalid_value", f"vertex with {len(numbers)} numbers")
        elif word in (b"facet", b"endfacet"):
            if facet:
                points += facet
                sizes.append(len(facet))
            facet = []
        elif word not in FACET_WORDS:
            warnings.add("unknown_element", word.decode("latin-1"))
    if facet and not is_cut:
        warnings.add("truncated_data", "the last facet has no end")
    if not sizes:
        raise Reject("unreadable", error="no_facets", words=len(words))
    geometry = Geometry(
        positions=np.array(points).reshape(-1, 3),
        corners=np.arange(len(points)),
        contours=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )
    return Scene.of_geometries([geometry])


def _numbers(words: list[bytes], place: int) -> tuple[list[float], int]:
    """Return up to three numbers from a place, and the place after them."""
    numbers = []
    while place < len(words) and len(numbers) < 3:
        try:
            numbers.append(float(words[place]))
        except ValueError:
            break
        place += 1
    return numbers, place


def _scene(corners: NDArray[np.floating], colors: NDArray[np.uint8] | None) -> Scene:
    """Make a scene of triangles with the corners [F, 3, 3] and colours [F, 4]."""
    geometry = Geometry.from_triangles(
        to_float64(corners.reshape(-1, 3)),
        np.arange(3 * len(corners)).reshape(-1, 3),
        colors=None if colors is None else Attribute(values=colors, domain="polygon"),
    )
    return Scene.of_geometries([geometry])
