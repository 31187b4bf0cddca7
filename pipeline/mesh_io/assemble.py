"""Make one triangle mesh from a scene: instancing, triangulation, parts, axis and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.schema import MAP_NAMES, Material, Mesh, Part
from pipeline.mesh_io.appearance import AppearanceConverter
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Attribute, Axis, Geometry, Scene, TextureSlot
from pipeline.mesh_io.triangulate import triangulate

MAX_VISITS_PER_INSTANCE = 50  # of nodes, relative to the limit of instances


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One placement of a geometry.

    Attributes:
        geometry: Index in `Scene.geometries`.
        matrix: float64 [4, 4], from the geometry to the scene.
        materials: The materials that the node draws instead, see `Node.materials`.
    """

    geometry: int
    matrix: NDArray[np.float64]
    materials: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class _Triangles:
    """A geometry as triangles, with F faces, V vertices and attributes on the vertices only."""

    vertices: NDArray[np.float64]  # [V, 3]
    faces: NDArray[np.int64]  # [F, 3]
    materials: NDArray[np.int64]  # [F]
    uv: dict[int, NDArray[np.float32]]  # [V, 2] each
    colors: NDArray[np.uint8] | None  # [V, 4]
    normals: NDArray[np.float64] | None  # [V, 3]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The faces of one placed geometry that share a material, in scene coordinates."""

    vertices: NDArray[np.float64]  # [V, 3]
    faces: NDArray[np.int64]  # [F, 3]
    material: Material
    attributes: dict[str, NDArray[Any] | None]  # the arrays of Part by name, [V, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Pieces with equal keys can form one part."""
        missing = (name for name, values in self.attributes.items() if values is None)
        return (id(self.material), *missing)


def assemble(scene: Scene, cfg: LoadConfig, warnings: WarningLog, up: Axis) -> Mesh:
    """Make the triangle mesh of a scene with y up.

    Faces with two equal corners and vertices without faces are dropped. Faces with the same
    appearance form one part.

    Args:
        scene: What a reader returned.
        cfg: Limits of faces, instances and texture size.
        warnings: Receives what is left out.
        up: The axis of the scene that points up.

    Raises:
        Reject: "empty_scene", "points_only", "too_many_faces", "index_out_of_range",
            "non_finite_vertices" or "degenerate".
    """
    instances = place_instances(scene, cfg, warnings)
    drawn = {instance.geometry for instance in instances}
    unplaced = [
        geometry.name or f"geometry {index}"
        for index, geometry in enumerate(scene.geometries)
        if index not in drawn and geometry.num_polygons
    ]
    if unplaced:
        warnings.add("unplaced_geometry", unplaced[0], len(unplaced))
    if not any(scene.geometries[index].num_polygons for index in drawn):
        if scene.points and not unplaced:
            raise Reject("points_only", points=scene.points)
        raise Reject("empty_scene", geometries=len(scene.geometries))

    # Polygons of n corners are n - 2 triangles, with holes somewhat more.
    faces = {
        index: max(
            len(scene.geometries[index].corners) - 2 * scene.geometries[index].num_polygons, 0
        )
        for index in drawn
    }
    total = sum(faces[instance.geometry] for instance in instances)
    if total > cfg.max_faces:
        raise Reject(
            "too_many_faces", faces=total, instances=len(instances), max_faces=cfg.max_faces
        )
    triangles = {index: _to_triangles(scene.geometries[index], warnings) for index in sorted(drawn)}
    if not any(len(geometry.faces) for geometry in triangles.values()):
        codes = {warning.code for warning in warnings.items()}
        reason = "index_out_of_range" if "index_out_of_range" in codes else "degenerate"
        raise Reject(reason, polygons=sum(scene.geometries[i].num_polygons for i in drawn))

    converter = AppearanceConverter(scene, cfg.max_texture_side, warnings)
    pieces = [
        piece
        for instance in instances
        for piece in _place(triangles[instance.geometry], instance, converter)
    ]
    return _join(pieces, up)


