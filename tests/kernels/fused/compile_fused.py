"""The launches of the fused kernels and cross-attention, to be compiled without a GPU.

`python -m tests.kernels.fused.compile_fused 80 bfloat16 1024 32` (target, dtype, channels,
head size) prints the resources that each kernel of forward and gradients needs.
"""

from __future__ import annotations

import importlib

import torch
from triton.backends.compiler import GPUTarget

from kernels.attention.segment import Segments
from kernels.attention.segment_attention import attend_segments, attend_segments_backward
from tests.kernels.compile_ahead import print_launches


def launch_all(_target: GPUTarget, dtype: torch.dtype, C: int, D: int) -> None:
    """Launch every kernel of forward and backward."""
    N, A = 100, 2
    of, starts = torch.zeros(N).int(), torch.tensor([0, 60, N]).int()
    module = importlib.import_module("kernels.fused.add_norm")
    x, branch = torch.zeros(N, C), torch.zeros(N, C, dtype=dtype)
    gate, vectors = torch.zeros(A, C, dtype=dtype), torch.zeros(A, C, dtype=dtype)
    for given in ((None, None, None, None), (branch, None, x[0], x[0])):
        step(module, x, *given, of, starts, dtype)
    for branch_gate in (gate, None):
        step(module, x, branch, branch_gate, vectors, vectors, of, starts, dtype)
    module = importlib.import_module("kernels.fused.mlp")
    module._gelu_backward(torch.zeros(N, 4 * C, dtype=dtype), torch.zeros(N, 4 * C, dtype=dtype))
    H = C // D
    segments = Segments(of[:0], of, starts, of, starts)
    q, k, v = (torch.zeros(N, H, D, dtype=dtype) for _ in range(3))
    results = attend_segments(q, k, v, segments, 1.0)
    attend_segments_backward(q, (q, k, v, *results), segments, 1.0)


def step(module, x, branch, gate, shift, scale, of, starts, dtype) -> None:
    """Launch one forward and backward of `add_norm`."""
    total, y, mean, rstd = module._forward(x, branch, gate, shift, scale, of, 1e-6, dtype)
    rows = x if branch is None else total
    given = branch is not None
    module._backward(
        x if given else None, y, rows, branch, gate, scale, mean, rstd, of, starts, given, dtype
    )


if __name__ == "__main__":
    print_launches(launch_all)
