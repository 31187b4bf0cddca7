"""Read the meshes of COLLADA documents: sources, inputs and all kinds of primitives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.collada_schema import PRIMITIVES
from pipeline.mesh_io.readers.collada_values import Document
from pipeline.mesh_io.readers.strips import are_drawn
from pipeline.mesh_io.scene import Attribute, Geometry
from pipeline.mesh_io.xml_tree import Element

LINES = ("lines", "linestrips")
CORNERS_OF_LINES = 2
# Inputs that are used for shading with normal maps only.
UNUSED_SEMANTICS = ("TEXTANGENT", "TEXBINORMAL", "TANGENT", "BINORMAL", "UV", "CONTINUITY")


@dataclass(frozen=True, kw_only=True)
class Primitive:
    """The polygons of one primitive element.

    Attributes:
        symbol: The material symbol, "" if there is none.
        geometry: The polygons, without material.
    """

    symbol: str
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class _Corners:
    """Polygons as lists of corners; see `Geometry`."""

    indices: NDArray[np.int64]  # [C, inputs]
    contours: NDArray[np.int64]
    polygons: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class _Input:
    """An input of a primitive. The inputs of <vertices> have the offset of the vertices."""

    semantic: str
    source: str
    offset: int
    set: int | None
    is_of_vertices: bool = False


class GeometryReader:
    """Reads each mesh of a document when it is needed, and only once.

    Args:
        document: The document.
        warnings: Receives what cannot be read.
    """

    def __init__(self, document: Document, warnings: WarningLog):
        self._document = document
        self._warnings = warnings
        self._meshes: dict[str, list[Primitive]] = {}

    def primitives(self, geometry: Element) -> list[Primitive]:
        """Return the polygons of a <geometry>, one item for each primitive element with some."""
        identifier = geometry.get("id") or str(id(geometry))
        if identifier not in self._meshes:
            self._meshes[identifier] = self._read(geometry)
        return self._meshes[identifier]

    def _read(self, geometry: Element) -> list[Primitive]:
        name = geometry.get("id")
        for child in geometry.all("spline", "brep"):
            self._warnings.add("curves_left_out", f"{name}: {child.name}")
        for extra in geometry.all("extra"):
            if any(flag.text.strip() == "0" for flag in _extra_values(extra, "double_sided")):
                self._warnings.add("appearance_ignored", f"{name}: single-sided geometry")
        primitives = []
        for mesh in geometry.all("mesh", "convex_mesh"):
            if mesh.get("convex_hull_of"):
                self._warnings.add("unsupported_primitive", f"{name}: convex hull")
            for element in mesh.all(*PRIMITIVES):
                primitive = self._primitive(element, mesh, name)
                if primitive is not None:
                    primitives.append(primitive)
        return primitives

    def _primitive(self, element: Element, mesh: Element, name: str) -> Primitive | None:
        inputs = self._inputs(element, mesh, name)
        positions = [item for item in inputs if item.semantic == "POSITION"]
        if element.name in LINES:
            self._warnings.add("lines_left_out", name, self._count_lines(element, inputs))
            return None
        if not positions:
            self._warnings.add("primitive_unreadable", f"{name}: no positions")
            return None
        stride = 1 + max(item.offset for item in inputs)
        corners = self._corners(element, stride, name)
        if not len(corners.contours) > 1:
            return None
        values = self._document.values(positions[0].source, f"{name} positions")
        if values is None:
            self._warnings.add("primitive_unreadable", f"{name}: no positions")
            return None
        # All primitives of a mesh share the array of positions.
        points = values
        if values.shape[1] != 3:
            points = np.zeros((len(values), 3))
            points[:, : min(values.shape[1], 3)] = values[:, :3]
        if element.name == "tristrips":
            rows = corners.indices.reshape(-1, 3, stride)
            rows = rows[are_drawn(rows[:, :, positions[0].offset], points)].reshape(-1, stride)
            corners = _Corners(indices=rows, contours=np.arange(0, len(rows) + 1, 3))
        uv: dict[int, Attribute] = {}
        colors = normals = None
        for item in inputs:
            if item.semantic == "TEXCOORD":
                key = item.set if item.set is not None else len(uv)
                if key in uv:
                    self._warnings.add("attribute_mismatch", f"{name}: a second uv set {key}")
                    continue
                attribute = self._attribute(item, corners, positions[0].offset, name, 2)
                if attribute is not None:
                    uv[key] = attribute
            elif item.semantic == "COLOR" and colors is None:
                colors = self._attribute(item, corners, positions[0].offset, name, 3)
                if colors is not None:
                    colors = Attribute(
                        values=self._color_bytes(colors.values, name), domain=colors.domain
                    )
            elif item.semantic == "NORMAL" and normals is None:
                normals = self._attribute(item, corners, positions[0].offset, name, 3)
            elif item.semantic in ("COLOR", "NORMAL"):
                self._warnings.add("attribute_mismatch", f"{name}: a second {item.semantic}")
            elif item.semantic not in ("POSITION", *UNUSED_SEMANTICS):
                self._warnings.add("unknown_attribute", f"{name}: input {item.semantic[:50]}")
        geometry = Geometry(
            positions=points,
            corners=corners.indices[:, positions[0].offset],
            contours=corners.contours,
            polygons=corners.polygons,
            uv=uv,
            colors=colors,
            normals=normals,
            name=name,
        )
        return Primitive(symbol=element.get("material"), geometry=geometry)

    def _inputs(self, element: Element, mesh: Element, name: str) -> list[_Input]:
        """Return the inputs of a primitive, with those of its vertices in place of VERTEX."""
        inputs = []
        for item in element.all("input"):
            offset = self._document.integer(item, "offset", 0)
            text = item.get("set")
            number = self._document.integer(item, "set", 0) if text else None
            semantic = item.get("semantic")
            if semantic != "VERTEX":
                inputs.append(
                    _Input(semantic=semantic, source=item.get("source"), offset=offset, set=number)
                )
                continue
            vertices = self._document.find(item.get("source"), "vertices") or mesh.first("vertices")
            if vertices is None:
                self._warnings.add("primitive_unreadable", f"{name}: no vertices")
                continue
            inputs += [
                _Input(
                    semantic=child.get("semantic"),
                    source=child.get("source"),
                    offset=offset,
                    set=None,
                    is_of_vertices=True,
                )
                for child in vertices.all("input")
            ]
        # Offsets far beyond the number of inputs would make the rows of indices huge.
        limit = 4 * len(inputs) + 64
        too_far = [item for item in inputs if item.offset >= limit]
        self._warnings.add("invalid_value", f"{name}: offset of an input", len(too_far))
        return [item for item in inputs if item.offset < limit]

    def _attribute(
        self, item: _Input, corners: _Corners, vertex_offset: int, name: str, columns: int
    ) -> Attribute | None:
        """Return the values of an input on the vertices or corners, or None with a warning."""
        values = self._document.values(item.source, f"{name} {item.semantic}")
        if values is None:
            return None
        if values.shape[1] < columns:
            self._warnings.add("attribute_mismatch", f"{name} {item.semantic}: few columns")
            return None
        width = 4 if item.semantic == "COLOR" else columns
        values = values[:, :width].astype(np.float32)
        if item.is_of_vertices:
            return Attribute(values=values)
        rows = corners.indices[:, item.offset]
        is_outside = (rows < 0) | (rows >= len(values))
        if is_outside.any():
            count = int(is_outside.sum())
            self._warnings.add("attribute_mismatch", f"{name} {item.semantic}: index", count)
            if not len(values):
                return None
            rows = np.where(is_outside, 0, rows)
        return Attribute(values=values[rows], domain="corner")

    def _color_bytes(self, values: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
        """Return colours as sRGB with alpha. The format does not say in which space they are."""
        colors = np.asarray(values, dtype=np.float64)
        is_finite = np.isfinite(colors).all(axis=1)
        self._warnings.add(
            "invalid_value", f"{name}: colours that are not finite", int((~is_finite).sum())
        )
        colors = np.nan_to_num(colors)
        if colors.max(initial=0) > 2:
            self._warnings.add("invalid_value", f"{name}: colours above 1")
            colors = colors / 255
        rgba = np.ones((len(colors), 4))
        rgba[:, : colors.shape[1]] = colors
        return np.rint(255 * rgba.clip(0, 1)).astype(np.uint8)

    def _corners(self, element: Element, stride: int, name: str) -> _Corners:
        """Return the corners of all polygons of a primitive element."""
        if element.name in ("triangles", "polylist"):
            rows = self._rows(element.all("p"), stride, name)
            if element.name == "triangles":
                sizes = np.full(len(rows) // 3, 3, dtype=np.int64)
                self._check_count(element, len(sizes), name)
            else:
                sizes = self._document.integers(element.first("vcount"))
                self._check_count(element, len(sizes), name)
                sizes = sizes.clip(0, len(rows) + 1)
                fitting = int(np.searchsorted(np.cumsum(sizes), len(rows), side="right"))
                self._warnings.add("count_mismatch", f"{name}: vcount", len(sizes) - fitting)
                sizes = sizes[:fitting]
            used = int(sizes.sum())
            if used < len(rows):
                self._warnings.add("count_mismatch", f"{name}: {len(rows) - used} more indices")
            return _Corners(indices=rows[:used], contours=_ends(sizes))
        if element.name == "polygons":
            return self._polygons(element, stride, name)
        corners = _fan if element.name == "trifans" else _strip
        pieces = []
        for p in element.all("p"):
            rows = self._rows([p], stride, name)
            if len(rows) >= 3:
                pieces.append(rows[corners(len(rows))])
            else:
                self._warnings.add("degenerate_polygon", f"{name}: {element.name}")
        self._check_count(element, sum(1 for _ in element.all("p")), name)
        indices = np.concatenate(pieces) if pieces else np.empty((0, stride), dtype=np.int64)
        return _Corners(indices=indices, contours=np.arange(0, len(indices) + 1, 3))

    def _polygons(self, element: Element, stride: int, name: str) -> _Corners:
        """Return the polygons of <polygons>: each <p> is one, and each <ph> is one with holes."""
        contours = []
        ends = [0]
        polygons = [0]
        for child in element.all("p", "ph"):
            outlines = [child] if child.name == "p" else list(child.all("p", "h"))
            if not outlines:
                continue
            for outline in outlines:
                rows = self._rows([outline], stride, name)
                if child.name == "ph" and outline.name == "h" and len(rows) < 3:
                    self._warnings.add("degenerate_polygon", f"{name}: hole")
                    continue
                contours.append(rows)
                ends.append(ends[-1] + len(rows))
            polygons.append(len(ends) - 1)
        self._check_count(element, len(polygons) - 1, name)
        indices = np.concatenate(contours) if contours else np.empty((0, stride), dtype=np.int64)
        return _Corners(
            indices=indices,
            contours=np.array(ends, dtype=np.int64),
            polygons=np.array(polygons, dtype=np.int64),
        )

    def _rows(self, elements: Iterable[Element], stride: int, name: str) -> NDArray[np.int64]:
        """Return the indices of <p> elements as [corners, stride]."""
        lists = [self._document.integers(element) for element in elements]
        values = np.concatenate(lists) if lists else np.empty(0, dtype=np.int64)
        extra = len(values) % stride
        if extra:
            self._warnings.add("count_mismatch", f"{name}: {extra} more indices")
            values = values[: len(values) - extra]
        return values.reshape(-1, stride)

    def _check_count(self, element: Element, found: int, name: str) -> None:
        stated = self._document.integer(element, "count", found)
        if stated != found:
            self._warnings.add("count_mismatch", f"{name}: {found} {element.name} for {stated}")

    def _count_lines(self, element: Element, inputs: list[_Input]) -> int:
        stride = 1 + max((item.offset for item in inputs), default=0)
        corners = [len(self._document.integers(p)) // stride for p in element.all("p")]
        if element.name == "lines":
            return sum(corners) // CORNERS_OF_LINES
        return sum(max(count - 1, 0) for count in corners)


def _ends(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _fan(count: int) -> NDArray[np.int64]:
    """Return the corners of the triangles of a fan."""
    second = np.arange(1, count - 1)
    return np.stack([np.zeros_like(second), second, second + 1], axis=1).ravel()


def _strip(count: int) -> NDArray[np.int64]:
    """Return the corners of the triangles of a strip. Every other one is turned around."""
    first = np.arange(count - 2)
    odd = first % 2
    return np.stack([first, first + 1 + odd, first + 2 - odd], axis=1).ravel()


def _extra_values(extra: Element, name: str) -> list[Element]:
    """Return the elements with a name in the techniques of an <extra>."""
    return [value for technique in extra.all("technique") for value in technique.all(name)]
