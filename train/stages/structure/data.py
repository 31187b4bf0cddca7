"""A build's occupancy grids, and renders to go with them, as the structure stage's batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.conditioning.image_encoder import ImageBatch
from model.rectified_flow import draw_noise
from pipeline.core.hashing import seed_of
from train.data.bricks import ONE_BITS, BrickLoader, BuildIndex, magnitude_bits
from train.data.render_conditions import RenderConditions, sample_time
from train.data.symmetry import SYMMETRIES, transform_points
from train.engine.batch_sampler import SampleId, StepSamples
from train.stages.structure.config import StructureTraining

CELLS_KEPT = 1 << 14  # assets whose cells are kept rather than read again, some 20 kB each


@dataclass(frozen=True, kw_only=True)
class GridBatch:
    """What one rank works on in one step; `images` and `dropped` for the flow alone."""

    occupied: Tensor  # bool [B, S, S, S]
    noise: Tensor  # fp32 standard normal [B * s^3, C], rows by asset: each asset's own wherever it runs
    times: Tensor  # fp32 [B] in (0, 1)
    dropped: Tensor  # bool [B] trained without the image
    images: ImageBatch | None
    share: float  # weight of one sample: ranks / samples of all of them
    uids: tuple[str, ...]

    @property
    def samples(self) -> int:
        return len(self.uids)

    @property
    def tokens(self) -> int:
        return len(self.noise)

    @property
    def metric_labels(self) -> dict[str, int]:
        return {}

    def to(self, device: torch.device) -> GridBatch:
        """The same batch there."""
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in ("occupied", "noise", "times", "dropped")
        }
        return replace(
            self, images=None if self.images is None else self.images.to(device), **moved
        )


class GridLoader(BrickLoader):
    """Turns a planned step into this rank's batch; depends on the plan alone, as `BrickLoader`.

    With `images` every sample gets a view of its asset, as `RenderConditions` chooses it.
    """

    def __init__(
        self,
        index: BuildIndex,
        cfg: StructureTraining,
        *,
        images: bool,
        training: bool = True,
        held_out_only: bool = False,
    ):
        half = cfg.flow if images else cfg.vae
        channels = cfg.model.occupancy.latent_channels
        super().__init__(index, seed=half.loop.seed, noise_channels=channels, symmetries=False)
        self.cfg, self.training = cfg, training
        self._cells = lru_cache(CELLS_KEPT)(self._read_cells)
        self.conditions = None
        if images:
            self.conditions = RenderConditions(
                index,
                cfg.flow,
                cameras=cfg.cameras,
                image_size=cfg.model.flow.encoder.image_size,
                held_out=cfg.held_out_views,
                training=training,
                held_out_only=held_out_only,
                ahead=2 * cfg.flow.open_shards if training else 0,
            )

    def load(self, plan: StepSamples, rank: int) -> GridBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batch of one rank in one step."""
        return self.batch(plan.ranks[rank], len(plan.ranks) / sum(map(len, plan.ranks)))

    def _read_cells(self, asset: int) -> tuple[int, NDArray[np.int16]]:
        """The asset that is read in its place, mostly itself, and its occupied cells, [M, 3]."""
        found, bricks = self._readable(asset, self.cfg.resolution)
        return found, bricks.cells[magnitude_bits(bricks.values).min(axis=1) < ONE_BITS]

    def batch(self, draws: Sequence[SampleId], share: float) -> GridBatch:
        """A batch of the given draws."""
        cfg, side = self.cfg, self.cfg.model.occupancy.side
        occupied = torch.zeros(len(draws), side, side, side, dtype=torch.bool)
        seeds, uids, prepared, times, dropped = [], [], [], [], []
        for number, draw in enumerate(draws):
            asset, cells = self._cells(draw.asset)
            uid = self.index.uids[asset]
            key = (self.seed, "structure", cfg.resolution, draw.epoch, uid)  # names, not numbers
            if self.conditions is None and self.training and cfg.vae.symmetries:
                cells = transform_points(cells, side, seed_of("symmetry", *key) % len(SYMMETRIES))
            occupied[number, *torch.from_numpy(cells.astype(np.int64)).T] = True
            seeds.append(seed_of("noise", *key) >> 1)
            uids.append(uid)
            time, drop = sample_time(cfg.flow, key, training=self.training)
            times.append(time)
            dropped.append(drop)
            if self.conditions is not None:
                prepared.append(self.conditions.image(asset, draw.epoch, key))
        latents = cfg.model.occupancy.latent_side**3
        return GridBatch(
            occupied=occupied,
            noise=draw_noise(seeds, [latents] * len(draws), self.noise_channels),
            times=torch.cat(times),
            dropped=torch.tensor(dropped),
            images=ImageBatch.collate(prepared) if prepared else None,
            share=share,
            uids=tuple(uids),
        )
