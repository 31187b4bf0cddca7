"""Read 3MF packages: core specification, production extension, materials extension.

The model parts of a package are read one by one. An object is known by its part and its id.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.threemf_properties import (
    UNUSED_DISPLAY_PROPERTIES,
    Appearances,
    PropertyGroups,
)
from pipeline.mesh_io.readers.threemf_slicers import (
    SlicerRoles,
    read_slicer_roles,
    warn_of_filament_colors,
)
from pipeline.mesh_io.scene import Attribute, Geometry, Node, Scene
from pipeline.mesh_io.xml_tree import Element, ElementKind, Schema, parse_xml
from pipeline.mesh_io.zip_package import MEMBER_ERRORS, ZipPackage

MODEL_RELATIONSHIP = "/3dmodel"  # how the type of the relationship to the root model part ends
DEFAULT_MODEL_PART = "3D/3dmodel.model"
METRES_PER_UNIT = {
    "micron": 1e-6,
    "millimeter": 1e-3,
    "centimeter": 1e-2,
    "inch": 0.0254,
    "foot": 0.3048,
    "meter": 1.0,
}
NAMESPACES = {
    "http://schemas.microsoft.com/3dmanufacturing/core/2015/02": "",
    "http://schemas.microsoft.com/3dmanufacturing/2013/01": "",
    "http://schemas.microsoft.com/3dmanufacturing/material/2015/02": "m",
    "http://schemas.microsoft.com/3dmanufacturing/production/2015/06": "p",
    "http://schemas.microsoft.com/3dmanufacturing/slice/2015/07": "s",
    "http://schemas.microsoft.com/3dmanufacturing/trianglesets/2021/07": "t",
    "http://schemas.microsoft.com/3dmanufacturing/beamlattice/2017/02": "b",
    "http://schemas.3mf.io/3dmanufacturing/booleanoperations/2023/07": "bo",
    "http://schemas.3mf.io/3dmanufacturing/displacement/2023/10": "d",
    "http://schemas.3mf.io/3dmanufacturing/volumetric/2022/01": "v",
    "http://schemas.3mf.io/3dmanufacturing/implicit/2023/12": "i",
    "http://schemas.slic3r.org/3mf/2017/06": "slic3r",
    "http://schemas.bambulab.com/package/2021": "bambu",
}
# Extensions that may be required. What the reader does not use of them is reported element by
# element.
SUPPORTED_PREFIXES = ("", "m", "p", "s", "t")
RELATIONSHIP_NAMESPACES = {"http://schemas.openxmlformats.org/package/2006/relationships": ""}
RELATIONSHIP_SCHEMA = {
    "Relationships": ElementKind("", "Relationship"),
    "Relationship": ElementKind("Target Type"),
}
# What a part with geometry or an image is used for decides its name; these parts are neither.
PACKAGE_PARTS = ("[content_types].xml", ".rels")
ATTACHMENT_FOLDERS = ("metadata/", "thumbnails/", "auxiliaries/")
IMAGE_PARTS = (".png", ".jpg", ".jpeg")  # those that no drawn texture reads
SLICE_FOLDER = "2d/"  # model parts with slices, which repeat the mesh of their object
NO_PROPERTY = -1
MISSING_INDEX = -1
COLUMNS = 7  # of a row of triangles: v1 v2 v3, p1 p2 p3, index of the property group's id
UNSUPPORTED_OBJECTS = ("d:displacementmesh", "bo:booleanshape", "v:levelset", "i:levelset")
NO_LOOK = [MISSING_INDEX, MISSING_INDEX, MISSING_INDEX, NO_PROPERTY]
CORNER_PROPERTIES = ("p1", "p2", "p3")
KNOWN_TYPES = ("model", "solidsupport", "support", "surface", "other")

ObjectKey = tuple[str, str]  # part, id


@dataclass(slots=True)
class _TriangleRows:
    """The triangles of a mesh while they are read."""

    rows: array[int] = field(default_factory=lambda: array("i"))
    group_ids: dict[str, int] = field(default_factory=dict)
    painted: int = 0


@dataclass(kw_only=True)
class _ModelPart:
    """A model part: its root and what it refers to."""

    name: str
    root: Element
    objects: dict[str, Element]
    groups: PropertyGroups


def read_threemf(content: bytes, context: ReaderContext) -> Scene:
    """Read a 3MF package.

    Args:
        content: The zip file.
        context: Limits and the log of warnings. 3MF has no side files.

    Returns:
        The build items of the root model part, with z up. Supports are left out.

    Raises:
        Reject: "allocation_bomb", "too_many_faces" or "unreadable" (the root model part).
    """
    return _PackageReader(ZipPackage(content, context.cfg), context).read()


class _PackageReader:
    def __init__(self, package: ZipPackage, context: ReaderContext):
        self.package = package
        self.warnings = context.warnings
        self.max_faces = context.cfg.max_faces
        self.schema = _schema(self._add_triangle)
        self.num_triangles = 0
        self.appearances = Appearances()
        self.parts: dict[str, _ModelPart | None] = {}
        self.geometries: list[Geometry] = []
        self.root_name = ""
        self.unit = ""  # of the root part, which holds for all
        self.left_out: set[ObjectKey] = set()  # volumes for slicers
        self.roles = SlicerRoles()

    def read(self) -> Scene:
        name = self._root_part_name()
        root = self._parse_part(name, self.package.read(name))
        self.parts[name] = root
        self.root_name = name
        self.unit = root.root.get("unit", "millimeter")
        self.roles = read_slicer_roles(self.package, self.warnings)
        warn_of_filament_colors(self.package, self.warnings)
        self._warn_of_extensions(root.root)
        build = root.root.first("build")
        items = [] if build is None else list(build.all("item"))
        references = [self._reference(item, name) for item in items]

        # Number the objects that the build reaches, then build their nodes.
        components = self._reachable([key for key in references if key is not None])
        numbers = {key: number for number, key in enumerate(components)}
        nodes: list[Node] = [Node() for _ in numbers]
        for key, placed in components.items():
            geometry = self._drawn_geometry(key)
            children = tuple(range(len(nodes), len(nodes) + len(placed)))
            nodes[numbers[key]] = Node(
                geometries=() if geometry is None else (geometry,),
                children=children,
                name=self._label(key),
            )
            nodes += [
                Node(matrix=self._matrix(component), children=(numbers[child],))
                for child, component in placed
            ]
        roots = []
        for item, key in zip(items, references, strict=True):
            if key is not None:
                roots.append(len(nodes))
                nodes.append(Node(matrix=self._matrix(item), children=(numbers[key],)))
        self._report_unplaced(numbers)
        self._report_unused_parts()
        unit = root.root.get("unit", "millimeter").lower()
        if unit not in METRES_PER_UNIT:
            self.warnings.add("invalid_value", f"unit {unit[:50]}")
        return Scene(
            geometries=self.geometries,
            nodes=nodes,
            roots=roots,
            materials=self.appearances.materials,
            images=self.appearances.images,
            up_axis="z",
            metres_per_unit=METRES_PER_UNIT.get(unit, METRES_PER_UNIT["millimeter"]),
        )

    def _root_part_name(self) -> str:
        """Return the name of the root model part, which the relationships of the package state."""
        for target in self._root_targets():
            name = self.package.find(target)
            if name is not None:
                return name
        models = [name for name in self.package.names if name.lower().endswith(".model")]
        name = self.package.find(DEFAULT_MODEL_PART) or next(iter(models), None)
        if name is None:
            raise Reject("unreadable", error="no_model_part", parts=len(self.package.names))
        self.warnings.add("invalid_value", "no relationship leads to the root model part")
        return name

    def _root_targets(self) -> list[str]:
        """Return what the relationships of the package name as the root model part."""
        name = self.package.find("/_rels/.rels")
        if name is None:
            return []
        try:
            root = parse_xml(
                self.package.read(name),
                RELATIONSHIP_SCHEMA,
                roots="Relationships",
                namespaces=RELATIONSHIP_NAMESPACES,
                ignored=IGNORED_ELEMENTS["3mf"],
                warnings=self.warnings,
            )
        except (Reject, *MEMBER_ERRORS) as error:
            self.warnings.add("invalid_value", f"{name}: {error}")
            return []
        return [
            relationship.get("Target")
            for relationship in root.all("Relationship")
            if relationship.get("Type").endswith(MODEL_RELATIONSHIP)
        ]

    def _part(self, name: str) -> _ModelPart | None:
        """Return a model part, or None with a warning if it cannot be read."""
        if name not in self.parts:
            self.parts[name] = None
            try:
                self.parts[name] = self._parse_part(name, self.package.read(name))
            except MEMBER_ERRORS as error:
                self.warnings.add("primitive_unreadable", f"{name}: {type(error).__name__}")
            except Reject as error:
                if error.reason != "unreadable":
                    raise
                self.warnings.add("primitive_unreadable", f"{name}: {error}")
        return self.parts[name]

    def _parse_part(self, name: str, content: bytes) -> _ModelPart:
        root = parse_xml(
            content,
            self.schema,
            roots="model",
            namespaces=NAMESPACES,
            ignored=IGNORED_ELEMENTS["3mf"],
            warnings=self.warnings,
        )
        unit = root.get("unit", "millimeter")
        if self.root_name and unit != self.unit:
            self.warnings.add("invalid_value", f"{name}: unit {unit[:50]} is not that of the root")
        resources = [child for element in root.all("resources") for child in element.children]
        objects: dict[str, Element] = {}
        for element in resources:
            if element.name == "object":
                if element.get("id") in objects:
                    self.warnings.add("invalid_value", f"{name}: second object {element.get('id')}")
                objects.setdefault(element.get("id"), element)
        groups = PropertyGroups(resources, name, self.package, self.appearances, self.warnings)
        return _ModelPart(name=name, root=root, objects=objects, groups=groups)

    def _warn_of_extensions(self, root: Element) -> None:
        """Warn about required extensions that the reader does not know. It reads on."""
        for prefix in root.get("requiredextensions").split():
            uri = root.namespaces.get(prefix, prefix)
            if NAMESPACES.get(uri) not in SUPPORTED_PREFIXES:
                self.warnings.add("unknown_extension", f"required {uri}")

    def _reference(self, element: Element, base: str) -> ObjectKey | None:
        """Return the object that an item or component refers to, or None with a warning."""
        name = base
        path = element.get("p:path")
        if path:
            found = self.package.find(path, base)
            if found is None:
                self.warnings.add("primitive_unreadable", f"there is no part {path}")
                return None
            name = found
        part = self._part(name)
        identifier = element.get("objectid")
        if part is None:
            return None
        if identifier not in part.objects:
            self.warnings.add("primitive_unreadable", f"{name} has no object {identifier[:50]}")
            return None
        return name, identifier

    def _reachable(self, keys: list[ObjectKey]) -> dict[ObjectKey, list[tuple[ObjectKey, Element]]]:
        """Return the components of each object that the given ones reach."""
        components: dict[ObjectKey, list[tuple[ObjectKey, Element]]] = {}
        pending = list(reversed(keys))
        while pending:
            key = pending.pop()
            if key not in components:
                components[key] = self._components(key)
                pending += [child for child, _ in reversed(components[key])]
        return components

    def _components(self, key: ObjectKey) -> list[tuple[ObjectKey, Element]]:
        """Return the objects that the components of an object place, with the components."""
        elements = [
            item for group in self._object(key).all("components") for item in group.children
        ]
        references = [(self._reference(element, key[0]), element) for element in elements]
        placed = []
        for child, element in references:
            if child is None:
                continue
            code = self.roles.components.get((key[1], child[1]))
            if code is not None and key[0] == self.root_name:
                self.warnings.add(code, f"{self._label(child)}: a volume for the slicer")
                self.left_out.add(child)
            else:
                placed.append((child, element))
        return placed

    def _object(self, key: ObjectKey) -> Element:
        part = self._part(key[0])
        assert part is not None
        return part.objects[key[1]]

    def _label(self, key: ObjectKey) -> str:
        return f"{key[0]} object {key[1]}"

    def _drawn_geometry(self, key: ObjectKey) -> int | None:
        """Read the mesh of an object and return its index, or None if nothing is drawn.

        The type belongs to the mesh: an object of components has the types of its components.
        """
        element = self._object(key)
        for child in element.children:
            if child.name in UNSUPPORTED_OBJECTS:
                self.warnings.add("unsupported_primitive", f"{self._label(key)}: {child.name}")
        if element.first("mesh") is None:
            return None
        kind = element.get("type", "model").lower()
        if kind in ("support", "solidsupport"):
            self.warnings.add("support_left_out", self._label(key))
            return None
        if kind == "other":
            self.warnings.add("hidden_left_out", f"{self._label(key)} of type other")
            return None
        if kind not in KNOWN_TYPES:
            self.warnings.add("invalid_value", f"object type {kind[:50]}")
        geometry = self._geometry(key)
        if geometry is not None:
            self.geometries.append(geometry)
            return len(self.geometries) - 1
        return None

    def _geometry(self, key: ObjectKey) -> Geometry | None:
        """Return the mesh of an object, or None if it has no triangles."""
        element = self._object(key)
        meshes = list(element.all("mesh"))
        self.warnings.add("invalid_value", f"{self._label(key)}: several meshes", len(meshes) - 1)
        for lattice in meshes[0].all("b:beamlattice"):
            self.warnings.add("unsupported_primitive", f"{self._label(key)}: {lattice.name}")
        if element.get("s:meshresolution") == "lowres":
            self.warnings.add("unsupported_primitive", f"{self._label(key)}: slices")
        vertices, triangles = meshes[0].first("vertices"), meshes[0].first("triangles")
        if vertices is None or triangles is None or triangles.stream is None:
            return None
        stream: _TriangleRows = triangles.stream
        if stream.painted:
            self.warnings.add("appearance_ignored", "painted triangles", stream.painted)
        positions = np.array(vertices.stream or (), dtype=np.float64).reshape(-1, 3)
        rows = np.frombuffer(stream.rows, dtype=np.int32).reshape(-1, COLUMNS).astype(np.int64)
        if key[0] == self.root_name:
            rows = self._model_triangles(rows, key[1])
        part = self._part(key[0])
        assert part is not None
        look = self._look(element, rows[:, 3:], list(stream.group_ids), part.groups)
        return Geometry.from_triangles(positions, rows[:, :3], name=self._label(key), **look)

    def _model_triangles(self, rows: NDArray[np.int64], identifier: str) -> NDArray[np.int64]:
        """Return the triangles of an object without those of volumes for the slicer."""
        is_kept = np.ones(len(rows), dtype=bool)
        for first, last, code in self.roles.triangles.get(identifier, ()):
            if 0 <= first <= last < len(rows):
                is_kept[first : last + 1] = False
                self.warnings.add(code, f"object {identifier[:50]}: a volume for the slicer")
            else:
                self.warnings.add("invalid_value", f"triangles of object {identifier[:50]}")
        return rows[is_kept]

    def _look(
        self,
        element: Element,
        properties: NDArray[np.int64],
        group_ids: list[str],
        groups: PropertyGroups,
    ) -> dict[str, Any]:
        """Return the appearance of a mesh as arguments of `Geometry`.

        Args:
            element: The object, which states the default property.
            properties: [F, 4], p1 to p3 and the index of the property group's id.
            group_ids: The ids of property groups by index.
            groups: The property groups of the part.
        """
        default_group = element.get("pid")
        default_index = _integer(element.get("pindex"), MISSING_INDEX)
        corners = properties[:, :3]
        # Triangles without p1 have the property of the object; p2 and p3 default to p1.
        corners = np.where(corners == MISSING_INDEX, corners[:, :1], corners)
        is_default = corners[:, 0] == MISSING_INDEX
        ids = [*group_ids, default_group]
        group_of = np.where(properties[:, 3] == NO_PROPERTY, len(group_ids), properties[:, 3])
        group_of = np.where(is_default, len(group_ids), group_of)
        corners = np.where(is_default[:, None], default_index, corners)

        count = len(properties)
        materials = np.full(count, -1)
        colors = np.full((count, 3, 4), 255, dtype=np.uint8)
        uv = np.zeros((count, 3, 2), dtype=np.float32)
        has_colors = has_uv = False
        for index in np.unique(group_of).tolist():
            identifier = ids[index]
            if not identifier:
                continue
            group = groups.get(identifier)
            chosen = np.flatnonzero(group_of == index)
            if group is None:
                continue
            p = corners[chosen]
            is_valid = ((p >= 0) & (p < len(group.materials))).all(axis=1)
            missing = int((~is_valid).sum())
            self.warnings.add("material_missing", f"property of group {identifier[:50]}", missing)
            chosen, p = chosen[is_valid], p[is_valid]
            if not len(p):
                continue
            materials[chosen] = group.materials[p[:, 0]]
            if group.colors is not None:
                colors[chosen] = group.colors[p]
                has_colors = True
            if group.uv is not None:
                uv[chosen] = group.uv[p]
                has_uv = True
        if has_colors and (colors == colors[0, 0]).all() and (materials == materials[0]).all():
            tinted = self.appearances.tinted(int(materials[0]), tuple(colors[0, 0].tolist()))
            materials = np.full(count, tinted)
            has_colors = False
        materials = np.where(materials == -1, self.appearances.default(), materials)
        look: dict[str, Any] = {"materials": materials}
        if has_colors:
            look["colors"] = Attribute(values=colors.reshape(-1, 4), domain="corner")
        if has_uv:
            look["uv"] = {0: Attribute(values=uv.reshape(-1, 2), domain="corner")}
        return look

    def _matrix(self, element: Element) -> NDArray[np.float64]:
        """Return the transform of an item or component, for column vectors.

        The file has the 4 x 3 matrix for row vectors, row by row.
        """
        matrix = np.eye(4)
        text = element.get("transform")
        if text:
            try:
                values = np.array([float(word) for word in text.split()])
                matrix[:3] = values.reshape(4, 3).T
            except ValueError:
                self.warnings.add("invalid_value", f"transform {text[:80]}")
        return matrix

    def _add_triangle(self, parent: Element, attributes: dict[str, str]) -> None:
        """Append a triangle to the rows of its mesh. Indices that are no numbers exist nowhere."""
        self.num_triangles += 1
        if self.num_triangles > self.max_faces:
            raise Reject("too_many_faces", faces=self.num_triangles, max_faces=self.max_faces)
        if parent.stream is None:
            parent.stream = _TriangleRows()
        stream: _TriangleRows = parent.stream
        look = NO_LOOK
        if len(attributes) > 3:
            group = attributes.get("pid")
            if group is None:
                group_index = NO_PROPERTY
            else:
                group_index = stream.group_ids.setdefault(group.strip(), len(stream.group_ids))
            p1, p2, p3 = (
                _integer(attributes.get(name, ""), MISSING_INDEX) for name in CORNER_PROPERTIES
            )
            look = [p1, p2, p3, group_index]
            if "slic3r:mmu_segmentation" in attributes or "paint_color" in attributes:
                stream.painted += 1
        try:
            corners = [int(attributes["v1"]), int(attributes["v2"]), int(attributes["v3"])]
            stream.rows.fromlist(corners + look)
        except (KeyError, ValueError, OverflowError):
            stream.rows.fromlist([MISSING_INDEX] * 3 + look)

    def _report_unplaced(self, reached: Collection[ObjectKey]) -> None:
        """Warn about objects with meshes that the build does not reach."""
        for part in list(self.parts.values()):
            if part is None:
                continue
            unplaced = [
                (part.name, identifier)
                for identifier, element in part.objects.items()
                if (part.name, identifier) not in reached
                and (part.name, identifier) not in self.left_out
                and element.first("mesh") is not None
            ]
            if unplaced:
                self.warnings.add("unplaced_geometry", self._label(unplaced[0]), len(unplaced))

    def _report_unused_parts(self) -> None:
        """Warn about parts of the package that nothing refers to and that may change the shape."""
        for name in self.package.unused_names():
            plain = name.lower()
            if plain.startswith(SLICE_FOLDER):
                continue
            if plain.endswith(".model"):
                self.warnings.add("unplaced_geometry", name)
            elif not plain.endswith((*PACKAGE_PARTS, *IMAGE_PARTS)) and not any(
                f"/{folder}" in f"/{plain}" for folder in ATTACHMENT_FOLDERS
            ):
                self.warnings.add("unknown_element", f"part {name}")


def _integer(text: str, default: int) -> int:
    """Parse a number of 32 bits; the default stands for anything else."""
    try:
        value = int(text)
    except ValueError:
        return default
    return value if 0 <= value < 2**31 else default


def _add_vertex(parent: Element, attributes: dict[str, str]) -> None:
    """Append a vertex. A coordinate that is no number is undefined."""
    if parent.stream is None:
        parent.stream = array("d")
    try:
        parent.stream.extend(
            (float(attributes["x"]), float(attributes["y"]), float(attributes["z"]))
        )
    except (KeyError, ValueError):
        parent.stream.extend((math.nan, math.nan, math.nan))


def _add_coordinate(parent: Element, attributes: dict[str, str]) -> None:
    if parent.stream is None:
        parent.stream = array("d")
    try:
        parent.stream.extend((float(attributes["u"]), float(attributes["v"])))
    except (KeyError, ValueError):
        parent.stream.extend((math.nan, math.nan))


def _add_text(name: str) -> Callable[[Element, dict[str, str]], None]:
    """Return a handler that collects one attribute as text."""

    def add(parent: Element, attributes: dict[str, str]) -> None:
        if parent.stream is None:
            parent.stream = []
        parent.stream.append(attributes.get(name, ""))

    return add


def _schema(add_triangle: Callable[[Element, dict[str, str]], None]) -> Schema:
    """Return the elements of a model part that are used."""
    display = dict.fromkeys(UNUSED_DISPLAY_PROPERTIES, ElementKind(is_opaque=True))
    unsupported = {
        name: ElementKind(is_opaque=True) for name in (*UNSUPPORTED_OBJECTS, "b:beamlattice")
    }
    return {
        "model": ElementKind("unit requiredextensions", "resources build"),
        "resources": ElementKind(
            "",
            "object basematerials m:colorgroup m:texture2dgroup m:texture2d m:compositematerials"
            " m:multiproperties m:pbmetallicdisplayproperties " + " ".join(display),
        ),
        "object": ElementKind(
            "id type pid pindex s:meshresolution",
            " ".join(("mesh components", *UNSUPPORTED_OBJECTS)),
        ),
        "mesh": ElementKind("", "vertices triangles b:beamlattice"),
        "vertices": ElementKind("", "vertex"),
        "vertex": ElementKind("x y z", stream=_add_vertex),
        "triangles": ElementKind("", "triangle"),
        "triangle": ElementKind(
            "v1 v2 v3 p1 p2 p3 pid paint_color slic3r:mmu_segmentation", stream=add_triangle
        ),
        "components": ElementKind("", "component"),
        "component": ElementKind("objectid transform p:path"),
        "build": ElementKind("", "item"),
        "item": ElementKind("objectid transform p:path"),
        "basematerials": ElementKind("id displaypropertiesid", "base"),
        "base": ElementKind("displaycolor"),
        "m:colorgroup": ElementKind("id displaypropertiesid", "m:color"),
        "m:color": ElementKind("color", stream=_add_text("color")),
        "m:texture2d": ElementKind("id path tilestyleu tilestylev filter box"),
        "m:texture2dgroup": ElementKind("id texid displaypropertiesid", "m:tex2coord"),
        "m:tex2coord": ElementKind("u v", stream=_add_coordinate),
        "m:compositematerials": ElementKind(
            "id matid matindices displaypropertiesid", "m:composite"
        ),
        "m:composite": ElementKind("values", stream=_add_text("values")),
        # Some writers leave out the prefix.
        "m:multiproperties": ElementKind("id pids blendmethods", "m:multi multi"),
        "m:multi": ElementKind("pindices", stream=_add_text("pindices")),
        "multi": ElementKind("pindices", stream=_add_text("pindices")),
        "m:pbmetallicdisplayproperties": ElementKind("id", "m:pbmetallic"),
        "m:pbmetallic": ElementKind("metallicness roughness"),
        **display,
        **unsupported,
    }
