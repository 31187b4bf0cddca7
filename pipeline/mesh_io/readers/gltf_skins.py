"""Skins of glTF files: the pose in which the nodes of the file stand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.gltf_accessors import Accessors
from pipeline.mesh_io.readers.gltf_document import Element, GltfError

Floats = NDArray[np.float64]


class Pose:
    """The matrices of the joints of a skin, and that of the skinned node.

    Args:
        joints: float64 [J, 4, 4], from the mesh to the scene.
        unskinned: float64 [4, 4], the same for vertices without weights.
    """

    def __init__(self, joints: Floats, unskinned: Floats):
        self.num_joints = len(joints)
        # The last matrix is that of vertices without weights.
        self.matrices = np.concatenate([joints, unskinned[None]])
        rows = [
            np.cross(self.matrices[:, (i + 1) % 3, :3], self.matrices[:, (i + 2) % 3, :3])
            for i in range(3)
        ]
        self.determinants = np.einsum("ji,ji->j", self.matrices[:, 0, :3], rows[0])
        sign = np.where(self.determinants < 0, -1.0, 1.0)
        self.cofactors = np.stack(rows, axis=1) * sign[:, None, None]  # transform normals

    def apply(
        self, positions: Floats, normals: Floats | None, joints: NDArray[np.int64], weights: Floats
    ) -> tuple[Floats, Floats | None, bool]:
        """Move vertices.

        Args:
            positions: [V, 3].
            normals: [V, 3] or None.
            joints: int64 [V, K], the joints that move each vertex. A joint that does not exist has
                no weight.
            weights: [V, K]. They are scaled to the sum 1.

        Returns:
            (positions, normals, is_mirrored): the moved arrays, and whether most vertices are
            mirrored, so that the faces must be reversed.
        """
        exists = (joints >= 0) & (joints < self.num_joints)
        joints, weights = np.where(exists, joints, 0), np.where(exists, weights, 0.0)
        total = weights.sum(axis=1)
        is_bound = total > 0
        joints = np.column_stack([joints, np.full(len(positions), self.num_joints)])
        scale = np.where(is_bound, total, 1.0)[:, None]
        weights = np.column_stack([weights / scale, ~is_bound])

        moved = np.zeros_like(positions)
        turned = None if normals is None else np.zeros_like(normals)
        mirrored = 0.0
        for joint, weight in zip(joints.T, weights.T, strict=True):
            if not weight.any():
                continue
            matrix = self.matrices[joint]
            position = np.einsum("vij,vj->vi", matrix[:, :3, :3], positions) + matrix[:, :3, 3]
            moved += weight[:, None] * position
            if turned is not None and normals is not None:
                normal = np.einsum("vij,vj->vi", self.cofactors[joint], normals)
                turned += weight[:, None] * normal
            mirrored += float(weight[self.determinants[joint] < 0].sum())
        return moved, turned, mirrored > len(positions) / 2


def read_pose(skin: Element, accessors: Accessors, world: list[Floats], unskinned: Floats) -> Pose:
    """Return the pose of a skin.

    Args:
        skin: The skin.
        accessors: Reads the inverse bind matrices.
        world: Matrix [4, 4] of each node relative to the scene.
        unskinned: Matrix of the skinned node, for vertices without weights.

    Raises:
        GltfError: If the skin cannot be read.
    """
    numbers = skin.indices("joints")
    if not numbers or max(numbers) >= len(world):
        raise GltfError(f"{skin.path} names joints that do not exist")
    joints = np.stack([world[number] for number in numbers])
    index = skin.index("inverseBindMatrices")
    if index is not None:
        inverse = accessors.values(index, 16, needs_data=True).reshape(-1, 4, 4)
        if len(inverse) < len(joints):
            raise GltfError(f"{skin.path} has {len(inverse)} matrices for {len(joints)} joints")
        # glTF stores matrices by columns.
        with np.errstate(over="ignore", invalid="ignore"):  # checked on the vertices
            joints = joints @ inverse[: len(joints)].transpose(0, 2, 1)
    return Pose(joints, unskinned)
