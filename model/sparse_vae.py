"""SS-VAE: sparse SDF bricks to 16 channels a cell of 8^3 voxels, and back to all 512 voxels of every cell."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import sdf_head
from model.checkpoint import KeyMap, copy_weights, unchanged
from model.config import VAEConfig
from model.conv import DownBlock, UpBlock, pairs_of_blocks
from model.layers import (
    WindowBlock,
    init_linears,
    layer_norm,
    position_embedding,
    position_factor,
    recompute,
    zero_init,
)
from model.sparse_tensor import POINTS, BrickBatch, Level, SparseTensor
from pipeline.core.grid import CELL_SIDE

HEAD_SIZES = (16, 32, 64, 128)  # that windowed attention has kernels for
LOGVAR_START = -6.0  # log-variance of every latent before training
SIZES = (2, 4, 8)  # voxels along a cell's side after each step of the decoder


@dataclass(frozen=True, eq=False)
class Posterior:
    """A diagonal Gaussian for every cell."""

    mean: Tensor  # fp32 [M, latent_channels]
    logvar: Tensor  # fp32 [M, latent_channels], in [-30, 20]
    level: Level  # of the cells, rows as in batch.cells; its caches serve the decoder

    def sample(self, noise_MC: Tensor) -> Tensor:
        """mean + standard deviation * noise: [M, latent_channels]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise_MC


class _Transformer(nn.Module):
    """Linear and positions, then window blocks, every other one shifted: what encoder and decoder have in common."""

    def __init__(self, in_channels: int, config: VAEConfig):
        super().__init__()
        self.width = config.widths[3]
        self.input = nn.Linear(in_channels, self.width)
        self.blocks = nn.ModuleList(
            WindowBlock(self.width, config.heads, shifted=n % 2 == 1, mlp_ratio=config.mlp_ratio)
            for n in range(config.blocks)
        )

    def forward(self, x_MC: Tensor, level: Level, checkpointing: bool) -> Tensor:
        factor = position_factor(CELL_SIDE * level.resolution)
        x_MC = self.input(x_MC) + position_embedding(level.coords[:, 1:], self.width, factor)
        for block in self.blocks:
            x_MC = recompute(checkpointing, block, x_MC, level.block_index)
        return x_MC


class Encoder(nn.Module):
    """Active voxels to the mean and log-variance of every cell."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.widths
        self.input = nn.Linear(1, widths[0])
        self.down = nn.ModuleList(
            DownBlock(a, b, config.groups, plus_one=config.plus_one_pooling)
            for a, b in itertools.pairwise(widths)
        )
        self.transformer = _Transformer(widths[3], config)
        self.out = nn.Linear(widths[3], 2 * config.latent_channels)

    def forward(self, voxels: SparseTensor, checkpointing: bool) -> SparseTensor:
        x = voxels.replace(self.input(voxels.feats.to(self.input.weight.dtype)))
        for down in self.down:
            feats = recompute(checkpointing, down, x.feats, x)
            x = SparseTensor(feats, x.level.parents.level)
        hidden = self.transformer(x.feats, x.level, checkpointing)
        return x.replace(self.out(layer_norm(hidden, eps=1e-5)))


class Decoder(nn.Module):
    """Latents of every cell to its 512 values; nothing is pruned."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.transformer = _Transformer(config.latent_channels, config)
        self.up = nn.ModuleList(UpBlock(a, b) for a, b in itertools.pairwise(config.widths[::-1]))
        self.out = nn.Linear(config.widths[0], 1)

    def forward(self, z_MC: Tensor, level: Level, checkpointing: bool) -> Tensor:
        x = self.transformer(z_MC, level, checkpointing)
        for up, size in zip(self.up, SIZES, strict=True):
            x = recompute(checkpointing, self._step, up, x, level.neighbors, size)
        return sdf_head(x, self.out.weight[0], self.out.bias).view(-1, POINTS)

    @staticmethod
    def _step(up: UpBlock, x: Tensor, neighbors: Tensor, size: int) -> Tensor:
        return up(x if size == SIZES[0] else F.silu(x), neighbors, size)


