"""Definitions of the fused operations: the shortest correct torch code.

They run on any device in any float dtype and are differentiable. The kernels are tested against
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(
    x_NC: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    asset_of_N: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of each row, then scale and shift: [N, C] in `dtype`.

    Shift and scale are [A, C], one row per asset, of which the scale is increased by one; or [C],
    the weights of a LayerNorm; or None.
    """
    with torch.autocast(x_NC.device.type, enabled=False):
        x_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
        y_NC = F.layer_norm(x_NC, x_NC.shape[1:], eps=eps)
        if shift is not None and scale is not None:
            if scale.ndim == 2:
                shift, scale = shift[asset_of_N], 1 + scale[asset_of_N].to(x_NC.dtype)
            y_NC = y_NC * scale + shift
        return y_NC.to(dtype)


def gated_add(
    x_NC: Tensor, branch_NC: Tensor, gate_AC: Tensor | None, asset_of_N: Tensor
) -> Tensor:
    """x + gate * branch: [N, C] in the dtype of x. Without a gate the branch is added as it is."""
    branch_NC = branch_NC.to(x_NC.dtype)
    if gate_AC is not None:
        branch_NC = gate_AC.to(x_NC.dtype)[asset_of_N] * branch_NC
    return x_NC + branch_NC


def mlp(
    x_NC: Tensor, weight1_FC: Tensor, bias1_F: Tensor, weight2_CF: Tensor, bias2_C: Tensor
) -> Tensor:
    """Linear -> GELU (tanh) -> linear: [N, C] -> [N, C]."""
    hidden_NF = F.gelu(F.linear(x_NC, weight1_FC, bias1_F), approximate="tanh")
    return F.linear(hidden_NF, weight2_CF, bias2_C)
