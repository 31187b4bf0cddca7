"""Read the meshes and basic shapes of a USD stage."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pxr import Usd, UsdGeom

from pipeline.core.color import linear_to_srgb
from pipeline.mesh_io.file_checks import check_face_count
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers import usd_shapes
from pipeline.mesh_io.readers.usd_values import (
    TIME,
    Primvar,
    UsdError,
    array,
    number,
    primvar,
    read_primvar,
)
from pipeline.mesh_io.scene import Attribute, Geometry

Ints = NDArray[np.int64]
MESHES = ("Mesh", "TetMesh")
SHAPES = (
    *("Cube", "Sphere", "Cylinder", "Cylinder_1", "Cone", "Capsule", "Capsule_1"),
    "Plane",
)


@dataclass(frozen=True)
class Tint:
    """The primvars that give the colours of a surface.

    Attributes:
        color: Name of the primvar of linear RGB, "" for white.
        opacity: Name of the primvar of alpha, "" for opaque.
    """

    color: str = ""
    opacity: str = ""


DEFAULT_UV = "st"
ANY_UV = ""  # of a texture that names no coordinates: the default ones, otherwise the first ones
# Types of primvars that are read as texture coordinates.
UV_TYPES = r"((float|double|half)2|texCoord[23][fdh])(\[\])?"
COLOR_TOLERANCE = 1e-3  # by which rounding may take a colour out of its range
DISPLAY = Tint("displayColor", "displayOpacity")  # of a surface without material


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What draws some polygons.

    Attributes:
        material: Index in `Scene.materials`, or -1 for that of the node.
        tint: The colours that the material multiplies.
    """

    material: int
    tint: Tint


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Polygons of a mesh with a material of their own."""

    polygons: Ints
    surface: Surface


@dataclass(frozen=True, kw_only=True)
class _Polygons:
    """Polygons before attributes are added.

    Attributes:
        points: float64 [V, 3].
        indices: int64 [C], as the file orders them.
        counts: int64 [P].
        kept: int64, the polygons that are drawn.
        corners: int64, rows of `indices` in the order in which the drawn polygons use them.
    """

    points: NDArray[np.float64]
    indices: Ints
    counts: Ints
    kept: Ints
    corners: Ints


class GeometryReader:
    """Reads meshes and shapes, and counts their faces.

    Args:
        context: The limits, and the receiver of warnings.
    """

    def __init__(self, context: ReaderContext):
        self.cfg = context.cfg
        self.warnings = context.warnings
        self._uv_sets: dict[str, int] = {}
        self._faces = 0

    def uv_set(self, name: str) -> int:
        """Return the number of a set of texture coordinates by the name of its primvar."""
        return self._uv_sets.setdefault(name, len(self._uv_sets))

    def has_translucency(self, prim: Usd.Prim) -> bool:
        """Return whether the display opacity of a prim is below 1 somewhere."""
        opacity = primvar(prim, DISPLAY.opacity, 1, self.warnings)
        return opacity is not None and bool((opacity.values < 1).any())

    def read(self, prim: Usd.Prim, own: Surface, subsets: list[Subset]) -> Geometry:
        """Read the polygons of a prim.

        Args:
            prim: A prim of the types `MESHES` and `SHAPES`.
            own: What draws the polygons that are in no subset.
            subsets: Polygons with other materials.

        Raises:
            UsdError: If the prim cannot be read.
            Reject: "too_many_faces".
        """
        name = str(prim.GetPath())
        polygons = self._mesh(prim) if prim.GetTypeName() in MESHES else self._shape(prim)
        sizes = polygons.counts[polygons.kept]
        self._faces += int(np.maximum(sizes - 2, 0).sum())
        check_face_count(self._faces, self.cfg)

        surfaces = [own]
        surface_of = np.zeros(len(polygons.counts), dtype=np.int64)
        for subset in subsets:
            exists = (subset.polygons >= 0) & (subset.polygons < len(polygons.counts))
            if not exists.all():
                self.warnings.add("invalid_value", f"{name}: a subset of faces that do not exist")
            chosen = subset.polygons[exists]
            if surface_of[chosen].any():
                self.warnings.add("invalid_value", f"{name}: subsets that share faces")
            surface_of[chosen] = len(surfaces)
            surfaces.append(subset.surface)
        surface_of = surface_of[polygons.kept]
        return Geometry(
            positions=polygons.points,
            corners=polygons.indices[polygons.corners],
            contours=np.concatenate([[0], np.cumsum(sizes)]),
            uv=self._uv(prim, polygons),
            colors=self._colors(prim, polygons, surfaces, surface_of),
            normals=self._normals(prim, polygons),
            materials=np.array([surface.material for surface in surfaces])[surface_of],
            name=name,
        )

    def _mesh(self, prim: Usd.Prim) -> _Polygons:
        points = array(prim.GetAttribute("points"), np.float64, 3)
        if prim.GetTypeName() == "TetMesh":
            indices = array(prim.GetAttribute("surfaceFaceVertexIndices"), np.int64, 3).ravel()
            if not len(indices):
                triangles = UsdGeom.TetMesh.ComputeSurfaceFaces(UsdGeom.TetMesh(prim), TIME)
                indices = np.asarray(triangles, dtype=np.int64).ravel()
            counts = np.full(len(indices) // 3, 3)
        else:
            indices = array(prim.GetAttribute("faceVertexIndices"), np.int64)
            counts = array(prim.GetAttribute("faceVertexCounts"), np.int64)
            self._warn_cage(prim)
        if (counts < 0).any():
            raise UsdError("a negative number of corners")
        ends = np.cumsum(counts)
        fits = ends <= len(indices)
        if not fits.all() or (len(ends) and ends[-1] < len(indices)):
            total = int(ends[-1]) if len(ends) else 0
            self.warnings.add(
                "count_mismatch", f"{prim.GetPath()}: {len(indices)} indices for {total}"
            )
        is_drawn = fits & (counts > 0)
        holes = array(prim.GetAttribute("holeIndices"), np.int64)
        is_drawn[holes[(holes >= 0) & (holes < len(counts))]] = False
        kept = np.flatnonzero(is_drawn)
        # Corners polygon by polygon. A left-handed mesh lists them clockwise.
        sizes = counts[kept]
        starts = (ends - counts)[kept]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if prim.GetAttribute("orientation").Get(TIME) == "leftHanded":
            within = np.repeat(sizes, sizes) - 1 - within
        corners = np.repeat(starts, sizes) + within
        return _Polygons(points=points, indices=indices, counts=counts, kept=kept, corners=corners)

    def _warn_cage(self, prim: Usd.Prim) -> None:
        """Report a mesh that states that it is a subdivision surface."""
        scheme = prim.GetAttribute("subdivisionScheme")
        if scheme.HasAuthoredValue() and scheme.Get(TIME) != "none":
            self.warnings.add("subdivision_cage", f"{prim.GetPath()}: {scheme.Get(TIME)}")

    def _shape(self, prim: Usd.Prim) -> _Polygons:
        kind = str(prim.GetTypeName())
        axis = prim.GetAttribute("axis").Get(TIME) if prim.HasAttribute("axis") else "Z"
        if axis not in ("X", "Y", "Z"):
            self.warnings.add("invalid_value", f"{prim.GetPath()}: the axis {axis}")
            axis = "Z"

        def value(name: str, default: float) -> float:
            return number(prim.GetAttribute(name), default)

        if kind == "Cube":
            points, polygons = usd_shapes.cube(value("size", 2.0))
        elif kind == "Plane":
            points, polygons = usd_shapes.plane(value("width", 2.0), value("length", 2.0), axis)
        elif kind == "Sphere":
            points, polygons = usd_shapes.sphere(value("radius", 1.0))
        elif kind == "Cone":
            radius, height = value("radius", 1.0), value("height", 2.0)
            points, polygons = usd_shapes.cylinder(radius, 0.0, height, axis)
        else:
            if kind.endswith("_1"):
                bottom, top = value("radiusBottom", 1.0), value("radiusTop", 1.0)
            else:
                bottom = top = value("radius", 1.0)
            solid = usd_shapes.capsule if kind.startswith("Capsule") else usd_shapes.cylinder
            points, polygons = solid(bottom, top, value("height", 2.0), axis)
        if prim.GetAttribute("orientation").Get(TIME) == "leftHanded":
            polygons = [polygon[::-1] for polygon in polygons]
        counts = np.array([len(polygon) for polygon in polygons])
        indices = np.array([corner for polygon in polygons for corner in polygon])
        return _Polygons(
            points=points,
            indices=indices,
            counts=counts,
            kept=np.arange(len(counts)),
            corners=np.arange(len(indices)),
        )

    def _attribute(self, found: Primvar, polygons: _Polygons, name: str) -> Attribute | None:
        """Return a primvar as an attribute of the drawn polygons, or None with a warning."""
        if found.domain == "constant":
            values = np.broadcast_to(found.values, (len(polygons.points), found.values.shape[1]))
            return Attribute(values=values, domain="vertex")
        expected, rows = {
            "vertex": (len(polygons.points), None),
            "corner": (len(polygons.indices), polygons.corners),
            "polygon": (len(polygons.counts), polygons.kept),
        }[found.domain]
        if len(found.values) != expected:
            detail = f"{name}: {len(found.values)} for {expected}"
            self.warnings.add("attribute_mismatch", detail)
            return None
        values = found.values if rows is None else found.values[rows]
        return Attribute(values=values, domain=found.domain)  # pyright: ignore[reportArgumentType]

    def _uv(self, prim: Usd.Prim, polygons: _Polygons) -> dict[int, Attribute]:
        """Return all primvars of two numbers, and of three that are texture coordinates."""
        sets = {}
        for found in UsdGeom.PrimvarsAPI(prim).FindPrimvarsWithInheritance():
            if not re.fullmatch(UV_TYPES, str(found.GetTypeName())):
                continue
            values = read_primvar(found, 2, self.warnings)
            name = str(found.GetPrimvarName())
            if values is not None:
                attribute = self._attribute(values, polygons, f"{prim.GetPath()} {name}")
                if attribute is not None:
                    sets[self.uv_set(name)] = attribute
        if sets:
            first = next(iter(sets.values()))
            sets[self.uv_set(ANY_UV)] = sets.get(self.uv_set(DEFAULT_UV), first)
        return sets

    def _normals(self, prim: Usd.Prim, polygons: _Polygons) -> Attribute | None:
        found = primvar(prim, "normals", 3, self.warnings)
        attribute = prim.GetAttribute("normals")
        if found is None and attribute.HasAuthoredValue():
            found = read_primvar(UsdGeom.Primvar(attribute), 3, self.warnings)
        if found is None:
            return None
        return self._attribute(found, polygons, f"{prim.GetPath()} normals")

    def _colors(
        self, prim: Usd.Prim, polygons: _Polygons, surfaces: list[Surface], surface_of: Ints
    ) -> Attribute | None:
        """Return the colours that the surfaces multiply, white where a surface has none."""
        used = np.unique(surface_of).tolist()
        tints = list(dict.fromkeys(surfaces[index].tint for index in used))
        layers = [self._tinted(prim, tint, polygons) for tint in tints]
        if all(layer is None for layer in layers):
            return None
        if len(layers) == 1:
            return layers[0]
        # Surfaces with several tints: one value for each corner.
        sizes = polygons.counts[polygons.kept]
        tint_of = np.array([tints.index(surface.tint) if k in used else 0
                            for k, surface in enumerate(surfaces)])  # fmt: skip
        tint_of_corner = np.repeat(tint_of[surface_of], sizes)
        colors = np.full((len(polygons.corners), 4), 255, dtype=np.uint8)
        for index, layer in enumerate(layers):
            if layer is not None:
                chosen = tint_of_corner == index
                colors[chosen] = _on_corners(layer, polygons)[chosen]
        return Attribute(values=colors, domain="corner")

    def _tinted(self, prim: Usd.Prim, tint: Tint, polygons: _Polygons) -> Attribute | None:
        """Return the colours [N, 4] of a tint in 8-bit sRGB, None if the prim has none."""
        parts: list[Attribute | None] = []
        for name, width in ((tint.color, 3), (tint.opacity, 1)):
            found = primvar(prim, name, width, self.warnings) if name else None
            label = f"{prim.GetPath()} {name}"
            parts.append(None if found is None else self._attribute(found, polygons, label))
        color, opacity = parts
        given = [part for part in parts if part is not None]
        if not given:
            return None
        domain = given[0].domain
        if any(part.domain != domain for part in given):
            domain = "corner"
            given = [
                Attribute(values=_on_corners(part, polygons), domain="corner") for part in given
            ]
            color = given[0] if color is not None else None
            opacity = given[-1] if opacity is not None else None
        rgba = np.ones((len(given[0].values), 4))
        if color is not None:
            rgba[:, :3] = color.values
        if opacity is not None:
            rgba[:, 3:] = opacity.values
        is_finite = np.isfinite(rgba)
        with np.errstate(invalid="ignore"):
            is_valid = is_finite & (rgba >= 0) & (rgba < 1 + COLOR_TOLERANCE)
        if not is_valid.all():
            detail = f"{prim.GetPath()}: colours that are not between 0 and 1"
            self.warnings.add("invalid_value", detail)
        rgba = np.clip(np.where(is_finite, rgba, 0.0), 0, 1)
        rgba[:, :3] = linear_to_srgb(rgba[:, :3])
        return Attribute(values=np.rint(rgba * 255).astype(np.uint8), domain=domain)


def _on_corners(attribute: Attribute, polygons: _Polygons) -> NDArray[np.generic]:
    """Return the values of an attribute at each corner of the drawn polygons."""
    if attribute.domain == "corner":
        return attribute.values
    if attribute.domain == "polygon":
        return np.repeat(attribute.values, polygons.counts[polygons.kept], axis=0)
    rows = polygons.indices[polygons.corners]
    exists = (rows >= 0) & (rows < len(attribute.values))
    if not len(attribute.values):
        return np.zeros((len(rows), attribute.values.shape[1]), dtype=attribute.values.dtype)
    return attribute.values[np.where(exists, rows, 0)]
