"""Training batches of the SS-DiT: latents of a build together with its renders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.conditioning.image_encoder import ImageBatch
from model.rectified_flow import draw_noise
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import seed_of
from pipeline.storage.remote import stop_reading
from train.data.bricks import UNREADABLE, BuildIndex, read_build_index
from train.data.config import SampleUse
from train.data.latents import Latent, LatentBatch, LatentStore
from train.data.render_conditions import sample_time
from train.data.source import ConcurrentReader, open_source
from train.engine.batch_sampler import SampleId, StepSamples
from train.stages.conditioned import ConditionedBatch, choose_views, collate_views
from train.stages.dit.config import DiTTraining

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DiTBatch(ConditionedBatch):
    """The part of a step's samples that one rank trains the SS-DiT on.

    Args:
        latents: Posteriors of the assets' latents.
        posterior_noise: Standard normal noise, fp32 [N, C], with which latents are drawn from their
            posteriors.
        images: Prepared images of each asset.
        resolution: Resolution R of the cells that the latents describe.
    """

    latents: LatentBatch
    posterior_noise: Tensor
    images: ImageBatch
    resolution: int

    @property
    def metric_labels(self) -> dict[str, int]:
        """Values that are copied into the step's metrics."""
        return {"resolution": self.resolution}


def index_with_latents(cfg: DiTTraining, store: LatentStore) -> BuildIndex:
    """Return the build's assets that have latents. Their token counts are those of the latents.

    Raises:
        UserError: If more than `max_missing_share` of the assets with bricks lack latents. A few
            may lack them, because the encoder skips bricks that it cannot read.
    """
    index = read_build_index(open_source(cfg.data, cfg.cache), [cfg.resolution])
    tokens = np.array([store.tokens.get(uid, 0) for uid in index.uids], np.int64)
    has_bricks = index.tokens[cfg.resolution] > 0
    missing = [index.uids[asset] for asset in np.flatnonzero(has_bricks & (tokens == 0))]
    count = f"{len(missing)} of {has_bricks.sum()} assets"
    if len(missing) > cfg.max_missing_share * has_bricks.sum():
        raise UserError(
            f"{count} of {cfg.data} have no latents in {store.folder}, for example {missing[0]}; "
            f"run python -m train.encode --vae {cfg.vae or 'CHECKPOINT'} --data {cfg.data} "
            f"--latents {store.root} --resolutions {cfg.resolution}"
        )
    if missing:
        log.warning("%s of %s have no latents and are skipped.", count, cfg.data)
    return replace(index, tokens={cfg.resolution: tokens}).subset(np.flatnonzero(tokens))


class DiTLoader:
    """Loads a rank's samples of a step: latents, renders of the same assets, times and noise.

    A batch depends on its samples alone.

    Args:
        index: Assets with latents.
        store: The latents.
        cfg: Options of the run.
        use: What the samples are for.
    """

    def __init__(
        self,
        index: BuildIndex,
        store: LatentStore,
        cfg: DiTTraining,
        use: SampleUse = "training",
    ):
        self.index = index
        self.store = store
        self.cfg = cfg
        self.training = use == "training"
        self.concurrent = ConcurrentReader(index.root, store.folder)
        self.conditions = choose_views(index, cfg, cfg.flow, cfg.model, use)

    def load(self, step: StepSamples, rank: int) -> DiTBatch:
        """Load the batch of one rank in one step.

        Raises:
            RunError: If an asset cannot be read.
        """
        return self.batch(step.ranks[rank], step.loss_weight)

    def close(self) -> None:
        """End reads that wait for a store. Nothing can be read from it any more."""
        stop_reading(self.index.root, self.store.root)

    def batch(self, samples: Sequence[SampleId], share: float) -> DiTBatch:
        """Load a batch of chosen samples on the CPU.

        Args:
            samples: Assets and epochs.
            share: Weight of one sample in the loss.

        Raises:
            RunError: If an asset cannot be read.
        """
        cfg = self.cfg
        times = []
        dropped = []
        posterior_seeds = []
        noise_seeds = []
        uids = tuple(self.index.uids[sample.asset] for sample in samples)
        # Seeds use names instead of numbers: a sample is the same in every index.
        keys = [
            (cfg.flow.loop.seed, "dit", cfg.resolution, sample.epoch, uid)
            for sample, uid in zip(samples, uids, strict=True)
        ]
        symmetries = [
            self.conditions.symmetry(sample.asset, sample.epoch, key)
            for sample, key in zip(samples, keys, strict=True)
        ]
        latents = self.concurrent.map(
            lambda number: self._read_latent(uids[number], symmetries[number]), range(len(uids))
        )
        images = self.concurrent.map(
            lambda number: self.conditions.images(
                samples[number].asset, samples[number].epoch, keys[number]
            ),
            range(len(samples)),
        )
        for key in keys:
            time, is_dropped = sample_time(cfg.flow, key, training=self.training)
            times.append(time)
            dropped.append(is_dropped)
            posterior_seeds.append(seed_of("posterior", *key) >> 1)
            noise_seeds.append(seed_of("noise", *key) >> 1)
        counts = [len(latent.cells) for latent in latents]
        channels = self.store.channels
        return DiTBatch(
            latents=LatentBatch.collate(latents, cfg.resolution),
            posterior_noise=draw_noise(posterior_seeds, counts, channels),
            noise=draw_noise(noise_seeds, counts, channels),
            times=torch.cat(times),
            dropped=torch.tensor(dropped),
            images=collate_views(images, cfg.model),
            resolution=cfg.resolution,
            share=share,
            uids=uids,
        )

    def _read_latent(self, uid: str, symmetry: int) -> Latent:
        store = self.store.turned(symmetry)
        try:
            return store.read(uid)
        except UNREADABLE as error:
            raise RunError(
                f"the latents of {uid} in {store.folder} cannot be read: {error!r}; remove "
                "its shard there and run the same python -m train.encode again"
            ) from error
