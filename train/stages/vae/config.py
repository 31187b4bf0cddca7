"""Options and presets of training the SS-VAE."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.config import VAEConfig
from pipeline.core.grid import check_resolution
from pipeline.core.options import added, at_least, check_bounds
from pipeline.storage.config import PathOrUrl
from train.data.config import CacheConfig
from train.engine.config import SMALL_LOOP, TINY_LOOP, LoopConfig, RankOptions, WorkerKind

VAEPreset = Literal["tiny", "small", "props", "base", "base-1024"]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss terms."""

    # Direct3D-S2 paper (arXiv 2505.17412), section 3: L_in, L_ext, L_sharp and the KL divergence.

    inside: float = 1.0
    """Weight of the squared error on active input voxels."""
    outside: float = 0.1
    """Weight of the squared error on decoded voxels that were not in the input. Their targets are
    -1 and 1."""
    sharp: float = 1.0
    """Weight of the additional squared error on active voxels near sharp edges."""
    kl: float = 1e-3
    """Weight of the KL divergence of the latents from a standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class BrickConfig:
    """Which bricks are trained on and how they are batched.

    Raises:
        ValueError: If a number is out of range.
    """

    # Resolutions and batch size: Direct3D-S2 paper (arXiv 2505.17412), section 3.

    resolutions: tuple[int, ...] = (256, 384, 512)
    """Resolutions of the bricks. Each step draws one of them."""
    batch_size: int = at_least(1, 4)
    """Mean number of assets per rank and step."""
    max_tokens: int | None = at_least(1, None)
    """Largest number of cells per rank and step. A step takes fewer assets where they would exceed
    it, and assets that exceed it alone are left out. None sets no limit."""
    token_budget: int | None = added(None, before=None)
    """Number of cells per rank and step that assets are drawn for, instead of batch_size assets.
    Steps at low resolutions then keep a GPU busy. The loss of a step stays the mean over its
    assets. None draws batch_size assets, as the paper does."""
    mixed_shards: int | None = added(16, before=None)
    """Number of shards of the build whose assets are mixed with each other. The shards of an epoch
    begin and end one after another, so that a build is read from a URL evenly, each part once, if
    the cache holds this number of shards. If the build has no more shards, all assets are shuffled
    together. None shuffles them together in every build, as runs did that lack this option."""
    symmetries: bool = True
    """Apply one of the 48 symmetries of the cube to each asset."""
    max_bad_share: float = 0.05
    """Share of assets that may be unreadable before the run ends."""
    kept_gb: float = at_least(0, 0.0)
    """Memory in gigabytes for bricks that were read, which later epochs then do not read again. 0
    reads them every time."""
    workers: int = at_least(0, 4)
    """Number of threads or processes that prepare batches ahead. Every number gives the same
    batches. 0 prepares them in the training thread."""
    worker_kind: WorkerKind = "threads"
    """What prepares batches ahead. Processes take some seconds to start, and each of them keeps its
    share of kept_gb. They are faster where many small samples make a batch. Both give the same
    batches."""
    val_batches: int = at_least(0, 8)
    """Number of batches per rank and resolution in a validation."""
    reconstructions: int = at_least(0, 4)
    """Number of held-out assets that are written to samples/ as meshes and pictures."""

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise ValueError("resolutions must name at least one resolution, got none")
        for resolution in self.resolutions:
            check_resolution(resolution)
        check_bounds(self)
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be 1 or more, got {self.token_budget}")
        if self.mixed_shards is not None and self.mixed_shards < 1:
            raise ValueError(f"mixed_shards must be 1 or more, got {self.mixed_shards}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True)
class VAETraining(RankOptions):
    """Train the SS-VAE on the SDF bricks of a build. The same command resumes a stopped run."""

    preset: VAEPreset = "tiny"
    """Set of defaults for all other options. tiny takes minutes on a CPU, small minutes on a GPU,
    props is the recipe of examples/recipes/props, base is the paper's model at 256 to 512,
    base-1024 continues it at 1024."""
    data: PathOrUrl = Path("data/smoke")
    """Directory or URL of a build made by `python -m pipeline.build`."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    out: Path = Path("runs/vae-tiny")
    """Directory of the run. It receives checkpoints, metrics.jsonl and samples/."""
    init: Path | None = None
    """Weights that a new run starts from: a checkpoint, of which the averaged ones are taken; an
    export of `python -m train.export`, of which the stage of this kind and resolution is taken; or
    the name of shipped weights, such as props. None starts from random weights."""
    bricks: BrickConfig = field(default_factory=BrickConfig)
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them. This saves memory and
    costs one more forward pass per step."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    model: VAEConfig = field(default_factory=VAEConfig)


