"""Triton kernels and their reference definitions."""

from kernels.attention.block_index import BlockIndex, invert_order, token_order
from kernels.attention.block_mean import block_mean
from kernels.attention.branches import (
    compressed_attention,
    gated_sum,
    select_blocks,
    selection_attention,
    window_attention,
)
from kernels.attention.ssa import reference, spatial_sparse_attention
from kernels.conv import reference as reference_conv
from kernels.conv.group_norm import group_norm
from kernels.conv.neighbors import Parents, neighbor_map, parents
from kernels.conv.pool import pool_children
from kernels.conv.sdf_head import sdf_head
from kernels.conv.sparse_conv import duplicate_children, sparse_conv
from kernels.sdf.distances import Flood, Surface, block_distances, pack_surface

__all__ = [
    "BlockIndex",
    "Flood",
    "Parents",
    "Surface",
    "block_distances",
    "block_mean",
    "compressed_attention",
    "duplicate_children",
    "gated_sum",
    "group_norm",
    "invert_order",
    "neighbor_map",
    "pack_surface",
    "parents",
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
