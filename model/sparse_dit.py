"""SS-DiT: the flow's velocity for the latents of given cells, at time t, given image tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import add_norm, norm
from model.attention import CrossAttention, FullAttention, SpatialSparseAttention
from model.checkpoint import copy_weights
from model.config import DiTConfig, KeptActivations
from model.image_tokens import ImageTokens
from model.kept_activations import (
    BlockActivations,
    bytes_per_token,
    choose_level,
    free_memory,
)
from model.kv_compression import TokenLayout
from model.layers import (
    Mlp,
    autocast_dtype,
    init_linears,
    position_embedding,
    zero_init,
)
from model.published_weights import published_dit_keys
from model.sparse_tensor import Level, SparseTensor
from pipeline.core.grid import CELL_SIDE

TIME_CHANNELS = 256  # channels of the sinusoids of t


class TimeEmbedding(nn.Sequential):
    """Cosines and sines of 1000 t, through an MLP: [B] in [0, 1] -> [B, C]."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Linear(TIME_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed times."""
        half = TIME_CHANNELS // 2
        power = torch.arange(half, device=t_B.device, dtype=torch.float64) / half
        angle = 1000 * t_B.double()[:, None] * torch.exp(-math.log(10000) * power)
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        return super().forward(waves.to(next(self.parameters()).dtype))


class ResidualStream(NamedTuple):
    """The residual stream, and a branch that the next normalisation adds to it.

    The stream is x + gate * branch.

    Attributes:
        x_NC: [N, C].
        branch_NC: [N, C], or None.
        gate_BC: [B, C], the factor of the branch for each asset, or None.
    """

    x_NC: Tensor
    branch_NC: Tensor | None = None
    gate_BC: Tensor | None = None


class Normalization(NamedTuple):
    """What follows a LayerNorm: a shift and a scale of each asset [B, C], or of all [C], or none.

    The scale of an asset is increased by one.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    eps: float = 1e-6


def add_and_normalize(
    stream: ResidualStream,
    after: Normalization,
    layout: TokenLayout,
    dtype: torch.dtype,
    kept: BlockActivations,
    *,
    first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add the branch of the stream and normalise the sum.

    Args:
        stream: The residual stream.
        after: What follows the LayerNorm.
        layout: Layout of the N tokens.
        dtype: Dtype of the normalised rows.
        kept: The activations of the block.
        first: Whether the sum is the block's input, which is always kept.

    Returns:
        The sum [N, C] in the dtype of the stream, and its norm [N, C] in `dtype`.
    """
    vectors = (after.shift, after.scale, layout.index, after.eps, dtype)
    if stream.branch_NC is None:
        x_NC = stream.x_NC
        y_NC = _normalize(x_NC, *vectors)
    else:
        x_NC, y_NC = _add(*stream, *vectors)
    if first:
        kept.drop("products", y_NC, _normalize, x_NC, *vectors)
    else:
        kept.drop("products", (x_NC, y_NC), _add, *stream, *vectors)
    return x_NC, y_NC


def _normalize(x_NC, shift, scale, index, eps, dtype) -> Tensor:
    return norm(x_NC, shift, scale, index.asset_of, index.token_starts, eps=eps, dtype=dtype)


def _add(x_NC, branch_NC, gate_BC, shift, scale, index, eps, dtype) -> tuple[Tensor, Tensor]:
    vectors = (gate_BC, shift, scale, index.asset_of, index.token_starts)
    return add_norm(x_NC, branch_NC, *vectors, eps=eps, dtype=dtype)