class SparseVAE(nn.Module):
    """The SS-VAE. fp32 weights; under torch.autocast matrix products and convolutions run in its dtype.

    `activation_checkpointing`: keep one activation a block and recompute the others in the backward.
    """

    Config = VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        init_linears(self)
        zero_init(self.encoder.out)
        zero_init(self.decoder.out)
        with (
            torch.no_grad()
        ):  # little noise at first: a decoder learns nothing from latents that drown in it
            self.encoder.out.bias[config.latent_channels :] = LOGVAR_START

    def encode(self, batch: BrickBatch) -> Posterior:
        """The posterior of every cell of the batch, rows as in batch.cells.

        ValueError if a cell holds no active value: `BrickBatch.collate` drops those.
        """
        x = self.encoder(batch.voxels(), self.activation_checkpointing)
        if len(x.level) != len(batch.cells):
            found = f"{len(batch.cells) - len(x.level)} without"
            raise ValueError(
                f"batch must have an active value in each of its {len(batch.cells)} cells, got {found}"
            )
        moments = x.feats if x.feats.dtype == torch.float64 else x.feats.float()
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0), x.level)

    def decode(self, z_MC: Tensor, level: Level) -> Tensor:
        """fp32 [M, 512] in [-1, 1], sdf / tau of point 64 * lx + 8 * ly + lz of every cell.

        z [M, latent_channels]; level of resolution R / 8. ValueError if z has another shape.
        """
        shape = [len(level), self.config.latent_channels]
        if list(z_MC.shape) != shape:
            raise ValueError(f"z_MC must be {shape}, got {list(z_MC.shape)}")
        return self.decoder(z_MC, level, self.activation_checkpointing)

    def forward(
        self, batch: BrickBatch, noise_MC: Tensor | None = None
    ) -> tuple[Tensor, Posterior]:
        """(decoded values [M, 512], posterior); latents are the mean plus noise [M, latent_channels], if any."""
        posterior = self.encode(batch)
        z_MC = posterior.mean if noise_MC is None else posterior.sample(noise_MC)
        return self.decode(z_MC, posterior.level), posterior

    def flops(self, batch: BrickBatch) -> int:
        """Multiplications and additions of one forward pass; a training step needs three times as many.

        Counted where voxels are: no padding, no recomputation, and 8 taps a child after a duplication. One
        device-to-host copy.
        """
        return _flops(self.config, batch)

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a published VAE: its state dict, convolutions as torchsparse lays them out.

        They expect `plus_one_pooling`. ValueError listing every unknown or missing name and wrong shape.
        """
        copy_weights(weights, self, "the state dict", published_keys(self.config))


def _flops(config: VAEConfig, batch: BrickBatch) -> int:
    down, up = (list(itertools.pairwise(widths)) for widths in (config.widths, config.widths[::-1]))
    level, width, M = batch.voxels().level, config.widths[3], len(batch.cells)
    dense = (
        len(level) * config.widths[0] + M * POINTS * config.widths[0]
    )  # multiply-adds of linear layers
    sparse: list[Tensor] = []  # of the others, counted on the device
    for a, b in down:
        level = level.parents.level
        dense += len(level) * a * b
        sparse.append((level.neighbors >= 0).sum() * (a * b + b * b))
    for (a, b), size in zip(up, SIZES, strict=True):
        sparse.append(pairs_of_blocks(level.neighbors, size // 2, upsample=False) * (a * b))
        sparse.append(pairs_of_blocks(level.neighbors, size, upsample=True) * (b * b))
    for n in range(config.blocks):  # scores and weighted sums, in the encoder and in the decoder
        starts = level.block_index.shifted_starts if n % 2 else level.block_index.window_starts
        sparse.append(4 * width * starts.diff().long().square().sum())
    dense += M * width * (width + 3 * config.latent_channels)
    dense += 2 * M * config.blocks * (4 + 2 * config.mlp_ratio) * width * width
    return 2 * (dense + int(torch.stack(sparse).sum()))


def published_kernel(kernel: Tensor) -> Tensor:
    """torchsparse [27, in, out] counts its taps with x fastest, we with z: (dz, dy, dx) -> (dx, dy, dz)."""
    return kernel.unflatten(0, (3, 3, 3)).permute(2, 1, 0, 3, 4).flatten(0, 2)


def published_keys(config: VAEConfig) -> KeyMap:
    """Names and layouts of the published VAE -> ours."""
    keys: dict = {}

    def linear(theirs: str, ours: str) -> None:
        keys.update(
            {f"{theirs}.{name}": (f"{ours}.{name}", unchanged) for name in ("weight", "bias")}
        )

    def conv(theirs: str, ours: str) -> None:
        keys[f"{theirs}.conv.kernel"] = (f"{ours}.weight", published_kernel)
        keys[f"{theirs}.conv.bias"] = (f"{ours}.bias", unchanged)

    linear("encoder.input_layer1", "encoder.input")
    for n in range(3):
        theirs, ours = f"encoder.downsample.{n}", f"encoder.down.{n}"
        linear(f"{theirs}.act_layers.0", f"{ours}.norm1")
        conv(f"{theirs}.out_layers.0", f"{ours}.conv1")
        linear(f"{theirs}.out_layers.1", f"{ours}.norm2")
        conv(f"{theirs}.out_layers.3", f"{ours}.conv2")
        conv(f"{theirs}.skip_connection", f"{ours}.skip")
        keys[f"{theirs}.skip_connection.conv.kernel"] = (
            f"{ours}.skip.weight",
            torch.t,
        )  # [in, out]
        conv(f"decoder.upsample.{n}.act_layers.0", f"decoder.up.{n}.conv1")
        conv(f"decoder.upsample.{n}.out_layers.0", f"decoder.up.{n}.conv2")
    for part in ("encoder", "decoder"):
        linear(f"{part}.input_layer", f"{part}.transformer.input")
        linear(f"{part}.out_layer", f"{part}.out")
        for n in range(config.blocks):
            theirs, ours = f"{part}.blocks.{n}", f"{part}.transformer.blocks.{n}"
            linear(f"{theirs}.attn.to_qkv", f"{ours}.attention.qkv")
            linear(f"{theirs}.attn.to_out", f"{ours}.attention.out")
            linear(f"{theirs}.mlp.mlp.0", f"{ours}.mlp.0")
            linear(f"{theirs}.mlp.mlp.2", f"{ours}.mlp.2")
    return keys
