"""Training batches of the structure stage: occupancy grids of a build together with its renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.conditioning.image_encoder import ImageBatch
from model.rectified_flow import draw_noise
from pipeline.core.hashing import seed_of
from train.data.bricks import ONE_BITS, BrickLoader, BuildIndex, magnitude_bits
from train.data.config import SampleUse
from train.data.render_conditions import sample_time
from train.data.symmetry import SYMMETRIES, transform_points
from train.engine.batch_sampler import SampleId, StepSamples
from train.stages.conditioned import ConditionedBatch, choose_views, collate_views
from train.stages.structure.config import StructureTraining

CELLS_KEPT = 1 << 14  # assets whose cells stay in memory, about 20 kB each


@dataclass(frozen=True, kw_only=True)
class GridBatch(ConditionedBatch):
    """The part of a step's samples that one rank trains either part of the stage on.

    `noise` has s^3 rows per asset, one for each latent.

    Args:
        occupied: Whether each cell is occupied, bool [B, S, S, S].
        symmetries: Symmetry of SYMMETRIES by which each asset is transformed. The uid of an asset
            and its symmetry determine its grid.
        images: Prepared images of each asset. None when the occupancy VAE is trained.
    """

    occupied: Tensor
    symmetries: tuple[int, ...]
    images: ImageBatch | None


class GridLoader(BrickLoader):
    """Loads a rank's samples of a step: occupancy grids, times, noise and optionally renders.

    A batch depends on its samples alone. An asset that cannot be read is replaced as `BrickLoader`
    does it.

    Args:
        index: Assets of the build.
        cfg: Options of the run.
        images: Whether each sample gets a render, as the flow needs it.
        use: What the samples are for. Grids are transformed to train the VAE.
    """

    def __init__(
        self,
        index: BuildIndex,
        cfg: StructureTraining,
        *,
        images: bool,
        use: SampleUse = "training",
    ):
        part = cfg.flow if images else cfg.vae
        channels = cfg.model.occupancy.latent_channels
        super().__init__(index, seed=part.loop.seed, noise_channels=channels, symmetries=False)
        self.cfg = cfg
        self.training = use == "training"
        self._cells = lru_cache(CELLS_KEPT)(self._read_cells)
        self.conditions = None
        if images:
            self.conditions = choose_views(index, cfg, cfg.flow, cfg.model.flow, use)

    def load(self, step: StepSamples, rank: int) -> GridBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load the batch of one rank in one step.

        Raises:
            RunError: If too many assets cannot be read.
        """
        return self.batch(step.ranks[rank], step.loss_weight)

    def _read_cells(self, asset: int) -> tuple[int, NDArray[np.int16]]:
        """Return an asset, or the one that replaces it, and its occupied cells, [M, 3]."""
        asset, bricks = self._readable(asset, self.cfg.resolution)
        return asset, bricks.cells[magnitude_bits(bricks.values).min(axis=1) < ONE_BITS]

    def batch(self, samples: Sequence[SampleId], share: float) -> GridBatch:
        """Load a batch of chosen samples on the CPU.

        Args:
            samples: Assets and epochs.
            share: Weight of one sample in the loss.

        Raises:
            RunError: If too many assets cannot be read.
        """
        cfg = self.cfg
        side = cfg.model.occupancy.side
        occupied = torch.zeros(len(samples), side, side, side, dtype=torch.bool)
        seeds = []
        uids = []
        symmetries = []
        images = []
        times = []
        dropped = []
        found = self.reader.concurrent.map(self._cells, [sample.asset for sample in samples])
        for number, (sample, (asset, cells)) in enumerate(zip(samples, found, strict=True)):
            uid = self.index.uids[asset]
            # Seeds use names instead of numbers: a sample is the same in every index.
            key = (self.seed, "structure", cfg.resolution, sample.epoch, uid)
            symmetry = 0
            if self.conditions is not None:
                symmetry = self.conditions.symmetry(asset, sample.epoch, key)
            elif self.training and cfg.vae.symmetries:
                symmetry = seed_of("symmetry", *key) % len(SYMMETRIES)
            cells = transform_points(cells, side, symmetry)
            occupied[number, *torch.from_numpy(cells.astype(np.int64)).T] = True
            seeds.append(seed_of("noise", *key) >> 1)
            uids.append(uid)
            symmetries.append(symmetry)
            time, is_dropped = sample_time(cfg.flow, key, training=self.training)
            times.append(time)
            dropped.append(is_dropped)
            if self.conditions is not None:
                images.append(self.conditions.images(asset, sample.epoch, key))
        latents = cfg.model.occupancy.latent_side**3
        return GridBatch(
            occupied=occupied,
            noise=draw_noise(seeds, [latents] * len(samples), self.noise_channels),
            times=torch.cat(times),
            dropped=torch.tensor(dropped),
            images=collate_views(images, cfg.model.flow) if images else None,
            share=share,
            uids=tuple(uids),
            symmetries=tuple(symmetries),
        )
