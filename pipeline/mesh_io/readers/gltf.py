"""Read glTF 2.0 files: GLB, and JSON with side files or data URIs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.gltf_accessors import Accessors
from pipeline.mesh_io.readers.gltf_accounting import account
from pipeline.mesh_io.readers.gltf_document import Document, Element, GltfError, parse_container
from pipeline.mesh_io.readers.gltf_materials import Materials
from pipeline.mesh_io.readers.gltf_nodes import (
    DEFAULT_TRANSFORM,
    local_matrices,
    transforms,
    world_matrices,
)
from pipeline.mesh_io.readers.gltf_primitives import DRACO, TRIANGLES, Meshes
from pipeline.mesh_io.readers.gltf_skins import Pose, read_pose
from pipeline.mesh_io.scene import Node, Scene

Floats = NDArray[np.float64]
INSTANCING = "EXT_mesh_gpu_instancing"
VISIBILITY = "KHR_node_visibility"
LEVELS_OF_DETAIL = "MSFT_lod"


def read_gltf(content: bytes, context: ReaderContext) -> Scene:
    """Read a glb or gltf file, see `pipeline.mesh_io.reader_context.Reader`.

    The scene shows the file as its nodes stand, before any animation. Skinned and instanced meshes
    hang at nodes of their own.

    Raises:
        Reject: "gltf_1", "unreadable", "allocation_bomb" or "too_many_faces".
    """
    document = parse_container(content, context.warnings)
    account(document)
    return _SceneReader(document, len(content), context).read()


class _SceneReader:
    """Reads the nodes of one document and what they draw."""

    def __init__(self, document: Document, content_bytes: int, context: ReaderContext):
        self.document = document
        self.context = context
        self.warnings = context.warnings
        self.accessors = Accessors(document, content_bytes, context)
        self.materials = Materials(document, self.accessors)
        self.meshes = Meshes(document, self.accessors, self.materials)

        count = document.count("nodes")
        self.elements = [self._element(index) for index in range(count)]
        self.children = [self._children(index) for index in range(count)]
        self.local = local_matrices(self.elements)
        self.world: list[Floats] | None = None  # computed for skins only
        self.hidden: set[int] = set()

    def read(self) -> Scene:
        roots = self._roots()
        drawn = self._visible_nodes(roots)
        self._check_limits(drawn)
        self._warn_unplaced(drawn)
        nodes = [
            Node(matrix=matrix, name=element.name)
            for matrix, element in zip(self.local, self.elements, strict=True)
        ]
        for index in drawn:
            geometries: tuple[int, ...] = ()
            placements: list[int] = []
            if self.elements[index].index("mesh") is not None:
                geometries, placements = self._place(index, nodes, roots)
            children = [child for child in self.children[index] if child in drawn]
            nodes[index] = replace(
                nodes[index], geometries=geometries, children=(*children, *placements)
            )
        if self.meshes.errors and not self.meshes.geometries:
            raise Reject(
                "unreadable",
                error="no_primitive",
                primitives=len(self.meshes.errors),
                message=self.meshes.errors[0][:120],
            )
        return Scene(
            geometries=self.meshes.geometries,
            nodes=nodes,
            roots=roots,
            materials=self.materials.materials,
            images=self.materials.images,
            up_axis="y",
            metres_per_unit=1.0,
            points=self.meshes.points,
        )

    def _place(
        self, index: int, nodes: list[Node], roots: list[int]
    ) -> tuple[tuple[int, ...], list[int]]:
        """Return what a node draws itself, and the nodes that are added below it for instances.

        The joints place a skinned mesh, and not the transform of its node. It gets a new root.
        """
        element = self.elements[index]
        geometries, pose = self._geometries(index)
        instances = self._instances(element)
        if pose is not None:
            if instances is not None:
                self.warnings.add("invalid_value", f"{element.path}: instances of a skinned mesh")
            roots.append(len(nodes))
            nodes.append(Node(geometries=geometries, name=element.name))
            return (), []
        if instances is None or not geometries:
            return geometries, []
        first = len(nodes)
        nodes += [
            Node(matrix=matrix, geometries=geometries, name=element.name) for matrix in instances
        ]
        return (), list(range(first, len(nodes)))

    def _element(self, index: int) -> Element:
        try:
            return self.document.element("nodes", index)
        except GltfError as error:
            self.warnings.add("invalid_value", str(error))
            return Element(data={}, path=f"nodes[{index}]", warnings=self.warnings)

    def _children(self, index: int) -> list[int]:
        """Return the children of a node that exist, each once."""
        element = self.elements[index]
        children = list(dict.fromkeys(element.indices("children")))
        existing = [child for child in children if child < len(self.elements)]
        if len(existing) < len(element.values("children")):
            element.invalid("children", "nodes that exist, each once")
        return existing

    def _roots(self) -> list[int]:
        """Return the roots of the scene that is drawn.

        It is the default scene, otherwise the first. A file without scenes shows all its nodes.
        """
        if not self.document.count("scenes"):
            has_parent = {child for group in self.children for child in group}
            return [index for index in range(len(self.elements)) if index not in has_parent]
        index = self.document.root.index("scene") or 0
        try:
            scene = self.document.element("scenes", index)
        except GltfError as error:
            self.warnings.add("invalid_value", f"scene: {error}")
            scene = self.document.root.children("scenes")[0]
        roots = list(dict.fromkeys(scene.indices("nodes")))
        existing = [root for root in roots if root < len(self.elements)]
        if len(existing) < len(scene.values("nodes")):
            scene.invalid("nodes", "nodes that exist, each once")
        return existing

    def _visible_nodes(self, roots: list[int]) -> dict[int, None]:
        """Return the nodes that are reached from the roots and not hidden, in depth-first order."""
        visible: dict[int, None] = {}
        pending = list(reversed(roots))
        while pending:
            index = pending.pop()
            if index in visible or index in self.hidden:
                continue
            visibility = self.elements[index].extension(VISIBILITY)
            if visibility is not None and not visibility.flag("visible", True):
                self.hidden.add(index)
                self.warnings.add("hidden_left_out", self.elements[index].name)
                continue
            visible[index] = None
            pending += reversed(self.children[index])
        return visible

    def _check_limits(self, drawn: dict[int, None]) -> None:
        """Compare what the document claims with the limits before anything is read.

        Raises:
            Reject: "too_many_faces".
        """
        faces = placed = 0
        faces_of_mesh: dict[int, tuple[int, int]] = {}
        for index in drawn:
            mesh = self.elements[index].index("mesh")
            if mesh is None:
                continue
            if mesh not in faces_of_mesh:
                faces_of_mesh[mesh] = self._count_faces(mesh)
            instances = self._instance_count(self.elements[index])
            faces += faces_of_mesh[mesh][0] * instances
            placed += faces_of_mesh[mesh][1] * instances
        cfg = self.context.cfg
        if placed > cfg.max_instances or faces > cfg.max_faces:
            raise Reject(
                "too_many_faces",
                faces=faces,
                instances=placed,
                max_faces=cfg.max_faces,
                max_instances=cfg.max_instances,
            )

    def _count_faces(self, index: int) -> tuple[int, int]:
        """Return the numbers of triangles and of primitives that a mesh claims."""
        try:
            primitives = self.document.element("meshes", index).children("primitives")
        except GltfError:
            return 0, 0
        faces = 0
        for primitive in primitives:
            attributes = primitive.child("attributes")
            counted = primitive.index("indices") if "indices" in primitive.data else None
            counted = attributes.index("POSITION") if counted is None else counted
            mode = primitive.index("mode")
            mode = TRIANGLES if mode is None else mode
            if counted is None or mode < TRIANGLES:
                continue
            try:
                corners = self.accessors.count(counted)
            except GltfError:
                continue
            is_list = mode == TRIANGLES or primitive.extension(DRACO) is not None
            faces += corners // 3 if is_list else max(corners - 2, 0)
        return faces, len(primitives)

    def _instance_count(self, element: Element) -> int:
        """Return the number of instances of a node's mesh that the document claims."""
        extension = element.extension(INSTANCING)
        if extension is None:
            return 1
        counts = []
        attributes = extension.child("attributes")
        for name in attributes.data:
            index = attributes.index(name)
            try:
                counts.append(0 if index is None else self.accessors.count(index))
            except GltfError:
                continue
        return max(counts, default=1)

    def _warn_unplaced(self, drawn: dict[int, None]) -> None:
        """Record the meshes that the drawn scene does not show."""
        # Hidden nodes have a warning of their own, and lower levels of detail repeat the first.
        expected = set(self.hidden)
        for element in self.elements:
            extension = element.extension(LEVELS_OF_DETAIL)
            if extension is not None:
                expected.update(
                    level for level in extension.indices("ids") if level < len(self.elements)
                )
        pending = list(expected)
        while pending:
            new = [child for child in self.children[pending.pop()] if child not in expected]
            expected.update(new)
            pending += new
        referenced = set()
        for index, element in enumerate(self.elements):
            mesh = element.index("mesh")
            referenced.add(mesh)
            if mesh is not None and index not in drawn and index not in expected:
                self.warnings.add("unplaced_geometry", element.name)
        for mesh in range(self.document.count("meshes")):
            if mesh not in referenced:
                self.warnings.add("unplaced_geometry", f"meshes[{mesh}]")

    def _geometries(self, index: int) -> tuple[tuple[int, ...], Pose | None]:
        """Return the geometries of a node's mesh, and the pose if a skin moves them."""
        element = self.elements[index]
        mesh = element.index("mesh")
        assert mesh is not None
        weights = element.numbers("weights") if "weights" in element.data else None
        pose = self._pose(index)
        try:
            return self.meshes.read(mesh, weights, pose), pose
        except GltfError as error:
            self.warnings.add("invalid_value", f"{element.path}.mesh: {error}")
            return (), None

    def _pose(self, index: int) -> Pose | None:
        """Return the pose of the skin of a node, None if it has no skin that can be read."""
        element = self.elements[index]
        skin = element.index("skin")
        if skin is None:
            return None
        if self.world is None:
            self.world = world_matrices(self.local, self.children)
        try:
            skin_element = self.document.element("skins", skin)
            return read_pose(skin_element, self.accessors, self.world, self.world[index])
        except GltfError as error:
            self.warnings.add("skin_unreadable", f"{element.path}: {error}")
            return None

    def _instances(self, element: Element) -> Floats | None:
        """Return the matrices [N, 4, 4] of EXT_mesh_gpu_instancing, None without instances."""
        extension = element.extension(INSTANCING)
        if extension is None:
            return None
        attributes = extension.child("attributes")
        values = {}
        for key, default in DEFAULT_TRANSFORM.items():
            name = key.upper()
            index = attributes.index(name)
            if index is None:
                continue
            try:
                values[name] = self.accessors.values(index, len(default))
            except GltfError as error:
                self.warnings.add("invalid_value", f"{attributes.path}.{name}: {error}")
        if not values:
            self.warnings.add("invalid_value", f"{attributes.path} has no transforms")
            return None
        counts = {len(array) for array in values.values()}
        if len(counts) > 1:
            self.warnings.add("count_mismatch", f"{attributes.path}: {sorted(counts)}")
        count = min(counts)

        def column(name: str) -> Floats:
            default = DEFAULT_TRANSFORM[name.lower()]
            return values[name][:count] if name in values else np.tile(default, (count, 1))

        return transforms(column("TRANSLATION"), column("ROTATION"), column("SCALE"))
