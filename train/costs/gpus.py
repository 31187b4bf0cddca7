"""Published ceilings of GPUs, and how a measured time is carried from one to another."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.errors import UserError
from train.costs.config import EstimateTraining, GpuName


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What the data sheet of a GPU states.

    Args:
        teraflops: Dense bf16 operations per second, in units of 10^12.
        terabytes_per_s: Bandwidth of the memory.
    """

    teraflops: float
    terabytes_per_s: float


CEILINGS: dict[GpuName, Ceiling] = {  # SXM modules; the A100 with 80 GB
    "a100": Ceiling(teraflops=312, terabytes_per_s=2.039),
    "h100": Ceiling(teraflops=989, terabytes_per_s=3.35),
    "h200": Ceiling(teraflops=989, terabytes_per_s=4.8),
}


def measured_gpu(device: str, cfg: EstimateTraining) -> GpuName:
    """Return the GPU of a run.

    Raises:
        UserError: If it has no ceilings here.
    """
    if cfg.measured_on is not None:
        return cfg.measured_on
    for name in CEILINGS:
        if name in device.lower():
            return name
    raise UserError(
        f"a run on {device} cannot be carried over to {', '.join(CEILINGS)}; measure on one of "
        "them, or name the GPU with --measured-on"
    )


def time_ratios(source: GpuName, target: GpuName) -> tuple[float, float]:
    """Return the smallest and largest ratio of the time on `target` to that on `source`.

    What is limited by arithmetic takes time in proportion to the operations per second, and what is
    limited by memory in proportion to the bandwidth. A step is a mixture of both.
    """
    one, other = CEILINGS[source], CEILINGS[target]
    ratios = (one.teraflops / other.teraflops, one.terabytes_per_s / other.terabytes_per_s)
    return min(ratios), max(ratios)
