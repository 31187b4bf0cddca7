"""Argument checks that public functions share. Errors name the argument, the rule and the value."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the Triton kernels accept."""


def check_same_type(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless `x` has the dtype and the device of `like`."""
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as {like_name}, "
            f"got {x.dtype} on {x.device}"
        )


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError unless the Triton kernels accept the dtype of `x`."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {DTYPES}, got {x.dtype}")


def check_float_rows(name: str, x: Tensor, rows: int | None = None) -> None:
    """Raise ValueError unless `x` is floating [rows, C], or floating [N, C] where rows is None."""
    if x.ndim != 2 or not x.is_floating_point() or (rows is not None and len(x) != rows):
        shape = f"[{'N' if rows is None else rows}, C]"
        raise ValueError(f"{name} must be floating {shape}, got {x.dtype} {list(x.shape)}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless `x` is on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {x.device}")


def check_parameter_dtype(name: str, parameter: Tensor, x_name: str, x: Tensor) -> None:
    """Raise ValueError unless `parameter` has the dtype of `x` or is float32."""
    if parameter.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{name} must be {x.dtype} as {x_name} or torch.float32, got {parameter.dtype}"
        )


def use_triton(backend: str, x: Tensor) -> bool:
    """Return whether a public function runs its Triton kernels on `x`.

    Args:
        backend: "auto" takes Triton for CUDA tensors and the reference for others. "triton" works
            on CPU tensors only in Triton's interpreter. "reference" takes the torch definition.
        x: The main input of the function.

    Raises:
        ValueError: If `backend` is none of the three.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f'backend must be "auto", "triton" or "reference", got {backend!r}')
    return backend == "triton" or (backend == "auto" and x.is_cuda)
