"""Triton kernels and their reference definitions.

`reference` defines the operations of sparse attention in plain torch, `reference_conv` those of the
sparse VAE. Importing this package imports neither torch nor Triton: the module of a public name is
imported when the name is first used.
"""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from kernels.attention import reference
    from kernels.attention.block_index import BlockIndex
    from kernels.attention.block_mean import block_mean
    from kernels.attention.branches import (
        compressed_attention,
        gated_sum,
        select_blocks,
        selection_attention,
        window_attention,
    )
    from kernels.attention.ssa import spatial_sparse_attention
    from kernels.conv import reference as reference_conv
    from kernels.conv.group_norm import group_norm
    from kernels.conv.neighbors import ParentVoxels, neighbor_map, parent_voxels
    from kernels.conv.pool import pool_children
    from kernels.conv.sdf_head import sdf_head
    from kernels.conv.sparse_conv import duplicate_children, sparse_conv
    from kernels.runtime.coords import invert_order, token_order
    from kernels.sdf.distances import FloodBits, GridTriangles, cell_distances, grid_triangles

__all__ = [
    "BlockIndex",
    "FloodBits",
    "GridTriangles",
    "ParentVoxels",
    "block_mean",
    "cell_distances",
    "compressed_attention",
    "duplicate_children",
    "gated_sum",
    "grid_triangles",
    "group_norm",
    "invert_order",
    "neighbor_map",
    "parent_voxels",
    "pool_children",
    "reference",
    "reference_conv",
    "sdf_head",
    "select_blocks",
    "selection_attention",
    "sparse_conv",
    "spatial_sparse_attention",
    "token_order",
    "window_attention",
]

__getattr__ = export_lazily(
    __name__,
    {
        "BlockIndex": "kernels.attention.block_index",
        "FloodBits": "kernels.sdf.distances",
        "ParentVoxels": "kernels.conv.neighbors",
        "GridTriangles": "kernels.sdf.distances",
        "cell_distances": "kernels.sdf.distances",
        "block_mean": "kernels.attention.block_mean",
        "compressed_attention": "kernels.attention.branches",
        "duplicate_children": "kernels.conv.sparse_conv",
        "gated_sum": "kernels.attention.branches",
        "group_norm": "kernels.conv.group_norm",
        "invert_order": "kernels.runtime.coords",
        "neighbor_map": "kernels.conv.neighbors",
        "grid_triangles": "kernels.sdf.distances",
        "parent_voxels": "kernels.conv.neighbors",
        "pool_children": "kernels.conv.pool",
        "reference": "kernels.attention.reference:module",
        "reference_conv": "kernels.conv.reference:module",
        "sdf_head": "kernels.conv.sdf_head",
        "select_blocks": "kernels.attention.branches",
        "selection_attention": "kernels.attention.branches",
        "sparse_conv": "kernels.conv.sparse_conv",
        "spatial_sparse_attention": "kernels.attention.ssa",
        "token_order": "kernels.runtime.coords",
        "window_attention": "kernels.attention.branches",
    },
)
