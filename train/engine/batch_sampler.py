"""Which samples make which step: drawn without I/O from a seed and cursors, the same for every number of workers."""

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
    """One sample: an asset, and how often it had come before at this resolution (its augmentation depends on it)."""

    asset: int
    epoch: int


@dataclass(frozen=True)
class StepSamples:
    """One step of all ranks."""

    step: int
    resolution: int
    ranks: tuple[tuple[SampleId, ...], ...]


class BatchSampler:
    """Plans steps one after another; `state` is all that must be kept to go on.

    Every resolution has its own endless sequence, one permutation of its assets after another. A step takes the next
    batch_size * world_size of one of them, fewer where a rank would exceed `max_tokens`; what was not taken comes first
    the next time. The largest samples are dealt out first, each to the rank with the fewest tokens.
    """

    def __init__(
        self,
        tokens: Mapping[int, NDArray[np.int64]],  # R -> cells of each asset, 0 where it has none
        *,
        batch_size: int,  # samples a rank, in the mean
        world_size: int,
        seed: int,
        max_tokens: int | None = None,  # cells a rank
    ):
        self.batch_size, self.world_size, self.seed, self.max_tokens = (
            batch_size,
            world_size,
            seed,
            max_tokens,
        )
        self.tokens = dict(sorted(tokens.items()))
        self.assets = {}
        self.left_out = {}  # R -> assets larger than a rank's budget
        for resolution, counts in self.tokens.items():
            fits = counts <= max_tokens if max_tokens else np.ones(len(counts), bool)
            self.assets[resolution] = np.flatnonzero((counts > 0) & fits)
            self.left_out[resolution] = int(((counts > 0) & ~fits).sum())
            if not len(self.assets[resolution]):
                rule = (
                    f" with at most max_tokens = {max_tokens} cells"
                    if self.left_out[resolution]
                    else ""
                )
                raise UserError(f"no training asset at R = {resolution}{rule}")
        self.step = 0
        self.cursors = {resolution: 0 for resolution in self.tokens}  # samples drawn so far
        self._permutation: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def state(self) -> dict[str, Any]:
        """JSON; `restore` takes it back."""
        return {
            "step": self.step,
            "cursors": {str(resolution): n for resolution, n in self.cursors.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there. UserError if it is a state of other resolutions."""
        cursors = {int(resolution): int(n) for resolution, n in state["cursors"].items()}
        if cursors.keys() != self.cursors.keys():
            raise UserError(
                f"the checkpoint trained at R = {sorted(cursors)}, this run at {sorted(self.cursors)}"
            )
        self.step, self.cursors = int(state["step"]), cursors

    def next(self) -> StepSamples:
        """The next step, for all ranks."""
        choices = list(self.tokens)
        resolution = choices[seed_of(self.seed, "resolution", self.step) % len(choices)]
        first = self.cursors[resolution]
        draws = [
            self._draw(resolution, first + n) for n in range(self.batch_size * self.world_size)
        ]
        ranks = None
        while ranks is None:  # ends: one sample a rank always fits
            ranks = self._deal(resolution, draws)
            taken = len(draws)
            draws = draws[:-1]
        self.cursors[resolution] = first + taken
        self.step += 1
        return StepSamples(self.step - 1, resolution, ranks)

    def _draw(self, resolution: int, number: int) -> SampleId:
        assets = self.assets[resolution]
        epoch, position = divmod(number, len(assets))
        cached = self._permutation.get(resolution)
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng(seed_of(self.seed, "epoch", resolution, epoch))
            cached = (epoch, self._order(assets, rng))
            self._permutation[resolution] = cached
        return SampleId(int(cached[1][position]), epoch)

    def _order(self, assets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """The assets of one epoch in the order in which they are drawn."""
        return rng.permutation(assets)

    def _deal(
        self, resolution: int, draws: list[SampleId]
    ) -> tuple[tuple[SampleId, ...], ...] | None:
        """The samples of each rank, in the order drawn; None if a rank would exceed the budget."""
        size = [int(self.tokens[resolution][draw.asset]) for draw in draws]
        heap = [(0, 0, rank) for rank in range(self.world_size)]
        of_rank: list[list[int]] = [[] for _ in heap]
        for number in sorted(range(len(draws)), key=lambda n: (-size[n], n)):
            load, count, rank = heapq.heappop(heap)
            load += size[number]
            if self.max_tokens and load > self.max_tokens:
                return None
            of_rank[rank].append(number)
            heapq.heappush(heap, (load, count + 1, rank))
        return tuple(tuple(draws[n] for n in sorted(numbers)) for numbers in of_rank)


class ShardBatchSampler(BatchSampler):
    """Draws assets shard by shard, so that what lies together in a shard is read together.

    The shards come in another order each epoch, `mixed` of them at a time, whose assets are shuffled among each other.
    """

    def __init__(
        self,
        tokens: Mapping[int, NDArray[np.int64]],
        shards: Sequence[str],
        *,
        mixed: int,
        **options: Any,
    ):
        super().__init__(tokens, **options)
        self.mixed = mixed
        self._shard_of = np.unique(np.asarray(shards), return_inverse=True)[1].reshape(
            -1
        )  # of each asset

    def _order(self, assets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        place = rng.permutation(int(self._shard_of.max()) + 1)  # of each shard in this epoch
        turn = place[self._shard_of[assets]] // self.mixed
        return assets[np.lexsort([rng.random(len(assets)), turn])]
