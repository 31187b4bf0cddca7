"""Options of the trainer, which are the same for every model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipeline.core.devices import Device, check_device
from pipeline.core.options import added, at_least, check_bounds

Gpus = int | Literal["auto"]  # type of `--gpus`, checked by `check_gpus`
WorkerKind = Literal["threads", "processes"]  # what prepares batches ahead
MAX_SEED = 1 << 40  # seed * 1_000_003 + rank stays below 2^63 for a million ranks

# Options that may differ when a run is resumed: how long it runs, what it reports, its limits, and
# what changes memory and speed alone.
FREE_ON_RESUME = (
    "steps",
    "max_minutes",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "validate_every",
    "sample_every",
    "max_failed_checkpoints",
    "max_bad_steps",
    "max_bad_share",
    "activation_checkpointing",
    "kept_activations",
    "wandb_project",
)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Plot the metrics of one or several training runs.

    Raises:
        ValueError: If there is no run or no metric, or the smoothing is out of range.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of the runs."""
    metrics: tuple[str, ...] = ("loss",)
    """Metrics of metrics.jsonl to draw, each in a panel of its own. The panel of "loss" also shows
    the loss on held-out assets."""
    out: Path | None = None
    """Image file, which ends in .png, .svg or .pdf. None writes plot.png into the first run."""
    terminal: bool = True
    """Draw the curves in the terminal, too."""
    smoothing: float = 0.02
    """Share of a run's steps over which the curves of training steps are averaged."""

    def __post_init__(self) -> None:
        for name in ("runs", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {self.smoothing}")


def check_gpus(gpus: Gpus) -> None:
    """Raise ValueError unless a number of GPUs is "auto" or at least 1."""
    if gpus != "auto" and gpus < 1:
        raise ValueError(f"gpus must be auto, or 1 or more, got {gpus}")


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """On which devices a command runs, and as how many processes.

    Raises:
        ValueError: If the device has no such name or a number is out of range.
    """

    device: Device = "auto"
    """Device to compute on. auto is a GPU if there is one. cuda takes one GPU per rank."""
    gpus: Gpus = "auto"
    """Number of GPUs of this machine to use, each by a process of its own. auto takes all of them.
    Under torchrun, which starts the processes itself, this option has no effect."""
    ray_gpus: int | None = at_least(1, None)
    """Number of GPUs of the Ray cluster at RAY_ADDRESS to use, each by a process of its own, on as
    few nodes as possible. With --device cpu each process takes a CPU of the cluster instead. None
    uses this machine alone."""
    ray_restarts: int = at_least(0, 10)
    """Number of times that the processes on a Ray cluster are started again from the last
    checkpoint after one of them was lost or failed."""

    def __post_init__(self) -> None:
        check_device(self.device)
        check_gpus(self.gpus)
        check_bounds(self)
        if self.ray_gpus is None:
            return
        if self.gpus != "auto":
            raise ValueError(f"ray_gpus cannot be given together with gpus, got {self.gpus}")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"ray_gpus needs device auto, cuda or cpu, got {self.device}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Optimizer, schedule, checkpoints and logging of a training run.

    Raises:
        ValueError: If a number is out of range.
    """

    steps: int = at_least(1, 100_000)
    """Number of training steps. A finished run continues if this is raised."""
    max_minutes: float | None = None
    """Minutes after which training stops with a checkpoint. The same command resumes it. None sets
    no limit."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the weight matrices. AdamW is the paper's. Muon learns faster in short runs; it
    leaves all other parameters to AdamW."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = at_least(0, 200)
    """Number of steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up. Cosine falls to a tenth of the peak at the last step."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moment."""
    weight_decay: float = at_least(0, 0.01)
    """Weight decay of matrices. Biases and normalisation parameters are not decayed."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all parameters together. Larger gradients are scaled down."""
    ema_decay: float = 0.9995
    """Decay of the averaged weights, which are validated, sampled and exported."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the arithmetic. Weights and their averages are always fp32."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that runs on a GPU are equal to the bit. This is
    slower."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and noise."""
    spike_factor: float = 30.0
    """A gradient is skipped if its norm exceeds this multiple of the median of the last 100."""
    max_bad_steps: int = at_least(1, 20)
    """Number of skipped gradients in a row after which the run ends with an error."""
    log_every: int = at_least(1, 20)
    """Number of steps between log lines. metrics.jsonl has every step."""
    checkpoint_every: int = at_least(1, 1000)
    """Number of steps between checkpoints."""
    keep_last: int = at_least(0, 3)
    """Number of recent checkpoints to keep. 0 keeps all."""
    max_failed_checkpoints: int = at_least(1, 3)
    """Number of checkpoints in a row that may fail to be written before the run ends."""
    validate_every: int = at_least(0, 1000)
    """Number of steps between validations on held-out assets. 0 disables validation."""
    sample_every: int = at_least(0, 5000)
    """Number of steps between previews in samples/. 0 disables previews."""
    wandb_project: str | None = added(None, before=None)
    """Project of Weights & Biases that also gets the metrics. WANDB_MODE=offline keeps them in the
    run's directory. None does not use the service."""

    def __post_init__(self) -> None:
        # Optimizer and learning rate: Direct3D-S2 paper (arXiv 2505.17412), section 3.
        check_bounds(self)
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
        """Return the learning rate of a step, counted from 0."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.learning_rate * warmup
        progress = min(step / self.steps, 1.0)
        return self.learning_rate * warmup * (0.55 + 0.45 * math.cos(progress * math.pi))


# What the presets for minutes on a CPU and for minutes on a GPU have in common.
TINY_LOOP = LoopConfig(warmup_steps=20, schedule="cosine", ema_decay=0.98, precision="fp32")
SMALL_LOOP = LoopConfig(warmup_steps=100, schedule="cosine", ema_decay=0.995)
