"""Read COLLADA documents (dae) and zipped ones (zae), versions 1.4 and 1.5."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.collada_controllers import (
    ControllerError,
    ControllerReader,
    with_matrices,
)
from pipeline.mesh_io.readers.collada_geometry import GeometryReader, Primitive
from pipeline.mesh_io.readers.collada_materials import MaterialReader
from pipeline.mesh_io.readers.collada_schema import NAMESPACES, SCHEMA, TRANSFORMS
from pipeline.mesh_io.readers.collada_values import Document
from pipeline.mesh_io.scene import Axis, Geometry, Node, Scene
from pipeline.mesh_io.side_files import PackageFiles
from pipeline.mesh_io.xml_tree import Element, ElementKind, parse_xml
from pipeline.mesh_io.zip_package import ZipPackage

UP_AXES: dict[str, Axis] = {"X_UP": "x", "Y_UP": "y", "Z_UP": "z"}
MANIFEST = "manifest.xml"
MANIFEST_SCHEMA = {"dae_root": ElementKind(has_text=True)}
ZIP_SIGNATURE = b"PK\x03\x04"


def read_collada(content: bytes, context: ReaderContext) -> Scene:
    """Read a COLLADA document or a zipped one.

    Args:
        content: XML, or a zip file with a document and its images.
        context: Limits, image files and the log of warnings.

    Returns:
        The visual scene. Skins and morph targets have the pose that the nodes and weights state.

    Raises:
        Reject: "allocation_bomb" or "unreadable".
    """
    read_file = context.side_files.read
    if content.startswith(ZIP_SIGNATURE):
        package = ZipPackage(content, context.cfg)
        name = _document_name(package, context.warnings)
        content = package.read(name)
        read_file = PackageFiles(package, name, context.warnings).read
    root = parse_xml(
        content,
        SCHEMA,
        roots="COLLADA",
        namespaces=NAMESPACES,
        ignored=IGNORED_ELEMENTS["dae"],
        warnings=context.warnings,
    )
    document = Document(root, context.warnings)
    materials = MaterialReader(document, read_file, context.cfg.max_texture_side, context.warnings)
    return _SceneReader(document, materials, context.warnings).read()


def _document_name(package: ZipPackage, warnings: WarningLog) -> str:
    """Return the name of the document in a zipped file, which a manifest may state."""
    manifest = package.find(MANIFEST)
    if manifest is not None:
        try:
            root = parse_xml(
                package.read(manifest), MANIFEST_SCHEMA, roots="dae_root", warnings=warnings
            )
            name = package.find(root.text.partition("#")[0])
            if name is not None:
                return name
        except (Reject, zipfile.BadZipFile):
            pass
        warnings.add("invalid_value", "the manifest names no document")
    names = [name for name in package.names if name.lower().endswith(".dae")]
    names.sort(key=lambda name: (name.count("/"), name))
    if not names:
        raise Reject("unreadable", error="no_dae", parts=len(package.names))
    warnings.add("unplaced_geometry", names[-1], len(names) - 1)
    return names[0]


class _SceneReader:
    """Reads the scene graph of a document."""

    def __init__(self, document: Document, materials: MaterialReader, warnings: WarningLog):
        self.document = document
        self.materials = materials
        self.warnings = warnings
        self.geometry_reader = GeometryReader(document, warnings)
        self.controllers = ControllerReader(document, self.geometry_reader, warnings)
        self.geometries: list[Geometry] = []
        self.nodes: list[Node] = []
        self.drawn: set[int] = set()  # id() of the <geometry> elements that a node draws
        self.reported: set[int] = set()  # id() of the <instance_node> elements with a warning
        # (id() of the geometry, material): the geometry itself and its index in geometries
        self.variants: dict[tuple[int, int], tuple[Geometry, int]] = {}
        self.numbers: dict[int, int] = {}  # id(<node>): index in nodes
        self.matrices: dict[int, NDArray[np.float64]] = {}  # id(<node>): its matrix
        self.skinned: list[tuple[Element, Element]] = []  # node, <instance_controller>

    def read(self) -> Scene:
        """Return the scene."""
        up_axis, metres = self._asset()
        scene = self._visual_scene()
        if scene is None:
            self._draw_all()
            roots = list(range(len(self.nodes)))
        else:
            top = list(scene.all("node"))
            self._number(top)
            roots = [self.numbers[id(node)] for node in top if id(node) in self.numbers]
            self._place_skins(roots)
        self._report_unplaced()
        return Scene(
            geometries=self.geometries,
            nodes=self.nodes,
            roots=roots,
            materials=self.materials.materials,
            images=self.materials.images,
            up_axis=up_axis,
            metres_per_unit=metres,
        )

    def _asset(self) -> tuple[Axis | None, float | None]:
        """Return the up axis and the unit of the document, if it states them."""
        axis: Axis | None = None
        metres = None
        for element in self.document.all("asset"):
            is_root = self.document.parents.get(id(element)) is self.document.root
            up = element.first("up_axis")
            unit = element.first("unit")
            if not is_root:
                if up is not None or unit is not None:
                    self.warnings.add("unknown_element", "asset of a part of the document")
                continue
            if up is not None:
                axis = UP_AXES.get(up.text.strip().upper())
                if axis is None:
                    self.warnings.add("invalid_value", f"up_axis {up.text[:50]}")
            if unit is not None and unit.get("meter"):
                try:
                    metres = float(unit.get("meter").replace(",", "."))
                except ValueError:
                    self.warnings.add("invalid_value", f"unit {unit.get('meter')[:50]}")
        return axis, metres

    def _visual_scene(self) -> Element | None:
        """Return the visual scene that the document shows, or None if there is none."""
        scenes = list(self.document.all("visual_scene"))
        drawn = self._stated_scene()
        if drawn is None and scenes:
            self.warnings.add("invalid_value", "no scene: the first visual scene is drawn")
            drawn = scenes[0]
        elif drawn is None:
            self.warnings.add("invalid_value", "no visual scene: each geometry is drawn once")
        for scene in scenes:
            if scene is not drawn and any(scene.all("node")):
                self.warnings.add("unplaced_geometry", f"visual scene {scene.get('id')[:50]}")
        return drawn

    def _stated_scene(self) -> Element | None:
        """Return the visual scene that the document names and has."""
        for scene in self.document.root.all("scene"):
            for instance in scene.all("instance_visual_scene"):
                found = self.document.find(instance.get("url"), "visual_scene")
                if found is not None:
                    return found
                self.warnings.add("invalid_value", f"no visual scene {instance.get('url')[:50]}")
        return None

    def _number(self, top: list[Element]) -> None:
        """Add the nodes below the given ones, and those that they instance, to `nodes`."""
        pending = list(reversed(top))
        order: list[Element] = []
        while pending:
            node = pending.pop()
            if id(node) in self.numbers:
                continue
            if self._is_hidden(node):
                self.warnings.add("hidden_left_out", node.get("name") or node.get("id"))
                continue
            self.numbers[id(node)] = len(order)
            order.append(node)
            pending += [child for child in reversed(self._children(node))]
        self.nodes = [Node() for _ in order]
        for number, node in enumerate(order):
            self.nodes[number] = Node(
                matrix=self._matrix(node),
                geometries=self._drawn_geometries(node),
                children=tuple(
                    self.numbers[id(child)]
                    for child in self._children(node)
                    if id(child) in self.numbers
                ),
                name=node.get("name") or node.get("id"),
            )

    def _is_hidden(self, node: Element) -> bool:
        return any(
            value.text.strip().lower() in ("0", "false")
            for extra in node.all("extra")
            for technique in extra.all("technique")
            for value in technique.all("visibility")
        )

    def _children(self, node: Element) -> list[Element]:
        """Return the nodes below a node: its own and instanced ones."""
        children = []
        for child in node.all("node", "instance_node"):
            if child.name == "node":
                children.append(child)
                continue
            found = self.document.find(child.get("url"), "node")
            if found is not None:
                children.append(found)
            elif id(child) not in self.reported:
                self.reported.add(id(child))
                self._warn_of_reference(child)
        return children

    def _warn_of_reference(self, instance: Element) -> None:
        url = instance.get("url")
        kind = "external reference" if url.partition("#")[0] else "no"
        self.warnings.add("primitive_unreadable", f"{kind} {instance.name} {url[:80]}")

    def _matrix(self, node: Element) -> NDArray[np.float64]:
        """Return the product of the transforms of a node in their order."""
        if id(node) not in self.matrices:
            matrix = np.eye(4)
            for element in node.all(*TRANSFORMS):
                values = self.document.numbers(element, _TRANSFORM_SIZES[element.name])
                try:
                    matrix = matrix @ _TRANSFORM_MATRICES[element.name](values)
                except ValueError:
                    detail = f"{element.name} of {node.get('id')}: {element.text[:50]}"
                    self.warnings.add("invalid_value", detail)
            self.matrices[id(node)] = matrix
        return self.matrices[id(node)]

    def _drawn_geometries(self, node: Element) -> tuple[int, ...]:
        """Return the geometries that a node draws itself. Skins are collected for later."""
        indices: list[int] = []
        for instance in node.all("instance_geometry", "instance_controller"):
            if instance.name == "instance_geometry":
                geometry = self.document.find(instance.get("url"), "geometry")
                if geometry is None:
                    self._warn_of_reference(instance)
                    continue
                self.drawn.add(id(geometry))
                primitives = self.geometry_reader.primitives(geometry)
                indices += self._bound(primitives, instance)
            elif self.document.find(instance.get("url"), "controller") is None:
                self._warn_of_reference(instance)
            else:
                self.skinned.append((node, instance))
        return tuple(indices)

    def _place_skins(self, roots: list[int]) -> None:
        """Add the meshes of controllers below the nodes to which their joints are relative."""
        for node, instance in self.skinned:
            controller = self.document.find(instance.get("url"), "controller")
            assert controller is not None
            try:
                primitives, skin = self.controllers.read(controller)
            except ControllerError as error:
                self.warnings.add("primitive_unreadable", str(error))
                continue
            parent: Element | None = node
            if skin is not None:
                count = max((len(item.geometry.positions) for item in primitives), default=0)
                joints = self._joints(skin.joints, instance)
                if joints is None or (len(skin.vertices) and skin.vertices.max() >= count):
                    detail = f"{controller.get('id')}: joints or vertices do not exist"
                    self.warnings.add("skin_unreadable", detail)
                    poses = None
                else:
                    parent, poses = self._poses(node, joints)
                    if poses is None:
                        self.warnings.add("skin_unreadable", f"{controller.get('id')}: skeleton")
                if poses is None:
                    parent = node
                    primitives = [
                        _moved(item, np.broadcast_to(skin.bind_shape, (count, 4, 4)))
                        for item in primitives
                    ]
                else:
                    matrices = skin.matrices(poses, count)
                    primitives = [_moved(item, matrices) for item in primitives]
            indices = tuple(self._bound(primitives, instance))
            if parent is None:
                roots.append(len(self.nodes))
                self.nodes.append(Node(geometries=indices, name=instance.get("url")))
            else:
                number = self.numbers[id(parent)]
                owner = self.nodes[number]
                self.nodes[number] = replace(owner, geometries=owner.geometries + indices)

    def _joints(self, names: list[str], instance: Element) -> list[Element] | None:
        """Return the nodes of joints, or None if one does not exist.

        They are looked for by sid below the skeletons, then by sid, id and name anywhere.
        """
        skeletons = [
            found
            for skeleton in instance.all("skeleton")
            if (found := self.document.find(skeleton.text, "node")) is not None
        ]
        by_name: dict[str, Element] = {}
        pending = list(reversed(skeletons))
        while pending:
            node = pending.pop()
            by_name.setdefault(node.get("sid"), node)
            pending += reversed(list(node.all("node")))
        for attribute in ("sid", "id", "name"):
            for node in self.document.all("node"):
                by_name.setdefault(node.get(attribute), node)
        joints = [by_name.get(name) for name in names]
        return [joint for joint in joints if joint is not None] if all(joints) else None

    def _poses(
        self, node: Element, joints: list[Element]
    ) -> tuple[Element | None, NDArray[np.float64] | None]:
        """Return the matrices of joints relative to a node above them and above the given one.

        Returns:
            The node, or None for the root of the scene, and [J, 4, 4], or None if no such node is
            above all of them.
        """
        # The nearest ancestor of the node that is above all joints, so that the skin is drawn
        # wherever that ancestor is instanced.
        shared = self._ancestors(node)
        chains = [[joint, *self._ancestors(joint)] for joint in joints]
        for chain in chains:
            members = {id(item) for item in chain[1:]}
            shared = [item for item in shared if id(item) in members & self.numbers.keys()]
        is_in_scene = all(self._top_parent_name(item) == "visual_scene" for item in (node, *joints))
        if not shared and not is_in_scene:
            return None, None
        parent = shared[0] if shared else None
        poses = []
        for chain in chains:
            matrix = np.eye(4)
            for item in chain:
                if item is parent:
                    break
                matrix = self._matrix(item) @ matrix
            poses.append(matrix)
        return parent, np.array(poses).reshape(-1, 4, 4)

    def _ancestors(self, node: Element) -> list[Element]:
        """Return the <node> elements around a node, the nearest first."""
        ancestors = []
        parent = self.document.parents.get(id(node))
        while parent is not None and parent.name == "node":
            ancestors.append(parent)
            parent = self.document.parents.get(id(parent))
        return ancestors

    def _top_parent_name(self, node: Element) -> str:
        top = ([node, *self._ancestors(node)])[-1]
        return self.document.parents[id(top)].name

    def _bound(self, primitives: list[Primitive], instance: Element | None) -> list[int]:
        """Return the indices of primitives with the materials that an instance binds."""
        bindings = {} if instance is None else _bindings(instance)
        indices = []
        for primitive in primitives:
            material = self._material(primitive, bindings)
            key = (id(primitive.geometry), material)
            if key not in self.variants:
                self.variants[key] = (primitive.geometry, len(self.geometries))
                self.geometries.append(replace(primitive.geometry, materials=material))
            indices.append(self.variants[key][1])
        return indices

    def _material(self, primitive: Primitive, bindings: dict[str, Element]) -> int:
        """Return the index of the material that is bound to a primitive; -1 is none."""
        symbol = primitive.symbol
        binding = bindings.get(symbol)
        if binding is not None:
            target = binding.get("target")
        elif symbol and self.materials.has_material(symbol):
            target = symbol  # some writers state the material itself
        elif symbol:
            self.warnings.add("material_missing", f"symbol {symbol[:80]}")
            return -1
        else:
            return -1
        sets = sorted(primitive.geometry.uv)
        channels = {} if binding is None else self._channels(binding)

        def uv_set_of(texcoord: str) -> int:
            bound = channels.get(texcoord, sets[0] if sets else 0)
            return bound if bound in sets or not sets else sets[0]

        key = (tuple(sets), tuple(sorted(channels.items())))
        return self.materials.material(target, uv_set_of, key)

    def _channels(self, binding: Element) -> dict[str, int]:
        """Return {texcoord of textures: set of texture coordinates}."""
        return {
            item.get("semantic"): self.document.integer(item, "input_set", 0)
            for item in binding.all("bind_vertex_input")
            if item.get("input_semantic", "TEXCOORD") == "TEXCOORD"
        }

    def _draw_all(self) -> None:
        """Draw each geometry once, for documents without a visual scene."""
        for geometry in self.document.all("geometry"):
            self.drawn.add(id(geometry))
            indices = self._bound(self.geometry_reader.primitives(geometry), None)
            self.nodes.append(Node(geometries=tuple(indices), name=geometry.get("id")))

    def _report_unplaced(self) -> None:
        """Add the geometries that nothing draws, so that they are reported."""
        used = self.drawn | self.controllers.used_geometries
        for geometry in self.document.all("geometry"):
            if id(geometry) not in used:
                for primitive in self.geometry_reader.primitives(geometry):
                    self.geometries.append(primitive.geometry)


def _bindings(instance: Element) -> dict[str, Element]:
    """Return {symbol: <instance_material>} of an instance."""
    return {
        item.get("symbol"): item
        for bind in instance.all("bind_material")
        for common in bind.all("technique_common")
        for item in common.all("instance_material")
    }


def _moved(primitive: Primitive, matrices: NDArray[np.float64]) -> Primitive:
    count = len(primitive.geometry.positions)
    return replace(primitive, geometry=with_matrices(primitive.geometry, matrices[:count]))


def _sized(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    if len(values) != size:
        raise ValueError(f"{len(values)} numbers for {size}")
    return values


def _matrix_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return _sized(values, 16).reshape(4, 4)


def _translation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, 3] = _sized(values, 3)
    return matrix


def _scaling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.diag([*_sized(values, 3), 1.0])


def _rotation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation by an angle in degrees around an axis: x, y, z, angle."""
    axis = _sized(values, 4)[:3]
    angle = np.radians(values[3])
    length = np.linalg.norm(axis)
    matrix = np.eye(4)
    if length > 0:
        x, y, z = axis / length
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    elif angle != 0:
        raise ValueError("a rotation without axis")
    return matrix


