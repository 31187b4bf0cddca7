"""Read FBX files, binary and text, of the versions 6 and 7."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import check_face_count
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.fbx_accounting import account
from pipeline.mesh_io.readers.fbx_deformers import with_shapes, with_skin
from pipeline.mesh_io.readers.fbx_document import FbxDocument, FbxObject, read_document
from pipeline.mesh_io.readers.fbx_geometry import FbxMesh, MeshReader
from pipeline.mesh_io.readers.fbx_materials import MaterialReader
from pipeline.mesh_io.readers.fbx_schema import CURVES, LINES
from pipeline.mesh_io.readers.fbx_transforms import (
    Placement,
    axes,
    geometric_matrix,
    place,
    root_placement,
)
from pipeline.mesh_io.readers.fbx_tree import parse_fbx
from pipeline.mesh_io.scene import Axis, Geometry, Node, Scene

CENTIMETRE = 0.01


def read_fbx(content: bytes, context: ReaderContext) -> Scene:
    """Read an FBX file, see `pipeline.mesh_io.reader_context.Reader`.

    The scene shows the file as its nodes stand, before any animation.

    Raises:
        Reject: "unsupported_version", "unreadable", "allocation_bomb" or "too_many_faces".
    """
    file = parse_fbx(content, context.cfg, context.warnings)
    if file.root.first("Objects") is None:
        raise Reject("unreadable", error="no_objects", version=file.version)
    document = read_document(file, context.warnings)
    is_cut = file.root.first("Connections") is None
    if is_cut and any(document.of_kind("Geometry")):  # no node could draw them
        raise Reject("unreadable", error="no_connections", version=file.version)
    account(document)
    with np.errstate(over="ignore", invalid="ignore"):  # the loader checks the vertices
        return _SceneReader(document, context).read()


class _SceneReader:
    """Reads the nodes of one document and what they draw."""

    def __init__(self, document: FbxDocument, context: ReaderContext):
        self.document = document
        self.cfg = context.cfg
        self.warnings = context.warnings
        self.meshes = MeshReader(document)
        self.materials = MaterialReader(document, context.side_files.find, context.side_files.read)
        self.geometries: list[Geometry] = []
        self.nodes: list[Node] = []
        self.placements: dict[int, Placement] = {}  # id() of the node
        self.hidden: set[int] = set()  # id() of the nodes that are not drawn
        self.levels: set[int] = set()  # id() of the nodes of coarser levels of detail
        self.used: set[int] = set()  # id() of the meshes of all nodes
        # (id() of the mesh, its materials): the index in geometries
        self.variants: dict[tuple[int, tuple[tuple[int, int, int], ...]], int] = {}
        self.polygons = 0  # that are placed, for the limit

    def read(self) -> Scene:
        up_axis, turned = self._axes()
        self._place_nodes(turned)
        for item in self.document.of_kind("Model"):
            self._draw(item)
        for item in self.document.of_kind("Geometry"):
            if item.subtype == "Mesh" and id(item) not in self.used:
                self.warnings.add("unplaced_geometry", item.name)
        settings = self.document.settings
        has_unit = bool(settings.properties.get("UnitScaleFactor"))
        unit = CENTIMETRE * settings.number("UnitScaleFactor", 1.0) if has_unit else None
        return Scene(
            geometries=self.geometries,
            nodes=self.nodes,
            roots=list(range(len(self.nodes))),
            materials=self.materials.materials,
            images=self.materials.images,
            up_axis=up_axis,
            metres_per_unit=unit,
        )

    def _axes(self) -> tuple[Axis | None, NDArray[np.float64]]:
        found = axes(self.document.settings)
        if found is None:
            self.warnings.add("invalid_value", "the axes of the global settings")
            return None, np.eye(3)
        return found

    def _place_nodes(self, turned: NDArray[np.float64]) -> None:
        """Compute where each node stands, and whether it is hidden, from the roots down."""
        root = root_placement()
        root.matrix[:3, :3] = turned
        root.rotation = turned
        models = list(self.document.of_kind("Model"))
        parents = {id(item): self._parent(item) for item in models}
        children: dict[int, list[FbxObject]] = {}
        for item in models:
            parent = parents[id(item)]
            children.setdefault(id(parent or self.document.root), []).append(item)
        off = {
            id(member)
            for layer in self.document.of_kind("CollectionExclusive")
            if layer.number("Show", 1) == 0
            for member in layer.all_sources("Model")
        }
        remaining = {id(item): item for item in models}
        # (node, placement of its parent, whether its parent hides it, warn of a hidden node)
        pending = [
            (item, root, False) for item in reversed(children.get(id(self.document.root), []))
        ]
        while remaining:
            if not pending:
                # Only a cycle is left. It is cut at its first node.
                item = next(iter(remaining.values()))
                self.warnings.add("node_cycle", item.name)
                pending = [(item, root, False)]
            item, above, is_hidden = pending.pop()
            if remaining.pop(id(item), None) is None:
                continue
            placement = place(item, above)
            self.placements[id(item)] = placement
            is_hidden = self._is_hidden(item, is_hidden) or id(item) in off
            if is_hidden or item.number("Show", 1) == 0:
                self.hidden.add(id(item))
            below = children.get(id(item), [])
            levels = below[1:] if self._is_lod_group(item) else []
            skipped = {id(level) for level in levels}
            for child in reversed(below):
                if id(child) in skipped:
                    self._skip_level(child, children)
                pending.append((child, placement, is_hidden))

    def _parent(self, item: FbxObject) -> FbxObject | None:
        """Return the node to which a node is connected, None for the root of the scene."""
        targets = [target for target, name in item.targets if target.kind == "Model" and not name]
        if len(targets) > 1:
            self.warnings.add("invalid_value", f"{item.name} has {len(targets)} parents")
        return None if not targets or targets[0] is self.document.root else targets[0]

    def _is_hidden(self, item: FbxObject, parent_is_hidden: bool) -> bool:
        if parent_is_hidden and item.number("Visibility Inheritance", 1) != 0:
            return True
        hidden = item.element.text_of("Hidden").lower() == "true"
        return hidden or item.number("Visibility", 1) == 0

    def _is_lod_group(self, item: FbxObject) -> bool:
        return item.subtype == "LodGroup" or any(item.all_sources("NodeAttribute", "LodGroup"))

    def _skip_level(self, item: FbxObject, children: dict[int, list[FbxObject]]) -> None:
        """Leave out a coarser level of detail. It repeats what the finest one shows."""
        pending = [item]
        visited: set[int] = set()
        while pending:
            node = pending.pop()
            if id(node) in visited:
                continue
            visited.add(id(node))
            self.hidden.add(id(node))
            self.used.update(id(mesh) for mesh in node.all_sources("Geometry"))
            self.levels.add(id(node))
            pending += children.get(id(node), [])

    def _draw(self, item: FbxObject) -> None:
        """Add what a node draws."""
        sources = list(item.all_sources("Geometry"))
        if item.element.first("Vertices", "Points") is not None:  # version 6
            sources.append(item)
        for source in sources:
            self.used.add(id(source))
            if id(item) in self.levels:
                continue
            if id(item) in self.hidden:
                self.warnings.add("hidden_left_out", item.name)
                continue
            if source.subtype in LINES:
                self.warnings.add("lines_left_out", source.name)
            elif source.subtype in CURVES:
                self.warnings.add("curves_left_out", source.name)
            elif source.subtype == "Mesh" or source is item:
                mesh = self.meshes.read(source)
                if mesh is not None:
                    self._place_mesh(item, source, mesh)
            else:
                detail = f"{source.name}: {source.subtype[:40]}"
                self.warnings.add("unsupported_primitive", detail)

    def _place_mesh(self, item: FbxObject, source: FbxObject, mesh: FbxMesh) -> None:
        self.polygons += mesh.geometry.num_polygons
        check_face_count(self.polygons, self.cfg)
        materials, index_of = self._materials(item, mesh)
        owners = [source] if source is item else [source, item]
        world = self.placements[id(item)].matrix
        geometric = geometric_matrix(item)
        shaped = with_shapes(mesh.geometry, self.document, owners)
        posed = with_skin(shaped, self.document, owners, world, geometric, self._matrix_of)
        # Equal meshes with equal materials are one geometry, unless a skin or a shape moves them.
        key = (id(source), materials)
        index = self.variants.get(key) if posed is mesh.geometry else None
        if index is None:
            index = len(self.geometries)
            self.geometries.append(replace(posed, materials=index_of))
            if posed is mesh.geometry:
                self.variants[key] = index
        is_skinned = posed is not shaped
        matrix = world if is_skinned else world @ geometric
        self.nodes.append(Node(matrix=matrix, geometries=(index,), name=item.name))

    def _matrix_of(self, bone: FbxObject) -> NDArray[np.float64] | None:
        placement = self.placements.get(id(bone))
        return None if placement is None else placement.matrix

    def _materials(
        self, item: FbxObject, mesh: FbxMesh
    ) -> tuple[tuple[tuple[int, int, int], ...], NDArray[np.int64]]:
        """Return the materials that a node gives its mesh.

        Returns:
            (slot, texture, material) of all kinds of polygons, and int64 [P], the material of each
            polygon.
        """
        materials = list(item.all_sources("Material"))
        textures = [] if mesh.textures is None else list(item.all_sources("Texture"))
        slots = mesh.slots
        if materials:
            outside = (slots < 0) | (slots >= len(materials))
            self.warnings.add(
                "material_missing",
                f"{item.name}: number {slots[outside][:1]} of {len(materials)}",
                int(outside.sum()),
            )
            slots = np.where(outside, -1, slots)
        else:
            slots = np.full(len(slots), -1)
        texture_of = np.full(len(slots), -1)
        if textures and mesh.textures is not None:
            outside = (mesh.textures < 0) | (mesh.textures >= len(textures))
            texture_of = np.where(outside, -1, mesh.textures)
        pairs, position = np.unique(
            np.column_stack([slots, texture_of]), axis=0, return_inverse=True
        )
        kinds = tuple(
            (
                slot,
                texture,
                self.materials.material(
                    None if slot < 0 else materials[slot],
                    None if texture < 0 else textures[texture],
                    mesh.uv_names,
                ),
            )
            for slot, texture in pairs.tolist()
        )
        found = np.array([kind[2] for kind in kinds], dtype=np.int64)
        return kinds, found[position.ravel()] if len(found) else slots