class DiTBlock(nn.Module):
    """Transformer block: modulated self-attention, cross-attention, modulated MLP.

    Direct3D-S2 paper (arXiv 2505.17412), section 4.
    """

    def __init__(self, config: DiTConfig, *, odd: bool):
        super().__init__()
        C = config.channels
        # Shift, scale and gate of the attention, then those of the MLP.
        self.modulation = nn.Linear(C, 6 * C)
        if config.attention == "full":
            self.attention = FullAttention(C, config.heads, qk_norm=config.qk_norm)
        else:
            self.attention = SpatialSparseAttention(
                C,
                config.heads,
                config.kv_heads,
                compress_block=config.compress_block,
                compression=config.compression,
                top_k=config.top_k,
                shifted=config.shifted_windows and odd,
                plus_one=config.plus_one_pooling,
            )
        self.cross_norm = nn.LayerNorm(C, eps=1e-6)
        self.cross_attention = CrossAttention(C, config.condition_channels, config.heads)
        self.mlp = Mlp(C, config.mlp_ratio)
        self.dropout = config.dropout

    def _branch(self, result_NC: Tensor) -> Tensor:
        """Return the result of a branch, a share of whose values training sets to 0."""
        if self.training and self.dropout:
            return F.dropout(result_NC, self.dropout)
        return result_NC

    def forward(
        self,
        stream: ResidualStream,
        time_BC: Tensor,
        image: ImageTokens,
        layout: TokenLayout,
        kept: KeptActivations = "all",
        key_value: tuple[Tensor, Tensor] | None = None,
    ) -> ResidualStream:
        """Apply the block.

        Args:
            stream: The residual stream, rows in the layout's order.
            time_BC: [B, C], SiLU of the time embedding. It is the same for all blocks.
            image: Projected image tokens.
            layout: Layout of the N tokens.
            kept: Which activations are kept for the backward pass.
            key_value: Keys and values of the cross-attention. None computes them.

        Returns:
            The residual stream, to which the result of the MLP is not added yet.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(time_BC).chunk(6, 1)
        dtype = autocast_dtype(stream.x_NC)
        activations = BlockActivations(kept, time_BC.device.type)
        common = (layout, dtype, activations)
        with activations.hooks():
            after = Normalization(shift, scale)
            x_NC, y_NC = add_and_normalize(stream, after, *common, first=True)
            attended_NC = self.attention(y_NC, layout, activations)

            stream = ResidualStream(x_NC, self._branch(attended_NC), gate)
            after = Normalization(self.cross_norm.bias, self.cross_norm.weight)
            x_NC, y_NC = add_and_normalize(stream, after, *common)
            attended_NC = self.cross_attention(y_NC, layout, image, activations, key_value)

            stream = ResidualStream(x_NC, self._branch(attended_NC))
            after = Normalization(mlp_shift, mlp_scale)
            x_NC, y_NC = add_and_normalize(stream, after, *common)
            out_NC, product_NF = self.mlp.with_product(y_NC)
            if product_NF is not None:
                activations.drop("attention", product_NF, self.mlp.first_product, y_NC)
            out_NC = self._branch(out_NC)
        return ResidualStream(x_NC, out_NC, mlp_gate)


class FixedInputs(NamedTuple):
    """What all steps of a sampling have in common: cells, image tokens and their products.

    Attributes:
        layout: Layout of the N tokens.
        positions_NC: [N, C], embedding of the cells' positions, rows as in the level.
        image: Projected image tokens.
        key_values: Keys and values of the image tokens for the cross-attention of each block.
    """

    layout: TokenLayout
    positions_NC: Tensor
    image: ImageTokens
    key_values: list[tuple[Tensor, Tensor]]


class SparseDiT(nn.Module):
    """The SS-DiT of Direct3D-S2.

    Weights and the residual stream are fp32. Under torch.autocast matrix products use its dtype.

    Attributes:
        config: Sizes of the model.
        latent_mean: [latent_channels], the mean of the VAE's latents, part of the weights.
        latent_std: [latent_channels], their standard deviation, part of the weights.
        kept_activations: What the blocks keep for the backward pass, which computes the rest again.
            "all" keeps every activation. "products" keeps the blocks' inputs and the results of
            attention and of matrix products, except the queries of SSA. "attention" keeps the
            blocks' inputs and the results of attention. "auto" takes the first of them that fits
            the memory. Gradients are the same to the bit.
    """

    Config = DiTConfig
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.kept_activations: KeptActivations | Literal["auto"] = "all"
        C = config.channels
        self.input = nn.Linear(config.latent_channels, C)
        self.time = TimeEmbedding(C)
        self.condition = None
        if config.condition_projection:
            self.condition = nn.Linear(config.condition_channels, config.condition_channels)
        self.blocks = nn.ModuleList(DiTBlock(config, odd=n % 2 == 1) for n in range(config.blocks))
        self.out = nn.Linear(C, config.latent_channels)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self._initialize()

    def _initialize(self) -> None:
        init_linears(self)
        for part in self.modules():
            if isinstance(part, TimeEmbedding):
                for weight in (p for p in part.parameters() if p.ndim == 2):
                    nn.init.normal_(weight, std=0.02)
            elif isinstance(part, DiTBlock):
                zero_init(part.modulation)
        zero_init(self.out)

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Set the statistics by which latents are normalised.

        Args:
            mean_C: [latent_channels].
            std_C: [latent_channels], positive.

        Raises:
            ValueError: If a value is not finite, a shape differs or a deviation is not positive.
        """
        shape = self.latent_mean.shape
        for name, x in (("mean", mean_C), ("std", std_C)):
            if x.shape != shape or not x.isfinite().all():
                raise ValueError(f"{name} must be finite {list(shape)}, got {x}")
        if not (std_C > 0).all():
            raise ValueError(f"std must be positive, got {std_C}")
        self.latent_mean.copy_(mean_C)
        self.latent_std.copy_(std_C)

    def normalize(self, z_NC: Tensor) -> Tensor:
        """Return the data x0 of the flow for latents of the VAE, [N, latent_channels]."""
        return (z_NC - self.latent_mean) / self.latent_std

    def denormalize(self, x_NC: Tensor) -> Tensor:
        """Return the latents of the VAE for data x0 of the flow, [N, latent_channels]."""
        return x_NC * self.latent_std + self.latent_mean

    def layout(self, level: Level) -> TokenLayout:
        """Return the layout of a level's tokens, which `forward` makes if it is not given one."""
        return TokenLayout.of(level, self.config.compress_block)

    def fixed_inputs(self, level: Level, image: ImageTokens) -> FixedInputs:
        """Return what does not change from one step of a sampling to the next.

        Args:
            level: The cells.
            image: Image tokens of the same assets.
        """
        image = self._project(image)
        key_values = []
        for block in self._blocks():
            # The kernels need contiguous tensors and would copy others at each step.
            k_SHD, v_SHD = block.cross_attention.keys_and_values(image)
            key_values.append((k_SHD.contiguous(), v_SHD.contiguous()))
        return FixedInputs(self.layout(level), self._cell_positions(level), image, key_values)

    def forward(
        self,
        x: SparseTensor,
        t_B: Tensor,
        image: ImageTokens,
        layout: TokenLayout | None = None,
        fixed: FixedInputs | None = None,
    ) -> Tensor:
        """Estimate the velocity of the flow.

        Args:
            x: Normalised latents at time t, [N, latent_channels] on cells at resolution R / 8.
            t_B: [B] in [0, 1], the time of each asset.
            image: Image tokens of the B assets.
            layout: `self.layout(x.level)`. None makes it.
            fixed: `self.fixed_inputs(x.level, image)`, which replaces the layout too. None computes
                it, as training needs.

        Returns:
            fp32 (fp64 in an fp64 model) [N, latent_channels], rows as in `x`.

        Raises:
            ValueError: If the number of assets or channels differ.
        """
        self._check(x, t_B, image)
        level = x.level
        if fixed is not None:
            layout = fixed.layout
        layout = layout or self.layout(level)
        # The first and the last layer are cheap, and rounding them would cost precision.
        with torch.autocast(x.feats.device.type, enabled=False):
            h_NC = self.input(x.feats.to(self.input.weight.dtype))
        h_NC = h_NC + (self._cell_positions(level) if fixed is None else fixed.positions_NC)
        h_NC = h_NC if layout.order is None else h_NC[layout.order]
        image = self._project(image) if fixed is None else fixed.image
        time_BC = F.silu(self.time(t_B))
        kept = self._kept_level(h_NC)
        stream = ResidualStream(h_NC)
        for i, block in enumerate(self.blocks):
            key_value = None if fixed is None else fixed.key_values[i]
            stream = block(stream, time_BC, image, layout, kept, key_value)
        after = Normalization(eps=1e-5)
        keep_all = BlockActivations("all", h_NC.device.type)
        _, y_NC = add_and_normalize(stream, after, layout, h_NC.dtype, keep_all)
        y_NC = y_NC if layout.inverse is None else y_NC[layout.inverse]
        with torch.autocast(x.feats.device.type, enabled=False):
            return self.out(y_NC)

    def _kept_level(self, x_NC: Tensor) -> KeptActivations:
        """Return what the blocks keep. "auto" looks at the memory of the GPU."""
        kept = self.kept_activations
        if kept != "auto":
            return kept
        if not (x_NC.is_cuda and torch.is_grad_enabled()):
            return "all"
        itemsize = autocast_dtype(x_NC).itemsize
        # Beside the activations: the gradients that do not exist yet, and what one block keeps.
        without = [p for p in self.parameters() if p.requires_grad and p.grad is None]
        missing = sum(p.numel() * p.itemsize for p in without)
        one_block = len(x_NC) * bytes_per_token(self.config, "all", itemsize)
        free = free_memory(x_NC.device, sum(p.numel() for p in self.parameters()))
        return choose_level(self.config, len(x_NC), itemsize, free, missing + one_block)

    def _blocks(self) -> list[DiTBlock]:
        return [block for block in self.blocks if isinstance(block, DiTBlock)]

    def _cell_positions(self, level: Level) -> Tensor:
        """Embed the positions of a level's cells, in the dtype of the residual stream: [N, C]."""
        factor = self.config.position_factor(CELL_SIDE * level.resolution)
        C, dtype = self.config.channels, self.input.weight.dtype
        return position_embedding(level.coords[:, 1:], C, factor).to(dtype)

    @staticmethod
    def _positions(coords_N3: Tensor, like_NC: Tensor) -> Tensor:
        return position_embedding(coords_N3, like_NC.shape[1]).to(like_NC.dtype)

    def _project(self, image: ImageTokens) -> ImageTokens:
        if self.condition is None:
            return image
        feats_SC = self.condition(image.feats_SC)
        positions_SC = self._positions(image.coords[:, 1:], feats_SC)
        return replace(image, feats_SC=feats_SC + positions_SC)

    def _check(self, x: SparseTensor, t_B: Tensor, image: ImageTokens) -> None:
        B = x.batch_size
        channels = {
            "x": (x.feats.shape[1], self.config.latent_channels),
            "image": (image.feats_SC.shape[1], self.config.condition_channels),
        }
        if t_B.shape != (B,):
            raise ValueError(f"t_B must be [{B}], one for each asset, got {list(t_B.shape)}")
        if image.batch_size != B:
            raise ValueError(f"image must be of {B} assets, got {image.batch_size}")
        for name, (actual, wanted) in channels.items():
            if actual != wanted:
                raise ValueError(f"{name} must have {wanted} channels, got {actual}")

    def flops(self, level: Level, image: ImageTokens) -> int:
        """Count the multiplications and additions of one forward pass.

        A training step needs three times as many. Attention counts the scores and weighted sums of
        its definition, where a selected block has the mean number of tokens of its asset's blocks.
        Recomputed activations do not count. This copies from the device to the host once.

        Args:
            level: The cells.
            image: Image tokens. Their features may be empty.
        """
        return _flops(self.config, self.layout(level), image)

    def load_published(self, weights: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> None:
        """Copy the weights of a published SS-DiT.

        The model must have been made with `plus_one_pooling`.

        Args:
            weights: The published state dict.
            scale: `latents_scale` of the published VAE, a scalar or [latent_channels].
            shift: `latents_shift` of the published VAE, a scalar or [latent_channels].

        Raises:
            CheckpointError: If names or shapes do not fit. The message lists all of them.
        """
        channels = self.config.latent_channels
        statistics = {
            "latents_scale": scale.expand(channels),
            "latents_shift": shift.expand(channels),
        }
        keys = published_dit_keys(self.config)
        copy_weights({**weights, **statistics}, self, "the state dict", keys)


def _flops(config: DiTConfig, layout: TokenLayout, image: ImageTokens) -> int:
    C, E, index = config.channels, config.kv_channels, layout.index
    N, S, B = index.num_tokens, len(image.coords), image.batch_size
    tokens, images = index.token_starts.diff().double(), image.starts.diff().double()
    # Multiply-adds of the linear layers of one block: cross-attention and MLP of the tokens, keys
    # and values of the image tokens, modulation.
    linear = (
        N * (2 * C * C + 2 * config.mlp_ratio * C * C)
        + S * 2 * config.condition_channels * C
        + B * 6 * C * C
    )
    # Pairs of a query and a key in all blocks, starting with those of the cross-attention.
    pairs = [config.blocks * (tokens * images).sum()]
    taps = torch.zeros((), device=index.device, dtype=torch.float64)
    if config.attention == "full":
        linear += N * 4 * C * C
        pairs.append(config.blocks * tokens.square().sum())
    else:
        # Projections of SSA and its compression.
        linear += N * (2 * C * C + 2 * C * E + 3 * C)
        linear += N * 2 * E * E if config.compression == "v1" else 0
        if config.compression == "v2":
            taps = 2 * 2 * E * E * (layout.neighbors >= 0).sum().double()
        # Compressed blocks, then selected ones.
        compressed, blocks = index.asset_compressed.diff(), index.asset_blocks.diff().double()
        share = blocks.clamp(max=config.top_k) / blocks.clamp(min=1)
        pairs.append(config.blocks * (tokens * (compressed + share * tokens)).sum())
        # Windows.
        for n in range(config.blocks):
            shifted = config.shifted_windows and n % 2 == 1
            starts = index.shifted_starts if shifted else index.window_starts
            pairs.append(starts.diff().double().square().sum())
    # The layers outside the blocks.
    projection = config.condition_channels**2 if config.condition_projection else 0
    ends = 2 * N * C * config.latent_channels + B * C * (TIME_CHANNELS + C) + S * projection
    attention = float(2 * C * torch.stack(pairs).sum() + config.blocks * taps)
    return int(2 * (config.blocks * linear + ends + attention))
