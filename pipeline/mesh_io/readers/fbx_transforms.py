"""Transforms of the nodes of FBX files: pivots, orders of rotation, inherited scales and axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.fbx_document import FbxObject
from pipeline.mesh_io.scene import Axis

Floats = NDArray[np.float64]

# RotationOrder: the axes in the order in which they turn an object.
ORDERS = ("xyz", "xzy", "yzx", "yxz", "zxy", "zyx", "xyz")  # the last one, "spheric", is rare
ROTATE_SCALE, INHERIT_BOTH, IGNORE_SCALE = 0, 1, 2  # InheritType RrSs, RSrs, Rrs
ONES = (1.0, 1.0, 1.0)


class Placement:
    """Where a node stands in the scene.

    Attributes:
        matrix: float64 [4, 4], from the node to the scene.
        rotation: float64 [3, 3], the rotations of the node and of those above it.
        scaling: float64 [3, 3], the scaling of the node itself.
    """

    def __init__(self, matrix: Floats, rotation: Floats, scaling: Floats):
        self.matrix = matrix
        self.rotation = rotation
        self.scaling = scaling


def root_placement() -> Placement:
    """Return the placement of the root of the scene."""
    return Placement(np.eye(4), np.eye(3), np.eye(3))


def place(node: FbxObject, parent: Placement) -> Placement:
    """Return the placement of a node.

    The local matrix is T Roff Rp Rpre R Rpost^-1 Rp^-1 Soff Sp S Sp^-1 with the names of the
    format's documentation. Pre- and post-rotation and the order of rotation count unless
    RotationActive is off.
    """
    is_active = node.number("RotationActive", 1) != 0
    is_active &= node.number("RotationSpaceForLimitOnly", 0) == 0
    order = int(node.number("RotationOrder", 0)) if is_active else 0
    rotation = euler(node.vector("Lcl Rotation"), order if 0 <= order < len(ORDERS) else 0)
    if is_active:
        before, after = (euler(node.vector(name)) for name in ("PreRotation", "PostRotation"))
        rotation = before @ rotation @ after.T
    scaling = np.diag(node.vector("Lcl Scaling", ONES))
    pivot, scale_pivot = node.vector("RotationPivot"), node.vector("ScalingPivot")
    # The point 0 of the node through all steps, from right to left.
    point = node.vector("ScalingOffset") + scale_pivot - scaling @ scale_pivot
    point = pivot + rotation @ (point - pivot)
    point = node.vector("Lcl Translation") + node.vector("RotationOffset") + point

    inherit = node.number("InheritType", INHERIT_BOTH)
    above = parent.matrix[:3, :3]
    if inherit == INHERIT_BOTH:
        linear = above @ rotation @ scaling
    else:
        inherited = parent.rotation.T @ above  # the scaling of all nodes above
        if inherit == IGNORE_SCALE:
            inherited = inherited @ np.linalg.pinv(parent.scaling)
        linear = parent.rotation @ rotation @ inherited @ scaling
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = above @ point + parent.matrix[:3, 3]
    return Placement(matrix, parent.rotation @ rotation, scaling)


def geometric_matrix(node: FbxObject) -> Floats:
    """Return the matrix [4, 4] that moves the geometry of a node, but not the nodes below it."""
    matrix = np.eye(4)
    rotation = euler(node.vector("GeometricRotation"))
    matrix[:3, :3] = rotation @ np.diag(node.vector("GeometricScaling", ONES))
    matrix[:3, 3] = node.vector("GeometricTranslation")
    return matrix


def euler(degrees: Floats, order: int = 0) -> Floats:
    """Return the rotation [3, 3] by angles around x, y and z, in an order of `ORDERS`."""
    matrix = np.eye(3)
    for axis in ORDERS[order]:
        index = "xyz".index(axis)
        angle = np.radians(degrees[index])
        turn = np.eye(3)
        first, second = (index + 1) % 3, (index + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


# What `pipeline.mesh_io.assemble` does with an up axis: the rows are x, y and z of the result.
TO_Y_UP: dict[Axis, Floats] = {
    "x": np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


def axes(settings: FbxObject) -> tuple[Axis | None, Floats] | None:
    """Return the axes of a file.

    Returns:
        (up axis, rotation [3, 3] before the up axis is turned to y), with None and the identity if
        the file states no axes, or None if it states impossible ones. After both, x points to the
        right and z to the viewer. A left-handed system is mirrored.
    """
    names = ("CoordAxis", "UpAxis", "FrontAxis")
    if not settings.properties.get("UpAxis"):
        return None, np.eye(3)
    chosen = [int(settings.number(name, fallback)) for name, fallback in zip(names, (0, 1, 2))]
    signs = [settings.number(f"{name}Sign", 1) for name in names]
    if sorted(chosen) != [0, 1, 2] or any(sign not in (1, -1) for sign in signs):
        return None
    turned = np.zeros((3, 3))
    turned[range(3), chosen] = signs
    up: Axis = ("x", "y", "z")[chosen[1]]
    return up, TO_Y_UP[up].T @ turned