def place_instances(scene: Scene, cfg: LoadConfig, warnings: WarningLog) -> list[Instance]:
    """List all placements of geometries in the order of a depth-first walk, in linear time.

    Raises:
        Reject: "too_many_faces" if there are more placements, or far more nodes, than the limit.
    """
    instances: list[Instance] = []
    visits = 0
    on_path = np.zeros(len(scene.nodes), dtype=bool)
    is_visited = np.zeros(len(scene.nodes), dtype=bool)
    # (node, matrix of its parent), and (node, None) when all its descendants are done.
    pending: list[tuple[int, NDArray[np.float64] | None]] = [
        (root, np.eye(4)) for root in reversed(scene.roots)
    ]
    while pending:
        index, parent = pending.pop()
        if parent is None:
            on_path[index] = False
            continue
        node = scene.nodes[index]
        if on_path[index]:
            warnings.add("node_cycle", node.name or f"node {index}")
            continue
        visits += 1
        if not is_visited[index]:
            is_visited[index] = True
            if node.matrix[3, 3] != 1 or node.matrix[3, :3].any():
                detail = f"{node.name or f'node {index}'}: the last row of its matrix"
                warnings.add("invalid_value", detail)
        with np.errstate(over="ignore", invalid="ignore"):  # checked on the vertices
            matrix = parent @ node.matrix
        for geometry in node.geometries:
            instances.append(Instance(geometry=geometry, matrix=matrix, materials=node.materials))
        if len(instances) > cfg.max_instances or visits > (
            len(scene.nodes) + MAX_VISITS_PER_INSTANCE * cfg.max_instances
        ):
            raise Reject(
                "too_many_faces",
                instances=len(instances),
                nodes=visits,
                max_instances=cfg.max_instances,
            )
        on_path[index] = True
        pending.append((index, None))
        pending += [(child, matrix) for child in reversed(node.children)]
    return instances


def _to_triangles(geometry: Geometry, warnings: WarningLog) -> _Triangles:
    """Triangulate a geometry and move its attributes to the vertices."""
    triangles, polygon_of = triangulate(geometry, warnings)
    materials = geometry.materials
    if isinstance(materials, int):
        materials = np.full(geometry.num_polygons, materials)
    uv = {
        name: checked
        for name, attribute in geometry.uv.items()
        if (checked := _checked(geometry, attribute, f"uv {name}", warnings)) is not None
    }
    colors = _checked(geometry, geometry.colors, "colors", warnings)
    normals = _checked(geometry, geometry.normals, "normals", warnings)
    attributes = [attribute for attribute in (*uv.values(), colors, normals) if attribute]

    corners = np.asarray(geometry.corners, dtype=np.int64)
    if all(attribute.domain == "vertex" for attribute in attributes):
        vertices, faces = np.asarray(geometry.positions, dtype=np.float64), corners[triangles]
        used = slice(None)
        if len(vertices) > 2 * faces.size:
            # Many geometries may share one array of vertices. Each takes its own.
            used, faces = _compacted(faces, len(vertices))
            vertices = vertices[used]
        sources = {"vertex": used}
    else:
        # Each corner of a triangle gets a vertex of its own.
        vertices = np.asarray(geometry.positions, dtype=np.float64)[corners[triangles].ravel()]
        faces = np.arange(3 * len(triangles)).reshape(-1, 3)
        sources = {
            "vertex": corners[triangles].ravel(),
            "corner": triangles.ravel(),
            "polygon": np.repeat(polygon_of, 3),
        }

    def on_vertices(attribute: Attribute | None, dtype: Any) -> Any:
        if attribute is None:
            return None
        return np.asarray(attribute.values[sources[attribute.domain]], dtype=dtype)

    def of_faces(attribute: Attribute | None, dtype: Any, name: str) -> Any:
        """Report and return values with NaN where they are not finite."""
        values = on_vertices(attribute, dtype)
        if values is None or np.isfinite(values).all():
            return values
        is_used = np.zeros(len(values), dtype=bool)
        is_used[faces] = True
        is_undefined = is_used & ~np.isfinite(values).all(axis=1)
        detail = f"{geometry.name} {name} that are not finite".strip()
        warnings.add("invalid_value", detail, int(is_undefined.sum()))
        return np.where(np.isfinite(values), values, np.nan)

    return _Triangles(
        vertices=vertices,
        faces=faces,
        materials=np.asarray(materials, dtype=np.int64)[polygon_of],
        uv={
            name: np.nan_to_num(of_faces(item, np.float32, f"uv {name}"))
            for name, item in uv.items()
        },
        colors=on_vertices(colors, np.uint8),
        normals=of_faces(normals, np.float64, "normals"),
    )


