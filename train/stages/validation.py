"""Validation over several ranks: which assets a rank takes, and means over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.engine.distributed import World


def assets_of_rank(assets: Sequence[int], world: World, most: int) -> list[int]:
    """Return every `world.size`-th asset, starting at the rank, and at most `most` of them."""
    return list(assets)[world.rank :: world.size][:most]


def mean_over_ranks(
    sums: Tensor, count: int, names: Sequence[str], world: World
) -> dict[str, float]:
    """Return the means of metrics over the assets of all ranks.

    All ranks call this together.

    Args:
        sums: Sum of each metric over this rank's assets, [len(names)], on the world's device.
        count: Number of this rank's assets.
        names: Names of the metrics.
        world: The ranks.

    Returns:
        The means by name, or {} if no rank has an asset.
    """
    sums_and_count = torch.cat([sums.double(), sums.new_tensor([count], dtype=torch.float64)])
    *totals, total_count = world.sum(sums_and_count).tolist()
    if not total_count:
        return {}
    return {name: total / total_count for name, total in zip(names, totals, strict=True)}
