"""Fused operations of transformer blocks on ragged batches, and their reference definitions."""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from kernels.fused.add_norm import add_norm, norm
    from kernels.fused.mlp import mlp

__all__ = ["add_norm", "mlp", "norm"]

__getattr__ = export_lazily(
    __name__,
    {
        "add_norm": "kernels.fused.add_norm",
        "mlp": "kernels.fused.mlp",
        "norm": "kernels.fused.add_norm",
    },
)
