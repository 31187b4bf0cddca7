"""GroupNorm with the statistics of each asset's rows, and SiLU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference_conv


def group_norm(
    x_NC: Tensor,
    asset_starts_A1: Tensor,
    groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Normalises each asset's groups of C / groups channels over all its rows: [N, C] -> [N, C] in x's dtype.

    Asset a has rows asset_starts[a]:asset_starts[a + 1] (int32 on x's device, ascending from 0 to N; may be empty);
    its statistics are taken in fp32 at least, with the biased variance, as torch's GroupNorm. weight and bias in x's
    dtype or float32. silu applies SiLU to the result. Differentiable in x, weight and bias. ValueError for other
    shapes, dtypes or devices.
    """
    if x_NC.ndim != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [N, C], got {x_NC.dtype} {list(x_NC.shape)}")
    C = x_NC.shape[1]
    if not isinstance(groups, int) or groups < 1 or C % groups:
        raise ValueError(f"groups must divide the {C} channels, got {groups!r}")
    if asset_starts_A1.ndim != 1 or len(asset_starts_A1) < 2 or asset_starts_A1.dtype != torch.int32:
        found = f"{asset_starts_A1.dtype} {list(asset_starts_A1.shape)}"
        raise ValueError(f"asset_starts_A1 must be int32 [A + 1] with A >= 1, got {found}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    for name, w in (("weight_C", weight_C), ("bias_C", bias_C)):
        if w.shape != (C,):
            raise ValueError(f"{name} must be [{C}], got {list(w.shape)}")
        if w.dtype not in (x_NC.dtype, torch.float32):
            raise ValueError(f"{name} must be {x_NC.dtype} as x_NC or torch.float32, got {w.dtype}")
    for name, t in (("asset_starts_A1", asset_starts_A1), ("weight_C", weight_C), ("bias_C", bias_C)):
        if t.device != x_NC.device:
            raise ValueError(f"{name} must be on x_NC's device {x_NC.device}, got {t.device}")
    return reference_conv.group_norm(x_NC, asset_starts_A1, groups, weight_C, bias_C, eps, silu)
