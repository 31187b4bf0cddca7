"""The stages of the paper's training: how many samples, tokens and bytes each of them takes.

Numbers of assets, tokens and GPUs: Direct3D-S2 paper (arXiv 2505.17412), sections 2 to 4. The paper
gives days of training; the steps are those of the presets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from train.costs.config import EstimateTraining
from train.costs.measured_run import MeasuredRun
from train.stages.dit.config import DIT_PRESETS
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.vae.config import VAE_PRESETS

TOKENS = {256: 2058, 384: 5510, 512: 10655, 1024: 45904}  # of the paper's mean asset
PAPER_GPU_DAYS = {  # on A100
    "train.vae base": 8.0,
    "train.vae base-1024": 8.0,
    "train.dit 256 to 1024": 56.0,
    "train.structure base": 56.0,
}
ENCODE_SHARE = 1 / 6  # of a training step: the encoder's half of one of three passes
BRICK_BYTES = 330.0  # of a cell in the store, see "Signed distances" in benchmarks/RESULTS.md
LATENT_BYTES = 70.0  # of a cell: 16 means and 16 variances in float16, and its position
RENDER_BYTES = 113_000.0  # of one view, by the 6.1 TB of the build in docs/clusters.md


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the schedule.

    Args:
        name: Command and preset.
        model: Name of the model's class in the checkpoints of its runs.
        resolutions: Resolutions of the bricks or latents.
        steps: Number of steps. 0 passes over all assets once.
        samples: Assets of a step on each rank.
        tokens: Tokens of a step on each rank.
        work: Time of a token as a share of that in the measured run.
        by_tokens: Whether the time is proportional to the tokens, and otherwise to the samples: the
            structure stage works on dense grids.
        reads: Products that a sample reads: "bricks", "latents" and "render".
        assets: Number of assets.
    """

    name: str
    model: str
    resolutions: tuple[int, ...]
    steps: int
    samples: float
    tokens: float
    work: float = 1.0
    by_tokens: bool = True
    reads: tuple[str, ...]
    assets: int


def stages(cfg: EstimateTraining) -> list[Stage]:
    """Return the stages in the order in which they run."""
    found: list[Stage] = []
    for preset in ("base", "base-1024"):
        vae = VAE_PRESETS[preset]
        sizes = [TOKENS[resolution] for resolution in vae.bricks.resolutions]
        found.append(
            Stage(
                name=f"train.vae {preset}",
                model="SparseVAE",
                resolutions=vae.bricks.resolutions,
                steps=vae.loop.steps,
                samples=vae.bricks.batch_size,
                tokens=vae.bricks.batch_size * mean(sizes),
                reads=("bricks",),
                assets=cfg.best if 1024 in vae.bricks.resolutions else cfg.assets,
            )
        )
    for resolutions in ((256, 384, 512), (1024,)):
        sizes = [TOKENS[resolution] for resolution in resolutions]
        found.append(
            Stage(
                name=f"train.encode {' '.join(map(str, resolutions))}",
                model="SparseVAE",
                resolutions=resolutions,
                steps=0,
                samples=1,
                tokens=sum(sizes),
                work=ENCODE_SHARE,
                reads=("bricks",),
                assets=cfg.best if 1024 in resolutions else cfg.assets,
            )
        )
    for preset in ("256", "384", "512", "1024"):
        dit, resolution = DIT_PRESETS[preset], int(preset)
        limit = (dit.max_tokens or math.inf) / TOKENS[resolution]
        samples = min(dit.flow.batch_size, limit)
        found.append(
            Stage(
                name=f"train.dit {preset}",
                model="ConditionedDiT",
                resolutions=(resolution,),
                steps=dit.flow.loop.steps,
                samples=samples,
                tokens=samples * TOKENS[resolution],
                reads=("latents", "render"),
                assets=cfg.best if resolution == 1024 else cfg.assets,
            )
        )
    structure = STRUCTURE_PRESETS["base"]
    parts = (
        ("vae", "OccupancyVAE", structure.vae.batch_size, structure.vae.loop.steps, ("bricks",)),
        (
            *("flow", "Structure", structure.flow.batch_size, structure.flow.loop.steps),
            ("bricks", "render"),
        ),
    )
    for part, model, batch_size, steps, reads in parts:
        found.append(
            Stage(
                name=f"train.structure base, {part}",
                model=model,
                resolutions=(structure.resolution,),
                steps=steps,
                samples=batch_size,
                tokens=batch_size * TOKENS[structure.resolution],
                by_tokens=False,
                reads=reads,
                assets=cfg.assets,
            )
        )
    return found


