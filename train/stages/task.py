"""The common start of all stages' tasks."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from train.data.bricks import BuildIndex
from train.engine.distributed import World

Config = TypeVar("Config")


class StageTask(Generic[Config]):
    """What a stage adds to the trainer. Subclasses make the model.

    Args:
        cfg: Options of the run.
        world: The ranks of the run.
        val: The held-out assets.
        seed: Seed of the initial weights, which are equal on all ranks.
    """

    def __init__(self, cfg: Config, world: World, val: BuildIndex, seed: int):
        torch.manual_seed(seed)
        self.cfg = cfg
        self.world = world
        self.val = val
