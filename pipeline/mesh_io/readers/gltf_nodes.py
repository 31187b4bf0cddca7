"""Node transforms of glTF files: local and world matrices, and instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.gltf_document import Element

Floats = NDArray[np.float64]
DEFAULT_TRANSFORM = {
    "translation": (0.0, 0.0, 0.0),
    "rotation": (0.0, 0.0, 0.0, 1.0),
    "scale": (1.0, 1.0, 1.0),
}
IDENTITY = tuple(np.eye(4).ravel().tolist())


def local_matrices(nodes: Sequence[Element]) -> list[Floats]:
    """Return the matrix [4, 4] of each node relative to its parent."""
    parts = {
        name: np.array([node.numbers(name, default) for node in nodes]).reshape(-1, len(default))
        for name, default in DEFAULT_TRANSFORM.items()
    }
    matrices = list(transforms(parts["translation"], parts["rotation"], parts["scale"]))
    for number, node in enumerate(nodes):
        if "matrix" not in node.data:
            continue
        if DEFAULT_TRANSFORM.keys() & node.data.keys():
            node.invalid("matrix", "absent where translation, rotation or scale are given")
        values = node.numbers("matrix", IDENTITY)
        matrices[number] = np.array(values).reshape(4, 4).T  # glTF stores matrices by columns
    return matrices


def transforms(translations: Floats, rotations: Floats, scales: Floats) -> Floats:
    """Return matrices [N, 4, 4] that scale, then rotate, then translate.

    Args:
        translations: [N, 3].
        rotations: Quaternions [N, 4] as x, y, z, w, of any length. Zero is no rotation.
        scales: [N, 3].
    """
    length = np.linalg.norm(rotations, axis=1, keepdims=True)
    unit = np.where(length > 0, rotations / np.where(length > 0, length, 1), [0.0, 0.0, 0.0, 1.0])
    x, y, z, w = unit.T
    matrices = np.zeros((len(translations), 4, 4))
    matrices[:, :3, :3] = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    matrices[:, :3, :3] *= scales[:, None, :]
    matrices[:, :3, 3] = translations
    matrices[:, 3, 3] = 1
    return matrices


def world_matrices(local: Sequence[Floats], children: Sequence[Sequence[int]]) -> list[Floats]:
    """Return the matrix [4, 4] of each node relative to the root of its tree, in linear time.

    A node with several parents has the matrix of its first one. Nodes that only a cycle reaches
    keep their local matrix.

    Args:
        local: Matrix of each node relative to its parent.
        children: Children of each node.
    """
    has_parent = {child for group in children for child in group}
    world = list(local)
    visited = [False] * len(local)
    pending = [index for index in range(len(local)) if index not in has_parent]
    for root in pending:
        visited[root] = True
    while pending:
        index = pending.pop()
        for child in children[index]:
            if not visited[child]:
                visited[child] = True
                with np.errstate(over="ignore", invalid="ignore"):  # checked on the vertices
                    world[child] = world[index] @ local[child]
                pending.append(child)
    return world
