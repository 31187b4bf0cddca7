"""What transformers on sparse tokens share: positions, MLP, windowed attention, recomputed activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import BlockIndex, window_attention

AXES = 3


@functools.cache
def _frequencies(n: int, device: torch.device) -> Tensor:
    return 10000 ** (-torch.arange(n, device=device, dtype=torch.float32) / n)


def position_embedding(coords_N3: Tensor, channels: int, factor: float = 1.0) -> Tensor:
    """Sines and cosines of coordinates: [N, 3] -> float32 [N, channels], not learned.

    Per axis sin, then cos, of factor * coordinate * 10000^(-i / n), i < n = channels // 6; axes concatenated, zeros up
    to `channels`. ValueError if coords_N3 is not [N, 3] or there are fewer than 6 channels. # paper, sec. 3.2
    """
    if coords_N3.ndim != 2 or coords_N3.shape[1] != AXES:
        raise ValueError(f"coords_N3 must be [N, 3], got {list(coords_N3.shape)}")
    n = channels // (2 * AXES)
    if n == 0:
        raise ValueError(f"channels must be at least {2 * AXES}, got {channels}")
    with torch.autocast(coords_N3.device.type, enabled=False):
        angle_N3n = factor * coords_N3.float()[..., None] * _frequencies(n, coords_N3.device)
        waves = torch.cat([angle_N3n.sin(), angle_N3n.cos()], 2).flatten(1)
    return F.pad(waves, (0, channels - waves.shape[1]))


def position_factor(resolution: int) -> float:
    """Multiplies latent coordinates of an R = `resolution` grid, so that 256, 384 and 512 share a range."""
    return max(1.0, 512 / resolution)


def layer_norm(x_NC: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over channels without parameters, in fp32 (fp64 for fp64): [N, C] -> [N, C]."""
    with torch.autocast(x_NC.device.type, enabled=False):
        x = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
        return F.layer_norm(x, x.shape[1:], eps=eps)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op like torch's linear would take x: autocast's inside its context, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def recompute(wanted: bool, function: Callable[..., Tensor], *args: object) -> Tensor:
    """function(*args); if wanted its activations are not kept but computed again in the backward."""
    if not (wanted and torch.is_grad_enabled()):
        return function(*args)
    # Nothing here draws random numbers, and stashing CUDA's generator would wait for the device.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class Mlp(nn.Sequential):
    """Linear -> GELU (tanh) -> Linear: [N, channels] -> [N, channels]."""

    def __init__(self, channels: int, ratio: int = 4):
        super().__init__(
            nn.Linear(channels, ratio * channels),
            nn.GELU(approximate="tanh"),
            nn.Linear(ratio * channels, channels),
        )


class WindowAttention(nn.Module):
    """Multi-head attention of every token to those in its 8^3 window, aligned or shifted by 4."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, index: BlockIndex, shifted: bool) -> Tensor:
        q, k, v = self.qkv(x_NC).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.out(window_attention(q, k, v, index, shifted=shifted).flatten(1))


class WindowBlock(nn.Module):
    """LayerNorm -> window attention -> residual -> LayerNorm -> MLP -> residual: [N, C] -> [N, C]."""

    def __init__(self, channels: int, heads: int, *, shifted: bool, mlp_ratio: int = 4):
        super().__init__()
        self.shifted = shifted
        self.attention = WindowAttention(channels, heads)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x_NC: Tensor, index: BlockIndex) -> Tensor:
        x_NC = x_NC + self.attention(layer_norm(x_NC), index, self.shifted)
        return x_NC + self.mlp(layer_norm(x_NC))


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear inside, as the released models start."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero_init(linear: nn.Linear) -> None:
    """Makes an output layer start at zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
