"""Sparse convolution, pooling and normalisation, and their reference definitions."""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from kernels.conv.group_norm import group_norm
    from kernels.conv.neighbors import ParentVoxels, neighbor_map, parent_voxels
    from kernels.conv.pool import pool_children
    from kernels.conv.sdf_head import sdf_head
    from kernels.conv.sparse_conv import duplicate_children, sparse_conv

__all__ = [
    "ParentVoxels",
    "duplicate_children",
    "group_norm",
    "neighbor_map",
    "parent_voxels",
    "pool_children",
    "sdf_head",
    "sparse_conv",
]

__getattr__ = export_lazily(
    __name__,
    {
        "ParentVoxels": "kernels.conv.neighbors",
        "duplicate_children": "kernels.conv.sparse_conv",
        "group_norm": "kernels.conv.group_norm",
        "neighbor_map": "kernels.conv.neighbors",
        "parent_voxels": "kernels.conv.neighbors",
        "pool_children": "kernels.conv.pool",
        "sdf_head": "kernels.conv.sdf_head",
        "sparse_conv": "kernels.conv.sparse_conv",
    },
)
