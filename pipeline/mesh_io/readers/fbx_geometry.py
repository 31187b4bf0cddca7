"""Read the meshes of FBX files: polygons, their layers and the materials of polygons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.binary_rows import to_float32
from pipeline.mesh_io.readers.colors import to_rgba8
from pipeline.mesh_io.readers.fbx_document import FbxDocument, FbxObject
from pipeline.mesh_io.readers.fbx_tree import FbxElement
from pipeline.mesh_io.readers.text import ranges
from pipeline.mesh_io.scene import Attribute, Domain, Geometry

DOMAINS: dict[str, Domain] = {
    "ByVertex": "vertex",
    "ByVertice": "vertex",
    "ByControlPoint": "vertex",
    "ByPolygonVertex": "corner",
    "ByPolygon": "polygon",
}


@dataclass(frozen=True, kw_only=True)
class FbxMesh:
    """A mesh before materials are bound to it.

    Attributes:
        geometry: The polygons. `materials` is -1.
        slots: int64 [P], which of the materials of its node each polygon has.
        textures: int64 [P], which of the textures of its node each polygon has, or None. Only files
            of version 6 connect textures with nodes.
        uv_names: {name of a set of texture coordinates: key of `geometry.uv`}.
    """

    geometry: Geometry
    slots: NDArray[np.int64]
    textures: NDArray[np.int64] | None
    uv_names: dict[str, int]


class MeshReader:
    """Reads each mesh once.

    Args:
        document: The document.
    """

    def __init__(self, document: FbxDocument):
        self._document = document
        self._warnings = document.warnings
        self._meshes: dict[int, FbxMesh | None] = {}

    def read(self, item: FbxObject) -> FbxMesh | None:
        """Return the mesh of an object, or None after a warning if it has no polygons.

        Raises:
            Reject: "allocation_bomb".
        """
        if id(item) not in self._meshes:
            self._meshes[id(item)] = self._read(item)
        return self._meshes[id(item)]

    def _read(self, item: FbxObject) -> FbxMesh | None:
        element, numbers = item.element, self._document.numbers
        values = numbers(element.first("Vertices"))
        positions = _rows(values, 3)
        if values.size % 3:
            self._warnings.add("count_mismatch", f"{item.name}: {values.size} coordinates")
        indices = numbers(element.first("PolygonVertexIndex"), np.int64)
        if not len(indices):
            self._warnings.add("points_left_out", item.name, len(positions))
            return None
        # The last corner of a polygon is stored as -1 - index.
        ends = np.flatnonzero(indices < 0) + 1
        corners = np.where(indices < 0, ~indices, indices)
        if not len(ends) or ends[-1] < len(indices):
            self._warnings.add("truncated_data", f"{item.name}: the last polygon has no end")
            ends = np.append(ends, len(indices))
        starts = np.concatenate([[0], ends[:-1]])
        sizes = ends - starts
        for size, code in ((1, "points_left_out"), (2, "lines_left_out")):
            self._warnings.add(code, item.name, int((sizes == size).sum()))
        drawn = sizes >= 3
        hidden = self._flags(item, "LayerElementHole", len(sizes), default=False)
        hidden |= ~self._flags(item, "LayerElementVisibility", len(sizes), default=True)
        self._warnings.add("hidden_left_out", item.name, int((hidden & drawn).sum()))
        drawn &= ~hidden
        layers = _Layers(
            self._document,
            item,
            corners=corners,
            sizes=sizes,
            num_vertices=len(positions),
            polygon_of=np.repeat(np.arange(len(sizes)), sizes),
        )
        uv, uv_names = layers.uv()
        colors, normals = layers.colors(), layers.normals()
        slots = layers.slots("LayerElementMaterial", "Materials")
        textures = layers.slots("LayerElementTexture", "TextureId")
        kept = ranges(starts[drawn], sizes[drawn])

        def cut(attribute: Attribute | None) -> Attribute | None:
            if attribute is None or drawn.all() or attribute.domain == "vertex":
                return attribute
            rows = kept if attribute.domain == "corner" else drawn
            return Attribute(values=attribute.values[rows], domain=attribute.domain)

        geometry = Geometry(
            positions=positions,
            corners=corners[kept],
            contours=np.concatenate([[0], np.cumsum(sizes[drawn])]),
            uv={key: value for key, item_uv in uv.items() if (value := cut(item_uv)) is not None},
            colors=cut(colors),
            normals=cut(normals),
            name=item.name,
        )
        if slots is None:
            slots = np.zeros(len(sizes), dtype=np.int64)
        return FbxMesh(
            geometry=geometry,
            slots=slots[drawn],
            textures=None if textures is None else textures[drawn],
            uv_names=uv_names,
        )

    def _flags(self, item: FbxObject, name: str, count: int, *, default: bool) -> NDArray[np.bool_]:
        """Return a flag of each polygon."""
        flags = np.full(count, default)
        layer = item.element.first(name)
        if layer is None or layer.text_of("MappingInformationType") != "ByPolygon":
            return flags
        values = self._document.numbers(layer.first(name.removeprefix("LayerElement")), np.int64)
        known = min(len(values), count)
        flags[:known] = values[:known] != 0
        return flags


class _Layers:
    """Reads the layers of one mesh."""

    def __init__(
        self,
        document: FbxDocument,
        item: FbxObject,
        *,
        corners: NDArray[np.int64],
        sizes: NDArray[np.int64],
        num_vertices: int,
        polygon_of: NDArray[np.int64],
    ):
        self.document = document
        self.item = item
        self.warnings = document.warnings
        self.counts: dict[Domain, int] = {
            "vertex": num_vertices,
            "corner": len(corners),
            "polygon": len(sizes),
        }

    def uv(self) -> tuple[dict[int, Attribute], dict[str, int]]:
        """Return the sets of texture coordinates, and their numbers by name."""
        sets: dict[int, Attribute] = {}
        names: dict[str, int] = {}
        for layer in self.item.element.all("LayerElementUV"):
            attribute = self._attribute(layer, "UV", "UVIndex", 2)
            if attribute is not None:
                number = len(sets)
                names.setdefault(layer.text_of("Name"), number)
                values = attribute.values.astype(np.float32)
                sets[number] = Attribute(values=values, domain=attribute.domain)
        return sets, names

    def colors(self) -> Attribute | None:
        """Return the first set of colours. They are read as sRGB."""
        layer = self.item.element.first("LayerElementColor")
        attribute = self._attribute(layer, "Colors", "ColorIndex", 4)
        if attribute is None:
            return None
        rgba = np.asarray(attribute.values, dtype=np.float64)
        colors = to_rgba8(rgba[:, :3], rgba[:, 3], self.warnings)
        return Attribute(values=colors, domain=attribute.domain)

    def normals(self) -> Attribute | None:
        """Return the first set of normals."""
        layer = self.item.element.first("LayerElementNormal")
        attribute = self._attribute(layer, "Normals", "NormalsIndex", 3)
        if attribute is None:
            return None
        values = to_float32(attribute.values)
        if not np.nan_to_num(values).any():
            return None
        return Attribute(values=values, domain=attribute.domain)

    def slots(self, name: str, values_name: str) -> NDArray[np.int64] | None:
        """Return which material or texture each polygon has, or None if there is no such layer."""
        layer = self.item.element.first(name)
        if layer is None:
            return None
        values = self.document.numbers(layer.first(values_name), np.int64)
        mapping = layer.text_of("MappingInformationType")
        count = self.counts["polygon"]
        if mapping == "ByPolygon" and len(values) != 1:
            if len(values) == count:
                return values
            self._mismatch(name, f"{len(values)} for {count}")
            padded = np.zeros(count, dtype=np.int64)
            padded[: len(values)] = values[:count]
            return padded
        if mapping not in ("AllSame", "ByPolygon", "NoMappingInformation", ""):
            self._mismatch(name, f"mapping {mapping[:40]!r}")
        # Without values the first material counts, but no texture.
        number = 0 if values_name == "Materials" else -1
        return np.full(count, int(values[0]) if len(values) else number)

    def _attribute(
        self, layer: FbxElement | None, values_name: str, index_name: str, columns: int
    ) -> Attribute | None:
        """Return the values of a layer, or None if there is none or if it does not fit."""
        if layer is None:
            return None
        name = f"{layer.name} {layer.text_of('Name')}".strip()
        values = _rows(self.document.numbers(layer.first(values_name)), columns)
        mapping = layer.text_of("MappingInformationType")
        reference = layer.text_of("ReferenceInformationType")
        if not len(values):
            return None
        if reference in ("IndexToDirect", "Index") and layer.first(index_name) is not None:
            indices = self.document.numbers(layer.first(index_name), np.int64)
            is_unknown = (indices < 0) | (indices >= len(values))
            # -1 is a corner without value.
            self.warnings.add(
                "attribute_mismatch",
                f"{self.item.name} {name}: index {indices[is_unknown][:1]}",
                int((is_unknown & (indices != -1)).sum()),
            )
            values = values[np.where(is_unknown, 0, indices)]
            values[is_unknown] = 0
        if mapping == "AllSame":
            count = self.counts["polygon"]
            return Attribute(values=np.repeat(values[:1], count, axis=0), domain="polygon")
        domain = DOMAINS.get(mapping)
        if domain is None:
            self._mismatch(name, f"mapping {mapping[:40]!r}")
            return None
        count = self.counts[domain]
        if len(values) > count:
            self.warnings.add("count_mismatch", f"{name}: {len(values)} for {count}")
            values = values[:count]
        elif len(values) < count:
            self._mismatch(name, f"{len(values)} for {count}")
            return None
        return Attribute(values=values, domain=domain)

    def _mismatch(self, name: str, detail: str) -> None:
        self.warnings.add("attribute_mismatch", f"{self.item.name} {name}: {detail}")


def _rows(values: NDArray[Any], columns: int) -> NDArray[np.float64]:
    """Return numbers as rows. An incomplete last row is left out."""
    count = len(values) // columns
    return np.array(values[: count * columns], dtype=np.float64).reshape(count, columns)
