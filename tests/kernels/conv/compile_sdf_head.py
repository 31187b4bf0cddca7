"""The launches of the SDF head, to be compiled without a GPU.

`python -m tests.kernels.conv.compile_sdf_head 80 bfloat16 32` (target, dtype, channels) prints the
resources that each kernel needs.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget

from kernels import sdf_head as _registers_the_operators  # noqa: F401
from kernels.conv.sdf_head import _head, _head_grad
from tests.kernels.compile_ahead import print_launches


def launch_all(_target: GPUTarget, dtype: torch.dtype, C: int) -> None:
    """Launch every kernel of forward and backward."""
    x, weight, bias = torch.zeros(64, C, dtype=dtype), torch.zeros(C), torch.zeros(1)
    y = _head(x, weight, bias)
    _head_grad(y, y, x, weight, bias)


if __name__ == "__main__":
    print_launches(launch_all)
