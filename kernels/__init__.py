"""Triton kernels and their reference definitions."""

from kernels import reference
from kernels.attention import spatial_sparse_attention
from kernels.blocks import BlockIndex, invert_order, token_order

__all__ = ["BlockIndex", "invert_order", "reference", "spatial_sparse_attention", "token_order"]
