"""What the GPU benchmarks of training share: the machine, step reports and limited runs."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from pipeline.core.errors import UserError
from train.engine.checkpoint import provenance
from train.engine.config import LoopConfig
from train.engine.optimizer import peak_flops


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """Return the GPU's name, the versions of Python, CUDA and packages, and the commit."""
    return {
        "gpu": torch.cuda.get_device_properties(device).name,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **provenance(),
    }


def require_gpu() -> torch.device:
    """Return the first GPU.

    Raises:
        UserError: If there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device, and none was found")
    return torch.device("cuda", 0)


def row_or_failure(
    measure: Callable[[], dict[str, Any]], release: Callable[[], object] = gc.collect
) -> dict[str, Any]:
    """Return the row of a measurement, or {"failed": message} if the GPU's memory is too small.

    Args:
        measure: Returns the row.
        release: Called after a failure, to drop what still holds memory.
    """
    try:
        row = measure()
    except torch.cuda.OutOfMemoryError as error:
        release()
        row = {"failed": str(error).splitlines()[0]}
    gc.collect()
    torch.cuda.empty_cache()
    return row


def step_report(
    times_ms: Sequence[float], *, tokens: int, forward_flops: float, device: torch.device
) -> dict[str, Any]:
    """Return the speed of training steps.

    Args:
        times_ms: Milliseconds of each step.
        tokens: Number of tokens of a step.
        forward_flops: Operations of a forward pass. A backward pass costs as much as two.
        device: The GPU, whose peak gives the model FLOPs utilisation ("mfu").
    """
    ms = median(times_ms)
    flops = 3 * forward_flops
    return {
        "ms": ms,
        "ms_min": min(times_ms),
        "ms_max": max(times_ms),
        "tokens_per_s": 1000 * tokens / ms,
        "tflop": flops / 1e12,
        "mfu": flops / (ms / 1000) / (peak_flops(device) or float("nan")),
    }


def limited(loop: LoopConfig, minutes: float, **options: Any) -> LoopConfig:
    """Return a loop that ends after minutes, without checkpoints before, validation and previews.

    Args:
        loop: The options to start from.
        minutes: When it ends.
        **options: Further options to replace.
    """
    return replace(
        loop,
        max_minutes=minutes,
        steps=1_000_000,
        schedule="constant",
        ema_decay=0.99,
        checkpoint_every=1_000_000,
        validate_every=0,
        sample_every=0,
        **options,
    )