def step_seconds(stage: Stage, run: MeasuredRun) -> float:
    """Return the seconds of a step of a stage on the device of a measured run."""
    if stage.by_tokens:
        return run.step_s * stage.work * stage.tokens / run.tokens
    return run.step_s * stage.work * stage.samples / run.samples


def closest_run(stage: Stage, runs: list[MeasuredRun]) -> MeasuredRun | None:
    """Return the run of the stage's model whose steps have the most similar number of tokens."""
    similar = [run for run in runs if run.model == stage.model]
    return min(similar, key=lambda run: abs(math.log(run.tokens / stage.tokens)), default=None)


def sample_bytes(stage: Stage, sizes: Mapping[str, float]) -> dict[str, float]:
    """Return the bytes that one sample reads, by product.

    Args:
        stage: The stage.
        sizes: Bytes of a "bricks" cell and of a "latents" cell, and of a "render".
    """
    counts = [TOKENS[resolution] for resolution in stage.resolutions]
    # A training sample has one resolution. Encoding reads all of them.
    cells = mean(counts) if stage.steps else sum(counts)
    amounts = {"bricks": cells, "latents": cells, "render": 1.0}
    return {name: amounts[name] * sizes[name] for name in stage.reads}


def hit_rate(share: float) -> float:
    """Return the share of reads that a cache of the least recently used serves, from epoch 2 on.

    Each epoch reads every object once, in an order of its own. An object at place u of one epoch
    and v of the next is still there if fewer objects than the cache holds were read in between,
    which are 1 - u (1 - v) of all. That has the probability 1 - c + c ln c with c = 1 - share.

    Args:
        share: Size of the cache as a share of all objects.
    """
    missing = 1 - min(share, 1.0)
    return 1.0 if missing == 0 else 1 - missing + missing * math.log(missing)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the nodes of a stage read from the store.

    Attributes:
        read_tb: Terabytes of all nodes with the cache as configured.
        cache_tb: Size of a cache on each node that holds everything the stage reads.
        read_with_it_tb: Terabytes of all nodes with such a cache.
        megabytes_per_s: Bandwidth of a node before the cache.
    """

    read_tb: float
    cache_tb: float
    read_with_it_tb: float
    megabytes_per_s: float


def reading(
    stage: Stage, cfg: EstimateTraining, sizes: Mapping[str, float], step_s: float
) -> Reading:
    """Return what a stage reads.

    Args:
        stage: The stage.
        cfg: Options of the estimate.
        sizes: As in `sample_bytes`.
        step_s: Seconds of a step.
    """
    nodes = math.ceil(cfg.gpus / cfg.gpus_per_node)
    samples = stage.steps * stage.samples * cfg.gpus if stage.steps else stage.assets
    of_sample = sample_bytes(stage, sizes)
    variants = {  # different objects of each asset
        name: cfg.views if name == "render" else len(stage.resolutions) if stage.steps else 1
        for name in of_sample
    }
    stored = {name: stage.assets * variants[name] * size for name, size in of_sample.items()}
    share = cfg.cache_gb * 1e9 / sum(stored.values())
    read = once = 0.0
    for name, size in of_sample.items():
        # Each node takes its part of every epoch, and meets all objects in the end.
        reads = samples / nodes
        objects = stage.assets * variants[name]
        first = objects * -math.expm1(-reads / objects) if nodes > 1 else min(reads, objects)
        read += nodes * size * (first + (reads - first) * (1 - hit_rate(share)))
        once += nodes * size * first
    per_node = stage.samples * min(cfg.gpus, cfg.gpus_per_node)
    return Reading(
        read_tb=read / 1e12,
        cache_tb=sum(stored.values()) / 1e12,
        read_with_it_tb=once / 1e12,
        megabytes_per_s=sum(of_sample.values()) * per_node / step_s / 1e6,
    )