def _checked(
    geometry: Geometry, attribute: Attribute | None, name: str, warnings: WarningLog
) -> Attribute | None:
    """Return an attribute if it has a row for each element of its domain, otherwise warn."""
    if attribute is None:
        return None
    expected = {
        "vertex": len(geometry.positions),
        "corner": len(geometry.corners),
        "polygon": geometry.num_polygons,
    }[attribute.domain]
    if len(attribute.values) == expected:
        return attribute
    detail = f"{geometry.name} {name}: {len(attribute.values)} for {expected}".strip()
    warnings.add("attribute_mismatch", detail)
    return None


def _place(
    geometry: _Triangles, instance: Instance, converter: AppearanceConverter
) -> Iterator[_Piece]:
    """Yield the pieces of a placed geometry, one for each of its materials."""
    linear = instance.matrix[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):  # not finite vertices are rejected below
        vertices = geometry.vertices @ linear.T + instance.matrix[:3, 3]
        is_mirrored = np.linalg.det(linear) < 0
        normals = geometry.normals
        if normals is not None:
            normals = np.nan_to_num(normals @ _cofactors(linear).T)

    # the faces of each drawn material
    by_material: dict[int, list[int]] = {}
    for index in map(int, np.unique(geometry.materials)):
        by_material.setdefault(instance.materials.get(index, index), []).append(index)
    for index, sources in sorted(by_material.items()):
        faces = geometry.faces
        chosen = np.isin(geometry.materials, sources)
        if not chosen.all():
            faces = faces[chosen]
        if is_mirrored:
            faces = faces[:, ::-1]
        # Drop faces with two equal corners, then vertices without faces.
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        is_distinct = (a != b).any(axis=1) & (b != c).any(axis=1) & (c != a).any(axis=1)
        used, faces = _compacted(faces[is_distinct], len(vertices))
        is_finite = np.isfinite(vertices[used])
        if not is_finite.all():
            raise Reject("non_finite_vertices", vertices=int((~is_finite).any(axis=1).sum()))
        if not len(faces):
            continue
        appearance = converter.convert(
            index, is_colored=geometry.colors is not None, uv_sets=geometry.uv
        )
        colors = None if geometry.colors is None else geometry.colors[used]
        is_black = colors is not None and not colors[:, :3].any()
        if is_black and appearance.material.texture is not None:
            converter.warnings.add("black_vertex_colors")
        yield _Piece(
            vertices=vertices[used],
            faces=faces,
            material=appearance.material,
            attributes={
                "uv": _uv_of(geometry, appearance.base_slot, used),
                "emissive_uv": _uv_of(geometry, appearance.emissive_slot, used),
                **{
                    f"{name}_uv": _uv_of(geometry, appearance.map_slots.get(name), used)
                    for name in MAP_NAMES
                },
                "colors": colors,
                "normals": None
                if normals is None
                else _normalized(normals[used], vertices[used], faces).astype(np.float32),
            },
        )


