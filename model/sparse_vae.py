"""SS-VAE: sparse SDF bricks to latents of each cell, and back to the 512 values of every cell."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import sdf_head
from model import layers
from model.checkpoint import copy_weights
from model.config import VAEConfig
from model.conv import DownBlock, UpBlock, count_pairs
from model.gaussian import Gaussian
from model.published_weights import published_vae_keys
from model.sparse_tensor import POINTS, BrickBatch, Level, SparseTensor
from pipeline.core.grid import CELL_SIDE

LOGVAR_START = -6.0  # log-variance of every latent before training
LOGVAR_RANGE = (-30.0, 20.0)  # Direct3D-S2 paper (arXiv 2505.17412), section 3
DECODER_SIDES = (2, 4, 8)  # voxels along one side of a cell after each block of the decoder


@dataclass(frozen=True, eq=False)
class Posterior(Gaussian):
    """The encoder's result: a diagonal Gaussian for every cell.

    Attributes:
        mean: fp32 [M, latent_channels].
        logvar: fp32 [M, latent_channels], the logarithm of the variance, in [-30, 20].
        level: The cells, rows as in `BrickBatch.cells`. The decoder uses their cached indices.
    """

    level: Level


class _Transformer(nn.Module):
    """Window blocks after a linear layer and positions: the middle of encoder and decoder."""

    def __init__(self, in_channels: int, config: VAEConfig):
        super().__init__()
        self.width = config.widths[3]
        self.input = nn.Linear(in_channels, self.width)
        self.blocks = nn.ModuleList(
            layers.WindowBlock(
                self.width, config.heads, shifted=n % 2 == 1, mlp_ratio=config.mlp_ratio
            )
            for n in range(config.blocks)
        )

    def forward(self, x_MC: Tensor, level: Level, checkpointing: bool) -> Tensor:
        factor = layers.position_factor(CELL_SIDE * level.resolution)
        x_MC = self.input(x_MC) + layers.position_embedding(level.coords[:, 1:], self.width, factor)
        for block in self.blocks:
            x_MC = layers.recompute(checkpointing, block, x_MC, level.block_index)
        return x_MC


class Encoder(nn.Module):
    """Active grid points to the mean and log-variance of every cell."""

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
        """Encode [N, 1] at resolution R to [M, 2 * latent_channels] at R / 8."""
        x = voxels.replace(self.input(voxels.feats.to(self.input.weight.dtype)))
        for down in self.down:
            feats = layers.recompute(checkpointing, down, x.feats, x)
            x = SparseTensor(feats, x.level.parents.level)
        hidden_MC = self.transformer(x.feats, x.level, checkpointing)
        return x.replace(self.out(layers.layer_norm(hidden_MC, eps=1e-5)))


class Decoder(nn.Module):
    """Latents of every cell to its 512 values. No voxel is pruned."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.transformer = _Transformer(config.latent_channels, config)
        self.up = nn.ModuleList(UpBlock(a, b) for a, b in itertools.pairwise(config.widths[::-1]))
        self.out = nn.Linear(config.widths[0], 1)

    def forward(self, z_MC: Tensor, level: Level, checkpointing: bool) -> tuple[Tensor, Tensor]:
        """Decode [M, latent_channels] to fp32 [M, 512].

        Also returns the features of all values before the last SiLU, [M * 512, widths[0]].
        """
        x_NC = self.transformer(z_MC, level, checkpointing)
        for up, side in zip(self.up, DECODER_SIDES, strict=True):
            x_NC = layers.recompute(checkpointing, self._upsample, up, x_NC, level.neighbors, side)
        return sdf_head(x_NC, self.out.weight[0], self.out.bias).view(-1, POINTS), x_NC

    @staticmethod
    def _upsample(up: UpBlock, x_NC: Tensor, neighbors: Tensor, side: int) -> Tensor:
        # The SiLU after a block is recomputed together with the next block.
        return up(x_NC if side == DECODER_SIDES[0] else F.silu(x_NC), neighbors, side)


