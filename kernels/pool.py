"""Mean over the children of each parent voxel: the stride-2 pooling of the encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference_conv


def pool_children(x_NC: Tensor, children_P8: Tensor, *, plus_one: bool = False) -> Tensor:
    """Mean of the rows that children_P8 (int32 [P, 8], -1 for none) names: [N, C] -> [P, C] in x's dtype.

    plus_one divides by n + 1, as the published weights expect. Every row at most once among the children; a parent
    has at least one. Differentiable in x. ValueError for other shapes, dtypes or devices.
    """
    if x_NC.ndim != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [N, C], got {x_NC.dtype} {list(x_NC.shape)}")
    if children_P8.ndim != 2 or children_P8.shape[1] != 8 or children_P8.dtype != torch.int32:
        raise ValueError(f"children_P8 must be int32 [P, 8], got {children_P8.dtype} {list(children_P8.shape)}")
    if children_P8.device != x_NC.device:
        raise ValueError(f"children_P8 must be on x_NC's device {x_NC.device}, got {children_P8.device}")
    return reference_conv.pool_children(x_NC, children_P8, plus_one)
