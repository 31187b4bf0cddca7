"""Spatial sparse attention: block index, kernels, and their reference definitions."""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from kernels.attention.block_index import BlockIndex
    from kernels.attention.block_mean import block_mean
    from kernels.attention.branches import (
        compressed_attention,
        gated_sum,
        select_blocks,
        selection_attention,
        window_attention,
    )
    from kernels.attention.cross_attention import cross_attention
    from kernels.attention.ssa import spatial_sparse_attention, ssa_with_branches

__all__ = [
    "BlockIndex",
    "block_mean",
    "compressed_attention",
    "cross_attention",
    "gated_sum",
    "select_blocks",
    "selection_attention",
    "spatial_sparse_attention",
    "ssa_with_branches",
    "window_attention",
]

__getattr__ = export_lazily(
    __name__,
    {
        "BlockIndex": "kernels.attention.block_index",
        "block_mean": "kernels.attention.block_mean",
        "compressed_attention": "kernels.attention.branches",
        "cross_attention": "kernels.attention.cross_attention",
        "gated_sum": "kernels.attention.branches",
        "select_blocks": "kernels.attention.branches",
        "selection_attention": "kernels.attention.branches",
        "spatial_sparse_attention": "kernels.attention.ssa",
        "ssa_with_branches": "kernels.attention.ssa",
        "window_attention": "kernels.attention.branches",
    },
)
