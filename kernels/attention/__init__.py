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
    from kernels.attention.ssa import spatial_sparse_attention

__all__ = [
    "BlockIndex",
    "block_mean",
    "compressed_attention",
    "gated_sum",
    "select_blocks",
    "selection_attention",
    "spatial_sparse_attention",
    "window_attention",
]

__getattr__ = export_lazily(
    __name__,
    {
        "BlockIndex": "kernels.attention.block_index",
        "block_mean": "kernels.attention.block_mean",
        "compressed_attention": "kernels.attention.branches",
        "gated_sum": "kernels.attention.branches",
        "select_blocks": "kernels.attention.branches",
        "selection_attention": "kernels.attention.branches",
        "spatial_sparse_attention": "kernels.attention.ssa",
        "window_attention": "kernels.attention.branches",
    },
)
