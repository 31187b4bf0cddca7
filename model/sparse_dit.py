"""SS-DiT: the velocity of the flow for the latents of given cells, at time t, under the condition of image tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CrossAttention, FullAttention, SpatialSparseAttention
from model.checkpoint import KeyMap, copy_weights, unchanged
from model.config import Compression, DiTConfig
from model.image_tokens import ImageTokens
from model.kv_compression import TokenLayout
from model.layers import (
    Mlp,
    autocast_dtype,
    init_linears,
    layer_norm,
    position_embedding,
    position_factor,
    recompute,
    zero_init,
)
from model.sparse_tensor import Level, SparseTensor
from model.sparse_vae import published_kernel
from pipeline.core.grid import CELL_SIDE

HEAD_SIZES = (16, 32, 64, 128)  # that SSA has kernels for
TIME_CHANNELS = 256  # of the sinusoids of t


class TimeEmbedding(nn.Sequential):
    """1000 t as cosines and sines, through an MLP: [B] in [0, 1] -> [B, C]."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Linear(TIME_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t_B: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        power = torch.arange(half, device=t_B.device, dtype=torch.float64) / half
        angle = 1000 * t_B.double()[:, None] * torch.exp(-math.log(10000) * power)
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        return super().forward(waves.to(next(self.parameters()).dtype))


def _spread(x_BC: Tensor, asset_NB: Tensor) -> Tensor:
    """Each asset's row for each of its tokens; a product, so that the gradient is a sum in a fixed order."""
    return x_BC if len(x_BC) == 1 else asset_NB @ x_BC


class DiTBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated MLP, each added to x. paper, sec. 4"""

    def __init__(self, config: DiTConfig, *, odd: bool):
        super().__init__()
        C = config.channels
        self.modulation = nn.Linear(C, 6 * C)  # shift, scale, gate of attention, then of the MLP
        if config.attention == "full":
            self.attention = FullAttention(C, config.heads)
        else:
            self.attention = SpatialSparseAttention(
                C, config.heads, config.kv_heads, compress_block=config.compress_block,
                compression=config.compression, top_k=config.top_k, shifted=config.shifted_windows and odd,
                plus_one=config.plus_one_pooling,
            )  # fmt: skip
        self.cross_norm = nn.LayerNorm(C, eps=1e-6)
        self.cross_attention = CrossAttention(C, config.condition_channels, config.heads)
        self.mlp = Mlp(C, config.mlp_ratio)

    def forward(
        self,
        x_NC: Tensor,
        active_BC: Tensor,
        condition: ImageTokens,
        layout: TokenLayout,
        asset_NB: Tensor,
    ) -> Tensor:
        """active_BC: the SiLU of the time's embedding, the same for all blocks."""
        parts = (_spread(part, asset_NB) for part in self.modulation(active_BC).chunk(6, 1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x_NC = x_NC + gate * self.attention(_modulated(x_NC, shift, scale), layout)
        x_NC = x_NC + self.cross_attention(self.cross_norm(x_NC), layout, condition)
        return x_NC + mlp_gate * self.mlp(_modulated(x_NC, mlp_shift, mlp_scale))


def _modulated(x_NC: Tensor, shift_NC: Tensor, scale_NC: Tensor) -> Tensor:
    return torch.addcmul(shift_NC, layer_norm(x_NC).to(autocast_dtype(x_NC)), 1 + scale_NC)


class SparseDiT(nn.Module):
    """The SS-DiT. fp32 weights and residual stream; under torch.autocast the products run in its dtype.

    Latents are normalised by `latent_mean` and `latent_std`, which the checkpoint holds: `normalize` and `denormalize`
    go between them and the VAE's. `activation_checkpointing`: keep one activation a block, recompute the others.
    """

    Config = DiTConfig
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        C = config.channels
        self.input = nn.Linear(config.latent_channels, C)
        self.time = TimeEmbedding(C)
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
        """Per-channel statistics of the latents to come. ValueError if not finite [C] with std > 0."""
        shape = self.latent_mean.shape
        for name, x in (("mean", mean_C), ("std", std_C)):
            if x.shape != shape or not x.isfinite().all():
                raise ValueError(f"{name} must be finite {list(shape)}, got {x}")
        if not (std_C > 0).all():
            raise ValueError(f"std must be positive, got {std_C}")
        self.latent_mean.copy_(mean_C)
        self.latent_std.copy_(std_C)

    def normalize(self, z_NC: Tensor) -> Tensor:
        """Latents of the VAE -> x0 of the flow."""
        return (z_NC - self.latent_mean) / self.latent_std

    def denormalize(self, x_NC: Tensor) -> Tensor:
        """x0 of the flow -> latents of the VAE."""
        return x_NC * self.latent_std + self.latent_mean

    def layout(self, level: Level) -> TokenLayout:
        """What `forward` needs to know of the cells; worth keeping where the same level comes again (sampling)."""
        return TokenLayout.of(level, self.config.compress_block)

    def forward(
        self,
        x: SparseTensor,
        t_B: Tensor,
        condition: ImageTokens,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """The velocity, fp32 (fp64 in an fp64 model) [N, latent_channels], rows as in x.

        x: normalised latents at time t on cells, a level of resolution R / 8; t [B] in [0, 1]; one image an asset.
        layout: `self.layout(x.level)`, made here if not given. ValueError if the parts' assets or channels differ.
        """
        self._check(x, t_B, condition)
        level, layout = x.level, layout or self.layout(x.level)
        with torch.autocast(
            x.feats.device.type, enabled=False
        ):  # little work, and the ends should not be rounded
            h_NC = self.input(x.feats.to(self.input.weight.dtype))
        h_NC = h_NC + self._positions(
            level.coords[:, 1:], h_NC, position_factor(CELL_SIDE * level.resolution)
        )
        h_NC = h_NC if layout.order is None else h_NC[layout.order]
        condition, active_BC = self._project(condition), F.silu(self.time(t_B))
        asset_NB = layout.index.asset_of[:, None] == torch.arange(
            level.batch_size, device=level.device
        )
        asset_NB = asset_NB.to(active_BC.dtype)
        for block in self.blocks:
            h_NC = recompute(
                self.activation_checkpointing, block, h_NC, active_BC, condition, layout, asset_NB
            )
        h_NC = h_NC if layout.inverse is None else h_NC[layout.inverse]
        with torch.autocast(x.feats.device.type, enabled=False):
            return self.out(layer_norm(h_NC, eps=1e-5))

    @staticmethod
    def _positions(coords_N3: Tensor, like_NC: Tensor, factor: float = 1.0) -> Tensor:
        return position_embedding(coords_N3, like_NC.shape[1], factor).to(like_NC.dtype)

    def _project(self, condition: ImageTokens) -> ImageTokens:
        feats_SC = self.condition(condition.feats_SC)
        return replace(
            condition, feats_SC=feats_SC + self._positions(condition.coords[:, 1:], feats_SC)
        )

    def _check(self, x: SparseTensor, t_B: Tensor, condition: ImageTokens) -> None:
        channels, B = self.config.latent_channels, x.batch_size
        if x.feats.shape[1] != channels:
            raise ValueError(f"x must have {channels} channels, got {x.feats.shape[1]}")
        if t_B.shape != (B,):
            raise ValueError(f"t_B must be [{B}], one an asset, got {list(t_B.shape)}")
        if condition.batch_size != B:
            raise ValueError(f"condition must be of {B} assets, got {condition.batch_size}")
        if condition.feats_SC.shape[1] != self.config.condition_channels:
            found = condition.feats_SC.shape[1]
            raise ValueError(
                f"condition must have {self.config.condition_channels} channels, got {found}"
            )

    def flops(self, level: Level, condition: ImageTokens) -> int:
        """Multiplications and additions of one forward pass; a training step needs three times as many.

        Attention counts the scores and sums that its definition asks for, a selected block with its asset's mean number
        of tokens; no recomputation. One device-to-host copy.
        """
        return _flops(self.config, self.layout(level), condition)

    def load_published(self, weights: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> None:
        """Copy the weights of a published SS-DiT, and its VAE's latents_scale and latents_shift (scalars or [C]).

        They expect `plus_one_pooling`. ValueError listing every unknown or missing name and wrong shape.
        """
        channels = self.config.latent_channels
        ends = {"latents_scale": scale.expand(channels), "latents_shift": shift.expand(channels)}
        copy_weights({**weights, **ends}, self, "the state dict", published_keys(self.config))


def _flops(config: DiTConfig, layout: TokenLayout, condition: ImageTokens) -> int:
    C, E, index = config.channels, config.kv_channels, layout.index
    N, S, B = index.num_tokens, len(condition.coords), condition.batch_size
    tokens, images = index.token_starts.diff().double(), condition.starts.diff().double()
    linear = (
        N * (2 * C * C + 2 * config.mlp_ratio * C * C)
        + S * 2 * config.condition_channels * C
        + B * 6 * C * C
    )
    pairs = [config.blocks * (tokens * images).sum()]  # of a query and a key
    taps = torch.zeros((), device=index.device, dtype=torch.float64)
    if config.attention == "full":
        linear += N * 4 * C * C
        pairs.append(config.blocks * tokens.square().sum())
    else:
        linear += N * (2 * C * C + 2 * C * E + 3 * C)
        linear += N * 2 * E * E if config.compression == "v1" else 0
        if config.compression == "v2":
            taps = 2 * 2 * E * E * (layout.neighbors >= 0).sum().double()
        compressed, blocks = index.asset_compressed.diff(), index.asset_blocks.diff().double()
        share = blocks.clamp(max=config.top_k) / blocks.clamp(min=1)
        pairs.append(config.blocks * (tokens * (compressed + share * tokens)).sum())
        for n in range(config.blocks):
            shifted = config.shifted_windows and n % 2 == 1
            starts = index.shifted_starts if shifted else index.window_starts
            pairs.append(starts.diff().double().square().sum())
    ends = (
        2 * N * C * config.latent_channels
        + B * C * (TIME_CHANNELS + C)
        + S * config.condition_channels**2
    )
    attention = float(2 * C * torch.stack(pairs).sum() + config.blocks * taps)
    return int(2 * (config.blocks * linear + ends + attention))


def published_keys(config: DiTConfig) -> KeyMap:
    """Names and layouts of the published SS-DiT -> ours."""
    keys: dict = {
        "latents_scale": ("latent_std", torch.reciprocal),  # its latents are z / scale + shift
        "latents_shift": ("latent_mean", unchanged),
    }

    def linear(theirs: str, ours: str, *names: str) -> None:
        keys.update(
            {
                f"{theirs}.{name}": (f"{ours}.{name}", unchanged)
                for name in names or ("weight", "bias")
            }
        )

    linear("input_layer", "input")
    linear("t_embedder.mlp.0", "time.0")
    linear("t_embedder.mlp.2", "time.2")
    linear("cond_proj", "condition")
    linear("out_layer", "out")
    for n in range(config.blocks):
        theirs, ours = f"blocks.{n}", f"blocks.{n}"
        linear(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")
        linear(f"{theirs}.norm2", f"{ours}.cross_norm")
        for part, name in (("to_q", "query"), ("to_kv", "key_value"), ("to_out", "out")):
            linear(f"{theirs}.cross_attn.{part}", f"{ours}.cross_attention.{name}")
        for layer in (0, 2):
            linear(f"{theirs}.mlp.mlp.{layer}", f"{ours}.mlp.{layer}")
        if config.attention == "full":
            linear(f"{theirs}.self_attn.to_qkv", f"{ours}.attention.qkv")
            linear(f"{theirs}.self_attn.to_out", f"{ours}.attention.out")
            continue
        for part, name in (
            ("proj_q", "query"),
            ("proj_k", "key"),
            ("proj_v", "value"),
            ("proj_o", "out"),
        ):
            linear(f"{theirs}.self_attn.{part}", f"{ours}.attention.{name}", "weight")
        linear(f"{theirs}.self_attn.gate.0", f"{ours}.attention.gate", "weight")
        keys[f"{theirs}.self_attn.intra_block_pe"] = (
            f"{ours}.attention.key_position",
            lambda x: x.flatten(0, 2),
        )
        for side in ("key", "value"):
            compression = (
                f"{theirs}.self_attn.compression_{side}",
                f"{ours}.attention.compress_{side}",
            )
            _compression_keys(keys, linear, config.compression, *compression)
    return keys


def _compression_keys(
    keys: dict, linear: Callable[..., None], version: Compression, theirs: str, ours: str
) -> None:
    if version == "v1":
        keys[f"{theirs}.act_layers.0.conv.kernel"] = (f"{ours}.linear.weight", torch.t)  # [in, out]
        keys[f"{theirs}.act_layers.0.conv.bias"] = (f"{ours}.linear.bias", unchanged)
        return
    linear(f"{theirs}.act_layers.0", f"{ours}.norm1")
    linear(f"{theirs}.out_layers.1", f"{ours}.norm2")
    for layer, name in ((0, "conv1"), (3, "conv2")):
        keys[f"{theirs}.out_layers.{layer}.conv.kernel"] = (
            f"{ours}.{name}.weight",
            published_kernel,
        )
        keys[f"{theirs}.out_layers.{layer}.conv.bias"] = (f"{ours}.{name}.bias", unchanged)
