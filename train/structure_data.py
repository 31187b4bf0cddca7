"""A build's occupancy grids, and renders to go with them, as the structure stage's batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.condition import ImageBatch
from model.flow import noise_of
from model.images import prepare_image
from pipeline.schema import RunError, UserError, seed_of
from train.data import OPEN_SHARDS, UNREADABLE, BrickLoader, Catalogue
from train.plan import Draw, Plan
from train.structure_config import StructureTraining
from train.symmetry import SYMMETRIES, transform_points

if TYPE_CHECKING:
    from pipeline.shards import RenderShard


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
    def about(self) -> dict[str, int]:
        return {}

    def to(self, device: torch.device) -> GridBatch:
        """The same batch there."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).to(device) for name in ("occupied", "noise", "times", "dropped")}
        return replace(self, images=None if self.images is None else self.images.to(device), **moved)


class ViewReader:
    """Single renders of a catalogue; safe to use from several threads. UserError if a shard has none."""

    def __init__(self, catalogue: Catalogue, cameras: str):
        self.catalogue, self.cameras = catalogue, cameras
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def views(self, asset: int) -> int:
        """How many views the asset's shard has of each of its assets."""
        with self._lock:
            return self._open(self.catalogue.shards[asset])[1]

    def read(self, asset: int, view: int) -> NDArray[np.uint8]:
        """RGBA [h, w, 4]. RunError, with what to run, if it cannot be read."""
        name, uid = self.catalogue.shards[asset], self.catalogue.uids[asset]
        with self._lock:
            shard = self._open(name)[0]
        try:
            return shard.read(uid, view).rgba
        except UNREADABLE as error:
            root = self.catalogue.root
            raise RunError(
                f"view {view} of {uid} in {shard.path}: {error}; run python -m pipeline.verify {root}"
            ) from error

    def _open_shard(self, name: str) -> tuple[RenderShard, int]:
        from pipeline.shards import RenderShard  # here: importing the stream does not take pyarrow and Pillow

        root = self.catalogue.root
        if not (root / "shards" / name / f"renders-{self.cameras}.json").exists():
            raise UserError(
                f"{root} has no renders of cameras {self.cameras} in shard {name}; add them: "
                f"python -m pipeline.build --out {root} --cameras {self.cameras}"
            )
        shard = RenderShard(root / "renders" / self.cameras / f"{name}.tar")
        return shard, len(shard.keys) // len(shard.uids)


class GridLoader(BrickLoader):
    """Turns a planned step into this rank's batch; depends on the plan alone, as `BrickLoader`.

    With `images` every sample gets a view of its asset, in another order each time round; `held_out` views of each
    asset, the last ones, are left alone, or with `held_out_only` are all that is drawn.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        cfg: StructureTraining,
        *,
        images: bool,
        training: bool = True,
        held_out_only: bool = False,
    ):
        half = cfg.flow if images else cfg.vae
        channels = cfg.model.occupancy.latent_channels
        super().__init__(catalogue, seed=half.loop.seed, noise_channels=channels, symmetries=False)
        self.cfg, self.training, self.held_out_only = cfg, training, held_out_only
        self.views = ViewReader(catalogue, cfg.cameras) if images else None

    def load(self, plan: Plan, rank: int) -> GridBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batch of one rank in one step."""
        return self.batch(plan.ranks[rank], len(plan.ranks) / sum(map(len, plan.ranks)))

    def batch(self, draws: Sequence[Draw], share: float) -> GridBatch:
        """A batch of the given draws."""
        cfg, side = self.cfg, self.cfg.model.occupancy.side
        occupied = torch.zeros(len(draws), side, side, side, dtype=torch.bool)
        seeds, uids, prepared, times, dropped = [], [], [], [], []
        for number, draw in enumerate(draws):
            asset, bricks = self._readable(draw.asset, cfg.resolution)
            uid = self.catalogue.uids[asset]
            key = (self.seed, "structure", cfg.resolution, draw.epoch, uid)  # names, not numbers
            cells = bricks.blocks[(np.abs(bricks.values) < 1).any(axis=1)]
            if self.views is None and self.training and cfg.vae.symmetries:
                cells = transform_points(cells, side, seed_of("symmetry", *key) % len(SYMMETRIES))
            occupied[number, *torch.from_numpy(cells.astype(np.int64)).T] = True
            seeds.append(seed_of("noise", *key) >> 1)
            uids.append(uid)
            generator = torch.Generator().manual_seed(seed_of("time", *key) >> 1)
            times.append(cfg.flow.times.sample(1, generator))
            dropped.append(self.training and torch.rand((), generator=generator).item() < cfg.flow.dropout)
            if self.views is not None:
                prepared.append(self._image(asset, draw.epoch, key))
        latents = cfg.model.occupancy.latent_side**3
        return GridBatch(
            occupied=occupied,
            noise=noise_of(seeds, [latents] * len(draws), self.noise_channels),
            times=torch.cat(times),
            dropped=torch.tensor(dropped),
            images=ImageBatch.collate(prepared) if prepared else None,
            share=share,
            uids=tuple(uids),
        )

    def view_of(self, asset: int, epoch: int) -> int:
        """Which view the asset's `epoch`-th sample sees: all that are allowed, then all again in another order."""
        assert self.views is not None
        count, held = self.views.views(asset), self.cfg.held_out_views
        if held >= count:
            raise UserError(f"held_out_views must be below the {count} views there are, got {held}")
        allowed = np.arange(count - held, count) if self.held_out_only and held else np.arange(count - held)
        turn, place = divmod(epoch, len(allowed))
        order = np.random.default_rng(seed_of("view", self.seed, self.catalogue.uids[asset], turn))
        return int(order.permutation(allowed)[place])

    def _image(self, asset: int, epoch: int, key: tuple):
        assert self.views is not None
        pixels = self.views.read(asset, self.view_of(asset, epoch))
        size, flow = self.cfg.model.flow.encoder.image_size, self.cfg.flow
        if not (self.training and flow.augment):
            return prepare_image(pixels, size, whole_if_opaque=True)
        rng = np.random.default_rng(seed_of("augmentation", *key))
        return prepare_image(pixels, size, augmentation=flow.augmentation, rng=rng, whole_if_opaque=True)
