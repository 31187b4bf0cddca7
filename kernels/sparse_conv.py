"""Submanifold 3^3 convolution over single voxels or over full blocks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference_conv

SIZES = (1, 2, 4, 8)


def check_neighbors(neighbors_M27: Tensor, x_NC: Tensor) -> None:
    if neighbors_M27.ndim != 2 or neighbors_M27.shape[1] != 27 or neighbors_M27.dtype != torch.int32:
        raise ValueError(f"neighbors_M27 must be int32 [M, 27], got {neighbors_M27.dtype} {list(neighbors_M27.shape)}")
    if neighbors_M27.device != x_NC.device:
        raise ValueError(f"neighbors_M27 must be on x_NC's device {x_NC.device}, got {neighbors_M27.device}")


def _check(x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample) -> None:
    check_neighbors(neighbors_M27, x_NC)
    if size not in SIZES or (upsample and size == 1):
        raise ValueError(f"size must be one of {SIZES[1:] if upsample else SIZES}, got {size!r}")
    rows = len(neighbors_M27) * (size // 2 if upsample else size) ** 3
    if x_NC.ndim != 2 or len(x_NC) != rows or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [{rows}, C], got {x_NC.dtype} {list(x_NC.shape)}")
    C = x_NC.shape[1]
    if weight_27CO.ndim != 3 or weight_27CO.shape[:2] != (27, C):
        raise ValueError(f"weight_27CO must be [27, {C}, O], got {list(weight_27CO.shape)}")
    if bias_O is not None and bias_O.shape != weight_27CO.shape[2:]:
        raise ValueError(f"bias_O must be [{weight_27CO.shape[2]}], got {list(bias_O.shape)}")
    for name, w in (("weight_27CO", weight_27CO), ("bias_O", bias_O)):
        if w is not None and w.device != x_NC.device:
            raise ValueError(f"{name} must be on x_NC's device {x_NC.device}, got {w.device}")
        if w is not None and w.dtype not in (x_NC.dtype, torch.float32):
            raise ValueError(f"{name} must be {x_NC.dtype} as x_NC or torch.float32, got {w.dtype}")


def sparse_conv(
    x_NC: Tensor,
    weight_27CO: Tensor,
    bias_O: Tensor | None,
    neighbors_M27: Tensor,
    *,
    size: int = 1,
    upsample: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolution with 3^3 taps at the voxels there are, absent ones counting as zero: [M * size^3, O] in x's dtype.

    size 1: a row is a voxel and neighbors_M27 (`neighbor_map`) holds the rows around it. size 2, 4 or 8: rows are full
    blocks, voxel (lx, ly, lz) of block m in row m * size^3 + (lx * size + ly) * size + lz, and neighbors_M27 is that of
    the blocks. upsample: x holds blocks of (size / 2)^3 whose voxels each stand for their 8 children; the result is
    that of the convolution after `duplicate_children`, from 8 taps a child instead of 27.

    x [N, C]; weight [27, C, O], tap (dx + 1) * 9 + (dy + 1) * 3 + dz + 1 multiplies the voxel at +(dx, dy, dz); weight
    and bias in x's dtype or float32. Under autocast x is cast to its dtype. Sums in fp32; taps are summed in fp32
    before they are rounded. Differentiable in x, weight and bias. ValueError for other shapes, dtypes or devices.
    """
    device_type = x_NC.device.type
    if torch.is_autocast_enabled(device_type) and x_NC.dtype != torch.float64:
        x_NC = x_NC.to(torch.get_autocast_dtype(device_type))
    _check(x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample)
    if backend not in ("auto", "reference"):
        raise ValueError(f'backend must be "auto" or "reference", got {backend!r}')
    with torch.autocast(device_type, enabled=False):
        return reference_conv.sparse_conv(x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample)


def duplicate_children(x_NC: Tensor, size: int) -> Tensor:
    """Rows of full blocks of (size / 2)^3 -> [8 * N, C], rows of blocks of size^3: every voxel becomes its 8 children.

    ValueError if size is not 2, 4 or 8 or the rows are not whole blocks.
    """
    if size not in SIZES[1:]:
        raise ValueError(f"size must be one of {SIZES[1:]}, got {size!r}")
    if x_NC.ndim != 2 or len(x_NC) % (size // 2) ** 3:
        raise ValueError(f"x_NC must be [M * {(size // 2) ** 3}, C], got {list(x_NC.shape)}")
    return reference_conv.duplicate_children(x_NC, size)
