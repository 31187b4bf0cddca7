"""A build's latents, and renders to go with them, as the SS-DiT's batches."""

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
from train.data.bricks import UNREADABLE, BuildIndex, read_build_index
from train.data.latents import Latent, LatentBatch, LatentStore
from train.data.render_conditions import RenderConditions, sample_time
from train.engine.batch_sampler import SampleId, StepSamples
from train.stages.dit.config import DiTTraining

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DiTBatch:
    """What one rank works on in one step. What is random in it is each asset's own, whatever it is batched with."""

    latents: LatentBatch
    posterior_noise: (
        Tensor  # fp32 standard normal [N, C], by which the latents are drawn from their posteriors
    )
    noise: Tensor  # fp32 standard normal [N, C], where the flow begins
    times: Tensor  # fp32 [B] in (0, 1)
    dropped: Tensor  # bool [B] trained without the image
    images: ImageBatch
    resolution: int  # R
    share: float  # weight of one sample: ranks / samples of all of them
    uids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return len(self.noise)

    @property
    def samples(self) -> int:
        return len(self.uids)

    @property
    def metric_labels(self) -> dict[str, int]:
        return {"resolution": self.resolution}

    def to(self, device: torch.device) -> DiTBatch:
        """The same batch there."""
        if device.type == "cpu":
            return self
        names = ("latents", "posterior_noise", "noise", "times", "dropped", "images")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def joined(cfg: DiTTraining, store: LatentStore) -> BuildIndex:
    """The build's assets that have latents, counted in their cells.

    UserError, with what to run, if more than max_missing_share of those that have bricks lack latents: the rest are
    those that the encoder could not read.
    """
    index = read_build_index(cfg.data, [cfg.resolution])
    tokens = np.array([store.tokens.get(uid, 0) for uid in index.uids], np.int64)
    wanted = index.tokens[cfg.resolution] > 0
    missing = [index.uids[n] for n in np.flatnonzero(wanted & (tokens == 0))]
    said = (
        f"{len(missing)} of {wanted.sum()} assets of {cfg.data} have no latents in {store.folder}"
    )
    if len(missing) > cfg.max_missing_share * wanted.sum():
        raise UserError(
            f"{said}, {missing[0]} for one; make them: python -m train.encode --vae {cfg.vae or 'CHECKPOINT'} "
            f"--data {cfg.data} --latents {store.folder.parents[1]} --resolutions {cfg.resolution}"
        )
    if missing:
        log.warning("%s and are left out", said)
    return replace(index, tokens={cfg.resolution: tokens}).subset(np.flatnonzero(tokens))


class DiTLoader:
    """Turns a planned step into this rank's batch: latents and renders of the same assets. Depends on the plan alone.

    RunError, with what to run, for an asset that cannot be read. Options as `RenderConditions`.
    """

    def __init__(
        self,
        index: BuildIndex,
        store: LatentStore,
        cfg: DiTTraining,
        *,
        training: bool = True,
        held_out_only: bool = False,
    ):
        self.index, self.store, self.cfg, self.training = index, store, cfg, training
        self.conditions = RenderConditions(
            index,
            cfg.flow,
            cameras=cfg.cameras,
            image_size=cfg.model.encoder.image_size,
            held_out=cfg.held_out_views,
            training=training,
            held_out_only=held_out_only,
            ahead=2 * cfg.flow.open_shards if training else 0,
        )

    def load(self, plan: StepSamples, rank: int) -> DiTBatch:
        """The batch of one rank in one step."""
        return self.batch(plan.ranks[rank], len(plan.ranks) / sum(map(len, plan.ranks)))

    def batch(self, draws: Sequence[SampleId], share: float) -> DiTBatch:
        """A batch of the given draws; on the CPU."""
        cfg, seed = self.cfg, self.cfg.flow.loop.seed
        latents, images, times, dropped, seeds = [], [], [], [], []
        uids = tuple(self.index.uids[draw.asset] for draw in draws)
        for draw, uid in zip(draws, uids, strict=True):
            key = (seed, "dit", cfg.resolution, draw.epoch, uid)  # names, not numbers
            latents.append(self._latent(uid))
            images.append(self.conditions.image(draw.asset, draw.epoch, key))
            time, drop = sample_time(cfg.flow, key, training=self.training)
            times.append(time)
            dropped.append(drop)
            seeds.append([seed_of(name, *key) >> 1 for name in ("posterior", "noise")])
        counts = [len(latent.cells) for latent in latents]
        posterior, noise = (
            draw_noise(of, counts, self.store.channels) for of in zip(*seeds, strict=True)
        )
        return DiTBatch(
            latents=LatentBatch.collate(latents, cfg.resolution),
            posterior_noise=posterior,
            noise=noise,
            times=torch.cat(times),
            dropped=torch.tensor(dropped),
            images=ImageBatch.collate(images),
            resolution=cfg.resolution,
            share=share,
            uids=uids,
        )

    def _latent(self, uid: str) -> Latent:
        try:
            return self.store.read(uid)
        except UNREADABLE as error:
            raise RunError(
                f"latents of {uid} in {self.store.folder}: {error!r}; remove its shard there and run "
                f"python -m train.encode again, with the --vae and --data it is of"
            ) from error
