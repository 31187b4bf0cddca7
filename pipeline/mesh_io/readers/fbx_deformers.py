"""Blend shapes and skins of FBX files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.collada_controllers import Skin, with_matrices
from pipeline.mesh_io.readers.fbx_document import FbxDocument, FbxObject
from pipeline.mesh_io.readers.fbx_tree import FbxElement
from pipeline.mesh_io.scene import Geometry

Floats = NDArray[np.float64]
DRAWN_DEFORMERS = ("Skin", "BlendShape")


class DeformerError(ValueError):
    """A deformer cannot be read."""


def deformers(owners: Sequence[FbxObject], subtype: str) -> list[FbxObject]:
    """Return the deformers of a kind that are connected to a mesh or its node, each once."""
    connected = (item for owner in owners for item in owner.all_sources("Deformer", subtype))
    return list({id(item): item for item in connected}.values())


def with_shapes(geometry: Geometry, document: FbxDocument, owners: Sequence[FbxObject]) -> Geometry:
    """Return a mesh with its blend shapes at the weights that the file states.

    Args:
        geometry: The mesh.
        document: The document.
        owners: The objects to which its deformers are connected. In version 6 the last one holds
            the shapes itself.

    Warnings are "morph_unreadable".
    """
    moved: Floats | None = None
    for shape, weight in _weighted_shapes(document, owners):
        if not weight.any():
            continue
        try:
            indices, offsets = _offsets(shape, document, len(geometry.positions))
        except DeformerError as error:
            document.warnings.add("morph_unreadable", f"{geometry.name}: {error}")
            continue
        if weight.ndim and len(weight) != len(offsets):
            detail = f"{geometry.name}: {len(weight)} weights for {len(offsets)} vertices"
            document.warnings.add("morph_unreadable", detail)
            continue
        moved = geometry.positions.copy() if moved is None else moved
        np.add.at(moved, indices, weight.reshape(-1, 1) * offsets)
    # The stored normals are those of the mesh without shapes.
    return geometry if moved is None else replace(geometry, positions=moved, normals=None)


def _weighted_shapes(
    document: FbxDocument, owners: Sequence[FbxObject]
) -> list[tuple[FbxElement, Floats]]:
    """Return the shapes of a mesh with their weights: one number, or one for each moved vertex."""
    shapes: list[tuple[FbxElement, Floats]] = []
    for deformer in deformers(owners, "BlendShape"):
        for channel in deformer.all_sources("Deformer", "BlendShapeChannel"):
            field = channel.element.first("DeformPercent")
            stated = 0.0 if field is None else field.number()
            weight = channel.number("DeformPercent", stated) / 100
            targets = [shape.element for shape in channel.all_sources("Geometry", "Shape")]
            full = document.numbers(channel.element.first("FullWeights")) / 100
            if len(targets) == 1 and len(full) > 1:
                shapes.append((targets[0], weight * full))  # Blender weights each vertex
            elif targets:
                ends = full.tolist() if len(full) == len(targets) else None
                weights = channel_weights(weight, len(targets), ends)
                shapes += [(shape, np.array(w)) for shape, w in zip(targets, weights)]
    for owner in owners:
        # Version 6: the shape lies in the mesh, and a property of the node has its weight.
        for shape in owner.element.all("Shape"):
            shapes.append((shape, np.array(owner.number(shape.text(), 0.0) / 100)))
    return shapes


def channel_weights(weight: float, count: int, ends: list[float] | None) -> list[float]:
    """Return the weights of the shapes of a channel, which follow each other as it grows.

    Args:
        weight: The state of the channel. The mesh itself is at 0.
        count: Number of shapes, at least one.
        ends: The states in which each shape alone is drawn. None spaces them evenly up to 1.
    """
    if ends is None:
        ends = [(k + 1) / count for k in range(count)]
    side = [k for k in range(count) if ends[k] * weight > 0]
    if not side:  # the nearest shape of the other side is continued through 0
        side = sorted(range(count), key=lambda k: abs(ends[k]))[:1]
    side.sort(key=lambda k: abs(ends[k]))
    weights = [0.0] * count
    # The segment that holds the weight. The last one is continued.
    following = next((n for n, k in enumerate(side) if abs(ends[k]) > abs(weight)), len(side) - 1)
    before = ends[side[following - 1]] if following else 0.0
    length = ends[side[following]] - before
    if length:
        share = (weight - before) / length
        weights[side[following]] = share
        if following:
            weights[side[following - 1]] = 1 - share
    return weights


def _offsets(
    shape: FbxElement, document: FbxDocument, count: int
) -> tuple[NDArray[np.int64], Floats]:
    """Return the vertices that a shape moves, and their offsets [N, 3]."""
    indices = document.numbers(shape.first("Indexes"), np.int64)
    values = document.numbers(shape.first("Vertices"))
    offsets = np.array(values[: len(values) // 3 * 3], dtype=np.float64).reshape(-1, 3)
    if len(indices) != len(offsets):
        raise DeformerError(f"{len(offsets)} offsets for {len(indices)} vertices")
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise DeformerError(f"vertex {indices.max()} of {count}")
    return indices.astype(np.int64), offsets


def with_skin(
    geometry: Geometry,
    document: FbxDocument,
    owners: Sequence[FbxObject],
    world: Floats,
    geometric: Floats,
    matrix_of: Callable[[FbxObject], Floats | None],
) -> Geometry:
    """Return a mesh in the pose in which the bones of its skin stand.

    Args:
        geometry: The mesh in its own coordinates.
        document: The document.
        owners: The objects to which its deformers are connected.
        world: Matrix [4, 4] that places the result in the scene.
        geometric: Matrix [4, 4] from the mesh to its node.
        matrix_of: Returns the matrix from a bone to the scene, None if it does not stand in it.

    Warnings are "skin_unreadable".
    """
    skins = deformers(owners, "Skin")
    document.warnings.add("skin_unreadable", f"{geometry.name}: a second skin", len(skins) - 1)
    if not skins:
        return geometry
    try:
        matrices = _skin_matrices(
            skins[0], document, len(geometry.positions), world, geometric, matrix_of
        )
    except DeformerError as error:
        document.warnings.add("skin_unreadable", f"{geometry.name}: {error}")
        return geometry
    return geometry if matrices is None else with_matrices(geometry, matrices)


def _skin_matrices(
    skin: FbxObject,
    document: FbxDocument,
    count: int,
    world: Floats,
    geometric: Floats,
    matrix_of: Callable[[FbxObject], Floats | None],
) -> Floats | None:
    """Return the matrix [4, 4] of each vertex relative to the placed mesh, None without weights."""
    try:
        to_mesh = np.linalg.inv(world)
    except np.linalg.LinAlgError as error:
        raise DeformerError("its node has no inverse matrix") from error
    names, bones, vertices, joints, weights = [], [], [], [], []
    for cluster in skin.all_sources("Deformer", "Cluster"):
        element = cluster.element
        indices = document.numbers(element.first("Indexes"), np.int64).astype(np.int64)
        values = document.numbers(element.first("Weights")).astype(np.float64)
        if len(indices) != len(values):
            raise DeformerError(f"{len(values)} weights for {len(indices)} vertices")
        if not len(indices):
            continue
        if indices.min() < 0 or indices.max() >= count:
            outside = (indices < 0) | (indices >= count)
            document.warnings.add(
                "skin_unreadable", f"{cluster.name}: vertices", int(outside.sum())
            )
            indices, values = indices[~outside], values[~outside]
        if element.text_of("Mode") == "Additive":
            document.warnings.add("skin_unreadable", f"{cluster.name}: additive weights")
        stored = document.numbers(element.first("Transform"))
        bone = next(iter(cluster.all_sources("Model")), None)
        matrix = None if bone is None else matrix_of(bone)
        if matrix is None:
            raise DeformerError(f"{cluster.name} has no bone")
        if len(stored) != 16 or not np.isfinite(stored).all():
            raise DeformerError(f"{cluster.name} has no matrix")
        # Matrices are stored by columns.
        to_bone = np.asarray(stored, dtype=np.float64).reshape(4, 4).T
        names.append(cluster.name)
        with np.errstate(over="ignore", invalid="ignore"):  # checked on the vertices
            bones.append(to_mesh @ matrix @ to_bone @ geometric)
        vertices.append(indices)
        joints.append(np.full(len(indices), len(names) - 1))
        is_finite = np.isfinite(values)
        document.warnings.add(
            "invalid_value", f"{cluster.name}: weights that are not finite", int((~is_finite).sum())
        )
        weights.append(np.where(is_finite, values, 0))
    if not bones:
        return None
    method = skin.element.text_of("SkinningType")
    if method not in ("", "Linear", "Rigid") and not np.allclose(bones, bones[0]):
        document.warnings.add("skin_approximated", f"{skin.name}: {method}")
    parts = Skin(
        joints=names,
        inverse_bind=np.broadcast_to(np.eye(4), (len(bones), 4, 4)),
        bind_shape=np.eye(4),
        vertices=np.concatenate(vertices),
        joint_of=np.concatenate(joints),
        weights=np.concatenate(weights),
    )
    matrices = parts.matrices(np.stack(bones), count)
    unbound = np.bincount(parts.vertices, weights=parts.weights, minlength=count) == 0
    matrices[unbound] = geometric
    return matrices
