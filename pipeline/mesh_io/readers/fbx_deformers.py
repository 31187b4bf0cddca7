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
        if not weight:
            continue
        try:
            indices, offsets = _offsets(shape, document, len(geometry.positions))
        except DeformerError as error:
            document.warnings.add("morph_unreadable", f"{geometry.name}: {error}")
            continue
        moved = geometry.positions.copy() if moved is None else moved
        np.add.at(moved, indices, weight * offsets)
    # The stored normals are those of the mesh without shapes.
    return geometry if moved is None else replace(geometry, positions=moved, normals=None)


def _weighted_shapes(
    document: FbxDocument, owners: Sequence[FbxObject]
) -> list[tuple[FbxElement, float]]:
    """Return the shapes of a mesh with their weights."""
    shapes: list[tuple[FbxElement, float]] = []
    for deformer in deformers(owners, "BlendShape"):
        for channel in deformer.all_sources("Deformer", "BlendShapeChannel"):
            field = channel.element.first("DeformPercent")
            stated = 0.0 if field is None else field.number()
            percent = channel.number("DeformPercent", stated)
            targets = [shape.element for shape in channel.all_sources("Geometry", "Shape")]
            ends = document.numbers(channel.element.first("FullWeights")).tolist()
            shapes += zip(targets, _blended(percent, len(targets), ends), strict=True)
    for owner in owners:
        # Version 6: the shape lies in the mesh, and a property of the node has its weight.
        for shape in owner.element.all("Shape"):
            shapes.append((shape, owner.number(shape.text(), 0.0) / 100))
    return shapes


def _blended(percent: float, count: int, ends: list[float]) -> list[float]:
    """Return the weights of the shapes of a channel, which follow each other as it grows.

    Args:
        percent: The state of the channel.
        count: Number of shapes.
        ends: The states in which each shape alone is drawn.
    """
    if count <= 1:
        return [percent / 100.0] * count
    if len(ends) != count:
        ends = [100.0 * (k + 1) / count for k in range(count)]
    stops = [0.0, *ends]
    weights = [0.0] * count
    for k in range(count):
        low, high = stops[k], stops[k + 1]
        is_last = k == count - 1
        if low <= percent <= high or (is_last and percent > high):
            share = (percent - low) / (high - low) if high > low else 1.0
            weights[k] = share
            if k:
                weights[k - 1] = 1 - share
            break
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
        weights.append(np.nan_to_num(values))
    if not bones:
        return None
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
