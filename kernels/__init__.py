"""Triton kernels and their reference definitions.

`reference` defines the operations of sparse attention in plain torch, `reference_conv` those of the
sparse VAE. Importing this package imports neither torch nor Triton: the module of a public name is
imported when the name is first used.
"""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from kernels.attention import (
        BlockIndex,
        block_mean,
        compressed_attention,
        cross_attention,
        gated_sum,
        reference,
        select_blocks,
        selection_attention,
        spatial_sparse_attention,
        ssa_with_branches,
        window_attention,
    )
    from kernels.conv import (
        ParentVoxels,
        duplicate_children,
        group_norm,
        neighbor_map,
        parent_voxels,
        pool_children,
        sdf_head,
        sparse_conv,
    )
    from kernels.conv import reference as reference_conv
    from kernels.fused import add_norm, mlp, norm
    from kernels.runtime.coords import invert_order, token_order
    from kernels.sdf.distances import FloodBits, GridTriangles, cell_distances, grid_triangles

__all__ = [
    "BlockIndex",
    "FloodBits",
    "GridTriangles",
    "ParentVoxels",
    "add_norm",
    "block_mean",
    "cell_distances",
    "compressed_attention",
    "cross_attention",
    "duplicate_children",
    "gated_sum",
    "grid_triangles",
    "group_norm",
    "invert_order",
    "mlp",
    "neighbor_map",
    "norm",
    "parent_voxels",
    "pool_children",
    "reference",
    "reference_conv",
    "sdf_head",
    "select_blocks",
    "selection_attention",
    "sparse_conv",
    "spatial_sparse_attention",
    "ssa_with_branches",
    "token_order",
    "window_attention",
]

__getattr__ = export_lazily(
    __name__,
    {
        "BlockIndex": "kernels.attention",
        "FloodBits": "kernels.sdf.distances",
        "ParentVoxels": "kernels.conv",
        "GridTriangles": "kernels.sdf.distances",
        "add_norm": "kernels.fused",
        "cell_distances": "kernels.sdf.distances",
        "block_mean": "kernels.attention",
        "compressed_attention": "kernels.attention",
        "cross_attention": "kernels.attention",
        "duplicate_children": "kernels.conv",
        "gated_sum": "kernels.attention",
        "group_norm": "kernels.conv",
        "invert_order": "kernels.runtime.coords",
        "mlp": "kernels.fused",
        "neighbor_map": "kernels.conv",
        "norm": "kernels.fused",
        "grid_triangles": "kernels.sdf.distances",
        "parent_voxels": "kernels.conv",
        "pool_children": "kernels.conv",
        "reference": "kernels.attention.reference:module",
        "reference_conv": "kernels.conv.reference:module",
        "sdf_head": "kernels.conv",
        "select_blocks": "kernels.attention",
        "selection_attention": "kernels.attention",
        "sparse_conv": "kernels.conv",
        "spatial_sparse_attention": "kernels.attention",
        "ssa_with_branches": "kernels.attention",
        "token_order": "kernels.runtime.coords",
        "window_attention": "kernels.attention",
    },
)