class SparseVAE(nn.Module):
    """The SS-VAE of Direct3D-S2.

    Weights are fp32. Under torch.autocast matrix products and convolutions use its dtype.

    Attributes:
        config: Sizes of the model.
        activation_checkpointing: If true, only the input of each block is kept for the backward
            pass, which computes the other activations again.
    """

    Config = VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        layers.init_linears(self)
        layers.zero_init(self.encoder.out)
        layers.zero_init(self.decoder.out)
        # The noise is small at first: a decoder learns nothing from latents that are mostly noise.
        with torch.no_grad():
            self.encoder.out.bias[config.latent_channels :] = LOGVAR_START

    def encode(self, batch: BrickBatch) -> Posterior:
        """Encode bricks.

        Args:
            batch: Bricks of M cells.

        Returns:
            The posterior of every cell, rows as in `batch.cells`.

        Raises:
            ValueError: If a cell holds no active value. `BrickBatch.collate` drops such cells.
        """
        x = self.encoder(batch.voxels(), self.activation_checkpointing)
        if len(x.level) != len(batch.cells):
            raise ValueError(
                f"batch must have an active value in each of its {len(batch.cells)} cells, "
                f"got {len(batch.cells) - len(x.level)} without"
            )
        moments = x.feats if x.feats.dtype == torch.float64 else x.feats.float()
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE), x.level)

    def decode(self, z_MC: Tensor, level: Level) -> Tensor:
        """Decode latents.

        Args:
            z_MC: [M, latent_channels].
            level: The M cells, at resolution R / 8.

        Returns:
            fp32 [M, 512] in [-1, 1], sdf / tau at grid point 64 * lx + 8 * ly + lz of every cell.

        Raises:
            ValueError: If `z_MC` has another shape.
        """
        return self._decode(z_MC, level)[0]

    def decode_with_features(self, z_MC: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Decode latents, and return the features that a refiner takes.

        Args:
            z_MC: [M, latent_channels].
            level: The M cells, at resolution R / 8.

        Returns:
            The values of `decode`, and the features of all values in the same order,
            [M * 512, widths[0]].

        Raises:
            ValueError: If `z_MC` has another shape.
        """
        values_MK, hidden_NC = self._decode(z_MC, level)
        return values_MK, F.silu(hidden_NC)

    def _decode(self, z_MC: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        shape = [len(level), self.config.latent_channels]
        if list(z_MC.shape) != shape:
            raise ValueError(f"z_MC must be {shape}, got {list(z_MC.shape)}")
        return self.decoder(z_MC, level, self.activation_checkpointing)

    def forward(
        self, batch: BrickBatch, noise_MC: Tensor | None = None
    ) -> tuple[Tensor, Posterior]:
        """Encode and decode bricks.

        Args:
            batch: Bricks of M cells.
            noise_MC: Standard normal [M, latent_channels]. None decodes the means.

        Returns:
            The decoded values [M, 512] and the posterior.
        """
        posterior = self.encode(batch)
        z_MC = posterior.mean if noise_MC is None else posterior.sample(noise_MC)
        return self.decode(z_MC, posterior.level), posterior

    def flops(self, batch: BrickBatch) -> int:
        """Count the multiplications and additions of one forward pass.

        A training step needs three times as many. Only pairs of voxels that exist count, with 8
        taps a child after a duplication, and recomputed activations do not count. This copies from
        the device to the host once.
        """
        return _flops(self.config, batch)

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a published SS-VAE.

        The model must have been made with `plus_one_pooling`.

        Args:
            weights: The published state dict, convolutions in the layout of torchsparse.

        Raises:
            CheckpointError: If names or shapes do not fit. The message lists all of them.
        """
        copy_weights(weights, self, "the state dict", published_vae_keys(self.config))


def _flops(config: VAEConfig, batch: BrickBatch) -> int:
    down = list(itertools.pairwise(config.widths))
    up = list(itertools.pairwise(config.widths[::-1]))
    level = batch.voxels().level
    width = config.widths[3]
    M = len(batch.cells)
    # `dense` counts the multiply-adds of the linear layers, which depend on numbers of rows alone.
    # `sparse` has those that depend on which voxels exist. They are counted on the device.
    dense = len(level) * config.widths[0] + M * POINTS * config.widths[0]
    sparse: list[Tensor] = []
    # Convolutions of the encoder, and its skip connections.
    for a, b in down:
        level = level.parents.level
        dense += len(level) * a * b
        sparse.append((level.neighbors >= 0).sum() * (a * b + b * b))
    # Convolutions of the decoder.
    for (a, b), side in zip(up, DECODER_SIDES, strict=True):
        sparse.append(count_pairs(level.neighbors, side // 2, upsample=False) * (a * b))
        sparse.append(count_pairs(level.neighbors, side, upsample=True) * (b * b))
    # Scores and weighted sums of the windows, in the encoder and in the decoder.
    for n in range(config.blocks):
        index = level.block_index
        starts = index.shifted_starts if n % 2 else index.window_starts
        sparse.append(4 * width * starts.diff().long().square().sum())
    # Linear layers of the transformers.
    dense += M * width * (width + 3 * config.latent_channels)
    dense += 2 * M * config.blocks * (4 + 2 * config.mlp_ratio) * width * width
    return 2 * (dense + int(torch.stack(sparse).sum()))