def _intervals(checkpoint: int, validate: int, sample: int) -> dict[str, int]:
    """Return the numbers of steps between checkpoints, validations and previews as options."""
    return {
        "checkpoint_every": checkpoint,
        "validate_every": validate,
        "sample_every": sample,
    }


VAE_PRESETS: dict[str, VAETraining] = {
    "tiny": VAETraining(
        device="cpu",
        bricks=BrickConfig(resolutions=(64,), workers=1, batch_size=2),
        loop=replace(
            TINY_LOOP,
            steps=2000,
            optimizer="muon",
            learning_rate=1e-3,
            **_intervals(200, 500, 1000),
        ),
        model=VAEConfig(widths=(8, 16, 32, 64), heads=4, blocks=2, groups=8),
    ),
    "small": VAETraining(
        preset="small",
        data=Path("data/full"),
        out=Path("runs/vae-small"),
        bricks=BrickConfig(resolutions=(256,)),
        loop=replace(
            SMALL_LOOP,
            steps=3000,
            learning_rate=1e-3,
            **_intervals(500, 500, 1500),
        ),
        model=VAEConfig(widths=(32, 64, 96, 192), heads=6, blocks=2),
    ),
    "props": VAETraining(
        preset="props",
        data=Path("data/props"),
        out=Path("runs/props/vae"),
        bricks=BrickConfig(
            resolutions=(256,), token_budget=60_000, kept_gb=6.0, workers=12, val_batches=10
        ),
        loop=replace(
            SMALL_LOOP,
            steps=4000,
            optimizer="muon",
            learning_rate=1e-3,
            ema_decay=0.998,
            keep_last=1,
            **_intervals(500, 1000, 0),
        ),
        model=VAEConfig(widths=(32, 64, 96, 128), heads=4, blocks=2, latent_channels=8),
    ),
    # Direct3D-S2 paper (arXiv 2505.17412), section 3: a day on eight A100 GPUs.
    "base": VAETraining(
        preset="base",
        data=Path("data/paper"),
        out=Path("runs/vae-base"),
        loop=LoopConfig(steps=200_000),
    ),
    # Direct3D-S2 paper (arXiv 2505.17412), section 3: another day, starting from base.
    "base-1024": VAETraining(
        preset="base-1024",
        data=Path("data/full"),
        out=Path("runs/vae-base-1024"),
        init=Path("runs/vae-base/latest"),
        bricks=BrickConfig(resolutions=(1024,), batch_size=1),
        activation_checkpointing=True,
        loop=LoopConfig(steps=50_000, learning_rate=1e-5),
    ),
}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(RankOptions):
    """Encode the bricks of a build with a trained SS-VAE.

    The same command resumes a stopped run.
    """

    vae: Path = Path("runs/vae-tiny/latest")
    """Checkpoint of `python -m train.vae`, or an exported model."""
    data: PathOrUrl = Path("data/smoke")
    """Directory or URL of a build made by `python -m pipeline.build`."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    resolutions: tuple[int, ...] = ()
    """Resolutions to encode. If none is given, all that the build has and the VAE was trained at
    are encoded."""
    latents: PathOrUrl | None = None
    """Directory or URL of the latents. None takes latents/ in the build."""
    quarter_turns: bool = False
    """Also encode the assets turned by 90, 180 and 270 degrees about the up axis, and the mirror
    images of all four. `train.dit --facing-views` and `--mirrored-views` need them."""
    precision: Literal["bf16", "fp32"] | None = None
    """Precision of the arithmetic. None takes the one that the VAE was trained in."""
    max_tokens: int = at_least(1, 46_000)
    """Number of cells that are encoded together. A larger asset is encoded alone."""
    max_bad_share: float = 0.05
    """Share of a shard's assets that may be unreadable before the run ends."""
    workers: int = at_least(1, 4)
    """Number of threads that read ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for resolution in self.resolutions:
            check_resolution(resolution)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")