def _compacted(faces: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the vertices that faces [F, 3] use, in order, and the faces with their new numbers.

    Args:
        faces: Numbers below `count`.
        count: Number of vertices.
    """
    if count > 4 * faces.size:  # a table of all vertices would cost more than sorting
        used, faces_of_used = np.unique(faces, return_inverse=True)
        return used, faces_of_used.reshape(-1, 3)
    is_used = np.zeros(count, dtype=bool)
    is_used[faces] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[faces]


def _uv_of(
    geometry: _Triangles, slot: TextureSlot | None, used: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """Return the transformed texture coordinates [V, 2] that a slot reads, or None."""
    if slot is None:
        return None
    uv = geometry.uv[slot.uv_set][used]
    if slot.transform is not None:
        uv = (uv @ slot.transform[:, :2].T + slot.transform[:, 2]).astype(np.float32)
    return uv


def _cofactors(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix [3, 3] that transforms normals, up to a positive factor.

    Unlike the inverse transpose it exists for singular matrices too.
    """
    rows = [np.cross(linear[(i + 1) % 3], linear[(i + 2) % 3]) for i in range(3)]
    return np.stack(rows) * (-1 if np.linalg.det(linear) < 0 else 1)


def _normalized(
    normals: NDArray[np.float64], vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scale normals [V, 3] to length 1.

    A vertex whose normal is zero takes that of its faces, weighted by their areas. If they have
    none either, it is (0, 1, 0).
    """
    # Long and short vectors must not overflow when they are squared.
    largest = np.abs(normals).max(axis=1, keepdims=True, initial=0)
    normals = normals / np.where(largest > 0, largest, 1)
    if (largest == 0).any():
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        with np.errstate(over="ignore", invalid="ignore"):
            areas = np.nan_to_num(np.cross(b - a, c - a))
        sums = np.stack(
            [
                np.bincount(faces.ravel(), np.repeat(areas[:, k], 3), len(vertices))
                for k in range(3)
            ],
            axis=1,
        )
        normals = np.where(largest > 0, normals, sums)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 0, normals / np.where(length > 0, length, 1), [0.0, 1.0, 0.0])


def _join(pieces: list[_Piece], up: Axis) -> Mesh:
    """Join all pieces to one mesh with y up.

    Raises:
        Reject: "degenerate" if there are no faces.
    """
    groups: dict[tuple[object, ...], list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.key, []).append(piece)
    if not groups:
        raise Reject("degenerate", faces=0)
    vertices = []
    faces = []
    parts = []
    num_vertices = num_faces = 0
    for group in groups.values():
        first_vertex, first_face = num_vertices, num_faces
        for piece in group:
            vertices.append(piece.vertices)
            faces.append(piece.faces + num_vertices)
            num_vertices += len(piece.vertices)
            num_faces += len(piece.faces)
        joined = {name: _joined(group, name) for name in group[0].attributes}
        joined["normals"] = _to_y_up(joined["normals"], up)
        parts.append(
            Part(
                vertices=slice(first_vertex, num_vertices),
                faces=slice(first_face, num_faces),
                material=group[0].material,
                **joined,
            )
        )
    return Mesh(
        vertices=_to_y_up(np.concatenate(vertices), up),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts),
    )


def _joined(group: list[_Piece], name: str) -> Any:
    """Concatenate an attribute of pieces that all have it or all lack it."""
    arrays = [values for piece in group if (values := piece.attributes[name]) is not None]
    return np.concatenate(arrays) if arrays else None


def _to_y_up(vectors: Any, up: Axis) -> Any:
    """Rotate vectors [N, 3] so that the axis `up` becomes y.

    z up: (x, y, z) becomes (x, z, -y). x up: (x, y, z) becomes (-y, x, z), as COLLADA defines.
    """
    if vectors is None or up == "y":
        return vectors
    order, signs = ([0, 2, 1], [1, 1, -1]) if up == "z" else ([1, 0, 2], [-1, 1, 1])
    return np.ascontiguousarray(vectors[:, order] * np.array(signs, dtype=vectors.dtype))
