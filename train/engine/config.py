"""Every option of training: frozen dataclasses, and the presets from which they start."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.sparse_vae import VAEConfig
from pipeline.core.devices import Device
from pipeline.core.grid import check_resolution
from train.stages.vae.losses import LossWeights

MAX_SEED = 1 << 40  # a million ranks have seeds of their own below 2^63
VAEPreset = Literal["tiny", "small", "base", "base-1024"]
_FREE = (
    "steps",
    "max_minutes",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "validate_every",
    "sample_every",
)
_LIMITS = ("max_failed_checkpoints", "max_bad_steps", "max_bad_share")
FREE_ON_RESUME = (
    *_FREE,
    *_LIMITS,
    "activation_checkpointing",
)  # what may change when a run goes on


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how training goes on; the same for every model. ValueError for a number out of range."""

    steps: int = 100_000  # of all ranks together; a finished run goes on if this is raised
    max_minutes: float | None = None  # stop after that, with a checkpoint; the same command goes on
    optimizer: Literal["adamw", "muon"] = "adamw"  # the paper's, or see train.engine.optimizer.Muon
    learning_rate: float = 1e-4  # paper, sec. 3
    warmup_steps: int = 200  # over which the learning rate rises from 0
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to a tenth at the last step
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01  # of matrices; not of biases and norms
    clip_norm: float = 1.0  # largest norm of all gradients together
    ema_decay: float = 0.9995  # of the averaged weights that are validated, sampled and exported
    precision: Literal["bf16", "fp32"] = (
        "bf16"  # of the arithmetic; weights and their averages are fp32
    )
    activation_checkpointing: bool = (
        False  # compute activations again in the backward instead of keeping them
    )
    deterministic: bool = False  # bit-exact on GPUs too, more slowly
    seed: int = 0
    spike_factor: float = (
        30.0  # a gradient this many times the median of the last 100 is not applied
    )
    max_bad_steps: int = 20  # gradients in a row that are not applied before the run ends
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_last: int = 3  # checkpoints; 0: all
    max_failed_checkpoints: int = 3  # in a row before the run ends
    validate_every: int = 1000  # 0: never
    sample_every: int = 5000  # 0: never

    def __post_init__(self):
        for name in (
            "steps",
            "log_every",
            "checkpoint_every",
            "max_bad_steps",
            "max_failed_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("warmup_steps", "keep_last", "validate_every", "sample_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be positive, got {self.max_minutes}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - 1}, got {self.seed}")
        if self.spike_factor <= 1:
            raise ValueError(f"spike_factor must be more than 1, got {self.spike_factor}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.learning_rate * rise
        done = min(step / self.steps, 1.0)
        return self.learning_rate * rise * (0.55 + 0.45 * math.cos(done * math.pi))


@dataclass(frozen=True, kw_only=True)
class BrickConfig:
    """Which bricks are trained on, and how they become batches. ValueError for a number out of range."""

    resolutions: tuple[int, ...] = (
        256,
        384,
        512,
    )  # one of them, drawn anew, in each step; paper, sec. 3
    batch_size: int = 4  # samples a rank, in the mean; paper, sec. 3
    max_tokens: int | None = (
        None  # cells a rank: fewer samples where they would exceed it, larger assets are left out
    )
    symmetries: bool = True  # each sample under one of the cube's 48
    max_bad_share: float = 0.05  # of assets that cannot be read, before the run ends
    workers: int = 4  # threads that prepare batches ahead; any number gives the same batches
    val_batches: int = 8  # of each rank at each resolution in a validation
    reconstructions: int = 4  # held-out assets that are written as meshes and images

    def __post_init__(self):
        if not self.resolutions:
            raise ValueError("resolutions must name at least one resolution, got none")
        for resolution in self.resolutions:
            check_resolution(resolution)
        for name, least in (
            ("batch_size", 1),
            ("workers", 0),
            ("val_batches", 0),
            ("reconstructions", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Train the SS-VAE on the SDF bricks of a build. The same command goes on with a run that was stopped."""

    preset: VAEPreset = "tiny"  # where the options below start from
    data: Path = Path("data/smoke")  # what python -m pipeline.build made
    out: Path = Path("runs/vae-tiny")  # checkpoints, metrics.jsonl, samples
    init: Path | None = None  # a checkpoint whose averaged weights a new run starts from
    device: Device = "auto"
    bricks: BrickConfig = field(default_factory=BrickConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    model: VAEConfig = field(default_factory=VAEConfig)


def resolved(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON: tuples become lists, paths strings."""
    return json.loads(json.dumps(asdict(config), default=str))


_VAE_TINY = VAETraining(
    device="cpu",
    bricks=BrickConfig(resolutions=(64,), workers=1, batch_size=2),
    loop=LoopConfig(
        steps=2000,
        optimizer="muon",
        learning_rate=1e-3,
        warmup_steps=20,
        schedule="cosine",
        ema_decay=0.98,
        precision="fp32",
        checkpoint_every=200,
        validate_every=500,
        sample_every=1000,
    ),
    model=VAEConfig(widths=(8, 16, 32, 64), heads=4, blocks=2, groups=8),
)

VAE_PRESETS: dict[str, VAETraining] = {
    "tiny": _VAE_TINY,  # minutes on a CPU
    "small": VAETraining(  # minutes on a GPU
        preset="small",
        data=Path("data/full"),
        out=Path("runs/vae-small"),
        bricks=BrickConfig(resolutions=(256,)),
        loop=LoopConfig(
            steps=3000,
            learning_rate=1e-3,
            warmup_steps=100,
            schedule="cosine",
            ema_decay=0.995,
            checkpoint_every=500,
            validate_every=500,
            sample_every=1500,
        ),
        model=VAEConfig(widths=(32, 64, 96, 192), heads=6, blocks=2),
    ),
    "base": VAETraining(  # paper, sec. 3: a day on eight A100
        preset="base",
        data=Path("data/paper"),
        out=Path("runs/vae-base"),
        loop=LoopConfig(steps=200_000),
    ),
    "base-1024": VAETraining(  # paper, sec. 3: then another one
        preset="base-1024",
        data=Path("data/full"),
        out=Path("runs/vae-base-1024"),
        init=Path("runs/vae-base/latest"),
        bricks=BrickConfig(resolutions=(1024,), batch_size=1),
        loop=LoopConfig(steps=50_000, learning_rate=1e-5, activation_checkpointing=True),
    ),
}
