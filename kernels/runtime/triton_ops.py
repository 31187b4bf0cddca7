"""Triton and launch helpers that several kernels share: accumulation, device, width of offsets."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SHORT_OFFSET = (1 << 31) - 1
"""Largest element offset that a kernel may compute in 32 bits."""


@triton.jit
def add_dot(a, b, acc):
    """acc + a b. `acc` is fp64 for fp32 factors and fp32 otherwise.

    With fp64 accumulators a long sum of fp32 products has no more rounding error than a short one.
    """
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision="ieee").to(tl.float64)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


def needs_long_offsets(*tensors: Tensor) -> bool:
    """Return True if the offset of an element of any of the tensors may need 64 bits."""
    return max(x.numel() for x in tensors) > MAX_SHORT_OFFSET


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are launched on the GPU of `x`, whichever GPU is current.

    Every operator opens this context once. The launch functions rely on it.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def register_limit(registers: int) -> dict[str, int]:
    """Return the launch option that limits the registers of a thread, which ROCm does not have."""
    return {} if torch.version.hip else {"maxnreg": registers}
