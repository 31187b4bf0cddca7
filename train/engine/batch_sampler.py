"""Batch samplers: which assets make up which training step, on which rank.

They read no data. The samples of a step follow from the seed and the step's number.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.core.hashing import seed_of


@dataclass(frozen=True)
class SampleId:
    """One sample: an asset in one epoch. Its augmentation and noise depend on both."""

    asset: int  # row of the build index
    epoch: int  # how often the asset was drawn before at this resolution


@dataclass(frozen=True)
class StepSamples:
    """The samples of one training step."""

    step: int
    resolution: int
    ranks: tuple[tuple[SampleId, ...], ...]  # samples of each rank

    @property
    def loss_weight(self) -> float:
        """Weight of one sample, with which the mean over ranks is the mean over all samples."""
        return len(self.ranks) / sum(map(len, self.ranks))


class BatchSampler:
    """Draws the samples of one step after another.

    Every resolution has its own endless sequence of permutations of its assets. A step takes the
    next `batch_size * world_size` samples of one resolution, or fewer if a rank would exceed
    `max_tokens`; the remaining ones come first in the next step of this resolution. The largest
    samples are assigned first, each to the rank with the fewest tokens.

    With a token budget, a step takes as many of the next samples as the ranks' budgets hold instead
    of a fixed number. Every sample has the same weight in the loss of its step (see
    `StepSamples.loss_weight`), so that a sample counts more in a step with fewer of them.

    Args:
        tokens: Number of cells of each asset, int64 [A], by resolution. 0 where an asset has none.
        batch_size: Mean number of samples per rank. A token budget replaces it.
        world_size: Number of ranks.
        seed: Seed of all draws.
        max_tokens: Largest number of cells per rank. Larger assets are left out. None: no limit.
        token_budget: Number of cells per rank that a step is filled up to. It is not more than
            `max_tokens`. Assets that exceed it alone are left out. None: no budget.

    Attributes:
        left_out: Number of assets that exceed `max_tokens`, by resolution.

    Raises:
        UserError: If a resolution has no usable asset.
    """

    def __init__(
        self,
        tokens: Mapping[int, NDArray[np.int64]],
        *,
        batch_size: int,
        world_size: int,
        seed: int,
        max_tokens: int | None = None,
        token_budget: int | None = None,
    ):
        self.batch_size = batch_size
        self.token_budget = token_budget
        # A step must fit either of them.
        max_tokens = min((n for n in (max_tokens, token_budget) if n is not None), default=None)
        self.world_size = world_size
        self.seed = seed
        self.max_tokens = max_tokens
        self.tokens = dict(sorted(tokens.items()))
        self.assets: dict[int, NDArray[np.int64]] = {}
        self.left_out: dict[int, int] = {}
        for resolution, counts in self.tokens.items():
            fits = counts <= max_tokens if max_tokens else np.ones(len(counts), bool)
            self.assets[resolution] = np.flatnonzero((counts > 0) & fits)
            self.left_out[resolution] = int(((counts > 0) & ~fits).sum())
            if not len(self.assets[resolution]):
                if not self.left_out[resolution]:
                    raise UserError(
                        f"no training asset at R = {resolution}; build more assets, or lower "
                        "--val-percent of the build"
                    )
                limit = "token-budget" if max_tokens == token_budget else "max-tokens"
                raise UserError(
                    f"no training asset at R = {resolution} with at most {max_tokens} cells, the "
                    f"smallest has {counts[counts > 0].min()}; raise --{limit} (see --help-all)"
                )
        self.step = 0
        self.cursors = {resolution: 0 for resolution in self.tokens}  # samples drawn so far
        self._permutation: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def state(self) -> dict[str, Any]:
        """JSON state after the last step, for `restore`."""
        return {
            "step": self.step,
            "cursors": {str(resolution): n for resolution, n in self.cursors.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which `state` was read.

        Raises:
            UserError: If it is the state of a run at other resolutions.
        """
        cursors = {int(resolution): int(n) for resolution, n in state["cursors"].items()}
        if cursors.keys() != self.cursors.keys():
            raise UserError(
                f"the checkpoint trained at R = {sorted(cursors)}, this run at "
                f"{sorted(self.cursors)}; choose another --out"
            )
        self.step = int(state["step"])
        self.cursors = cursors

    def next(self) -> StepSamples:
        """Draw the samples of the next step for all ranks."""
        choices = list(self.tokens)
        resolution = choices[seed_of(self.seed, "resolution", self.step) % len(choices)]
        first = self.cursors[resolution]
        samples = [self._draw(resolution, first + n) for n in range(self._count(resolution, first))]
        ranks = None
        while ranks is None:  # this ends, because one sample per rank always fits
            ranks = self._assign(resolution, samples)
            taken = len(samples)
            samples = samples[:-1]
        self.cursors[resolution] = first + taken
        self.step += 1
        return StepSamples(self.step - 1, resolution, ranks)

    def _count(self, resolution: int, first: int) -> int:
        """Return the number of samples from number `first` on that a step tries to take."""
        if self.token_budget is None:
            return self.batch_size * self.world_size
        room = self.token_budget * self.world_size
        count = 0
        while count < self.world_size or room > 0:
            room -= int(self.tokens[resolution][self._draw(resolution, first + count).asset])
            count += 1
        return count

    def _draw(self, resolution: int, number: int) -> SampleId:
        """Return a sample by its number in the endless sequence of a resolution."""
        assets = self.assets[resolution]
        epoch, position = divmod(number, len(assets))
        cached = self._permutation.get(resolution)
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng(seed_of(self.seed, "epoch", resolution, epoch))
            cached = (epoch, self._order(assets, rng))
            self._permutation[resolution] = cached
        return SampleId(int(cached[1][position]), epoch)

    def _order(self, assets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the assets of one epoch in the order in which they are drawn."""
        return rng.permutation(assets)

    def _assign(
        self, resolution: int, samples: list[SampleId]
    ) -> tuple[tuple[SampleId, ...], ...] | None:
        """Assign samples to ranks, or return None if a rank would exceed `max_tokens`.

        Each rank keeps its samples in the order in which they were drawn.
        """
        sizes = [int(self.tokens[resolution][sample.asset]) for sample in samples]
        heap = [(0, 0, rank) for rank in range(self.world_size)]  # (tokens, samples, rank)
        of_rank: list[list[int]] = [[] for _ in heap]
        for number in sorted(range(len(samples)), key=lambda n: (-sizes[n], n)):
            load, count, rank = heapq.heappop(heap)
            load += sizes[number]
            if self.max_tokens and load > self.max_tokens:
                return None
            of_rank[rank].append(number)
            heapq.heappush(heap, (load, count + 1, rank))
        return tuple(tuple(samples[n] for n in sorted(numbers)) for numbers in of_rank)


class ShardBatchSampler(BatchSampler):
    """Draws assets shard by shard, so that assets of one shard are read together.

    The shards come in another order each epoch. The assets of `mixed` shards at a time are shuffled
    together.

    Args:
        tokens: As for BatchSampler.
        shards: Name of the shard of each asset.
        mixed: Number of shards that are shuffled together.
        staggered: Whether the shards begin and end one after another, so that reading them needs
            the same bandwidth all the time. The samples of a shard are then spread evenly over the
            time of `mixed` shards. Otherwise `mixed` shards begin and end together.
        **options: Other arguments of BatchSampler.
    """

    def __init__(
        self,
        tokens: Mapping[int, NDArray[np.int64]],
        shards: Sequence[str],
        *,
        mixed: int,
        staggered: bool = False,
        **options: Any,
    ):
        super().__init__(tokens, **options)
        self.mixed = mixed
        self.staggered = staggered
        numbers = np.unique(np.asarray(shards), return_inverse=True)[1]
        self._shard_of = numbers.reshape(-1)  # number of each asset's shard

    def _order(self, assets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        shards = int(self._shard_of.max()) + 1
        if self.staggered and shards <= self.mixed:  # all shards are mixed
            return super()._order(assets, rng)
        place = rng.permutation(shards)  # of each shard in this epoch
        if self.staggered:
            times = place[self._shard_of[assets]] + self.mixed * rng.random(len(assets))
            return assets[np.argsort(times, kind="stable")]
        group = place[self._shard_of[assets]] // self.mixed
        return assets[np.lexsort([rng.random(len(assets)), group])]