def _skewing(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the skew by an angle in degrees: a vector is moved along one axis by its other part.

    The numbers are the angle, the axis of rotation and the axis of translation.
    """
    angle, around, along = _sized(values, 7)[0], values[1:4], values[4:7]
    length = np.linalg.norm(along)
    if length == 0 or np.linalg.norm(around) == 0:
        raise ValueError("a skew without axis")
    along = along / length
    across = around - (around @ along) * along
    length = np.linalg.norm(across)
    if length == 0:
        raise ValueError("the axes of a skew are parallel")
    matrix = np.eye(4)
    matrix[:3, :3] += np.tan(np.radians(angle)) * np.outer(along, across / length)
    return matrix


def _looking(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the placement of a node at `eye` that looks at `target`, with -z as its direction."""
    eye, target, up = _sized(values, 9).reshape(3, 3)
    back = eye - target
    right = np.cross(up, back)
    if not (np.linalg.norm(back) > 0 and np.linalg.norm(right) > 0):
        raise ValueError("the vectors of a lookat are parallel")
    back = back / np.linalg.norm(back)
    right = right / np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.column_stack([right, np.cross(back, right), back, eye])
    return matrix


_TRANSFORM_MATRICES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "matrix": _matrix_of,
    "translate": _translation,
    "scale": _scaling,
    "rotate": _rotation,
    "skew": _skewing,
    "lookat": _looking,
}
_TRANSFORM_SIZES = {"matrix": 16, "translate": 3, "scale": 3, "rotate": 4, "skew": 7, "lookat": 9}
