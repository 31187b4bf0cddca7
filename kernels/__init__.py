"""Triton kernels and their reference definitions."""

from kernels import reference
from kernels.attention import spatial_sparse_attention
from kernels.blocks import BlockIndex, invert_order, token_order
from kernels.branches import (
    block_mean,
    compressed_attention,
    gated_sum,
    select_blocks,
    selection_attention,
    window_attention,
)

__all__ = [
    "BlockIndex",
    "block_mean",
    "compressed_attention",
    "gated_sum",
    "invert_order",
    "reference",
    "select_blocks",
    "selection_attention",
    "spatial_sparse_attention",
    "token_order",
    "window_attention",
]
