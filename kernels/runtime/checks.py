"""Argument checks of the public functions: a ValueError names the argument, the rule and the value."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.block_index import BlockIndex

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64, 128)


def check_query(q_NHD: Tensor, index: BlockIndex) -> None:
    if q_NHD.ndim != 3 or q_NHD.shape[0] != index.num_tokens:
        raise ValueError(
            f"q_NHD must be [{index.num_tokens}, H, D] as the index has it, got {list(q_NHD.shape)}"
        )


def check_float(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as q_NHD, got {x.dtype} on {x.device}"
        )


def check_dtype(name: str, x: Tensor) -> None:
    """What Triton kernels take."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {DTYPES}, got {x.dtype}")


def check_head_size(name: str, D: int) -> None:
    if D not in HEAD_SIZES:
        raise ValueError(f"{name} must have a head size in {HEAD_SIZES}, got {D}")


def check_heads(
    q_NHD: Tensor, keys: list[tuple[str, Tensor, int]], index: BlockIndex, on_triton: bool
) -> None:
    """keys: (name, tensor, its rows). Triton kernels ask for more than the reference: dtype, D, H / G, device."""
    check_query(q_NHD, index)
    _, H, D = q_NHD.shape
    G = keys[0][1].shape[1] if keys[0][1].ndim == 3 else 0
    for name, x, rows in keys:
        if x.ndim != 3 or x.shape[0] != rows or x.shape[2] != D or x.shape[1] != G:
            raise ValueError(
                f"{name} must be [{rows}, G, {D}] with one G for all keys and values, got {list(x.shape)}"
            )
        check_float(name, x, q_NHD)
    if G == 0 or H % G:
        raise ValueError(
            f"q_NHD must have a multiple of the {G} key/value heads of {keys[0][0]}, got {H} heads"
        )
    if q_NHD.device != index.device:
        raise ValueError(f"q_NHD must be on the index's device {index.device}, got {q_NHD.device}")
    if not on_triton:
        return
    check_dtype("q_NHD", q_NHD)
    check_head_size("q_NHD", D)
    if H // G not in (1, 2, 4, 8, 16, 32):
        raise ValueError(
            f"q_NHD must have 1, 2, 4, 8, 16 or 32 heads per key/value head, got {H} / {G}"
        )


def check_top_k(top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k must be an int of at least 1, got {top_k!r}")


def check_scale(scale: float | None, D: int) -> float:
    """The scale itself, 1 / sqrt(D) for None."""
    if scale is None:
        return D**-0.5
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def use_triton(backend: str, x: Tensor) -> bool:
    """auto = Triton for CUDA tensors, the reference for others; "triton" on the CPU needs Triton's interpreter."""
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f'backend must be "auto", "triton" or "reference", got {backend!r}')
    return backend == "triton" or (backend == "auto" and x.is_cuda)
