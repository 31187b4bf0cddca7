"""Layers that all transformers on sparse tokens share: positions, MLP, windowed attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import BlockIndex, add_norm, mlp, norm, window_attention

AXES = 3


@functools.cache
def _frequencies(n: int, device: torch.device) -> Tensor:
    return 10000 ** (-torch.arange(n, device=device, dtype=torch.float32) / n)


def position_embedding(coords_N3: Tensor, channels: int, factor: float = 1.0) -> Tensor:
    """Embed coordinates by sines and cosines of fixed frequencies.

    Each axis has n = channels // 6 sines, then n cosines, of factor * coordinate * 10000^(-i / n)
    for i < n. The axes are concatenated and padded with zeros.
    Direct3D-S2 paper (arXiv 2505.17412), section 3.2.

    Args:
        coords_N3: [N, 3] of any dtype.
        channels: Channels of the result, at least 6.
        factor: Multiplies the coordinates.

    Returns:
        float32 [N, channels].

    Raises:
        ValueError: If `coords_N3` is not [N, 3] or `channels` is below 6.
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
    """Return the factor of latent coordinates at resolution R.

    Coordinates at 256, 384 and 512 then have one range.
    """
    return max(1.0, 512 / resolution)


def layer_norm(x_NC: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each row, without parameters.

    Args:
        x_NC: [N, C].
        eps: Added to the variance.

    Returns:
        [N, C] in fp32, or in fp64 for fp64, also under autocast.
    """
    with torch.autocast(x_NC.device.type, enabled=False):
        x = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
        return F.layer_norm(x, x.shape[1:], eps=eps)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes: autocast's if it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def weight_of(layer: Any) -> Tensor:
    """Return the weight by which a linear layer multiplies, with its adapters added to it.

    Code that does not call the layer but joins its weight with others, or hands it to a kernel,
    needs this. A layer to which the library peft added LoRA adapters has a weight without them.

    Args:
        layer: An nn.Linear, or the layer of peft that wraps one.

    Returns:
        [outputs, inputs] in the dtype of the layer's weight.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight
    weight = layer.weight
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter)
    return weight


def _weight_and_bias(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weight_of(layer).to(dtype), layer.bias.to(dtype)


def recompute(wanted: bool, function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function, with activation checkpointing if `wanted`.

    With checkpointing only the arguments are kept for the backward pass, which computes the
    activations again.
    """
    if not (wanted and torch.is_grad_enabled()):
        return function(*args)
    # The functions draw no random numbers, and saving CUDA's generator state would wait for the
    # device.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class Mlp(nn.Sequential):
    """Linear -> GELU (tanh) -> Linear: [N, channels] -> [N, channels]."""

    def __init__(self, channels: int, ratio: int = 4):
        super().__init__(
            nn.Linear(channels, ratio * channels),
            nn.GELU(approximate="tanh"),
            nn.Linear(ratio * channels, channels),
        )

    def forward(self, x_NC: Tensor) -> Tensor:
        """Apply the layers."""
        return self.with_product(x_NC)[0]

    def with_product(self, x_NC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply the layers. Also returns the first product, see `kernels.mlp`."""
        dtype = autocast_dtype(x_NC)
        first, last = (_weight_and_bias(layer, dtype) for layer in (self[0], self[2]))
        return mlp(x_NC.to(dtype), *first, *last)

    def first_product(self, x_NC: Tensor) -> Tensor:
        """Return the product of the first layer, as `with_product` does."""
        dtype = autocast_dtype(x_NC)
        weight, bias = _weight_and_bias(self[0], dtype)
        return torch.addmm(bias, x_NC.to(dtype), weight.t())


class WindowAttention(nn.Module):
    """Multi-head attention of every token to the tokens in its 8^3 window."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, index: BlockIndex, shifted: bool) -> Tensor:
        """Attend within aligned windows, or within windows shifted by half their side."""
        # Three products give contiguous tensors. Those of one product would have to be copied.
        q_NHD, k_NHD, v_NHD = (
            F.linear(x_NC, weight, bias).unflatten(1, (self.heads, -1))
            for weight, bias in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        )
        return self.out(window_attention(q_NHD, k_NHD, v_NHD, index, shifted=shifted).flatten(1))


class WindowBlock(nn.Module):
    """Transformer block of the SS-VAE: [N, C] -> [N, C].

    LayerNorm -> window attention -> residual -> LayerNorm -> MLP -> residual.
    """

    def __init__(self, channels: int, heads: int, *, shifted: bool, mlp_ratio: int = 4):
        super().__init__()
        self.shifted = shifted
        self.attention = WindowAttention(channels, heads)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x_NC: Tensor, index: BlockIndex) -> Tensor:
        """Apply the block to tokens in the order of `index`."""
        dtype, assets = autocast_dtype(x_NC), (index.asset_of, index.token_starts)
        y_NC = norm(x_NC, None, None, *assets, dtype=dtype)
        y_NC = self.attention(y_NC, index, self.shifted)
        x_NC, y_NC = add_norm(x_NC, y_NC, None, None, None, *assets, dtype=dtype)
        return x_NC + self.mlp(y_NC)


def init_linears(module: nn.Module) -> None:
    """Initialise every linear layer inside a module: Xavier-uniform weights, zero biases.

    The published Direct3D-S2 code starts its models so.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero_init(linear: nn.Linear) -> None:
    """Set the weights and biases of an output layer to zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
