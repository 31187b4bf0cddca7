"""Compiles every tile size of the convolution's kernels for an architecture, without a GPU; prints JSON.

`python -m tests.kernels.compile_conv 80 bfloat16 64 32` (architecture, dtype, C, O), without the interpreter: forward,
data and weight gradient, of voxels and of full blocks, with and without duplication.
"""

from __future__ import annotations

import json
import sys

import torch
import triton

from kernels import gather_gemm, sparse_conv_backward
from kernels.gather_gemm import downsampling, plain, upsampling
from tests.kernels.compile_ahead import compile_launch


def compile_all(arch: int, dtype: torch.dtype, C: int, O: int) -> list[dict]:
    found: dict[str, dict] = {}

    def record(fn, *args, grid, warmup, **kwargs):
        tiles = {
            key: kwargs[key]
            for key in ("BM", "BR", "BO", "BC", "BT", "S", "T", "num_warps", "num_stages")
            if key in kwargs
        }
        key = f"{fn.__name__} {tiles}"
        if key not in found:
            found[key] = {"tiles": tiles} | compile_launch(fn, args, kwargs, arch)

    def try_all(key, candidates, launch, like):
        for candidate in candidates[1:]:
            launch(candidate)
        return candidates[0]

    triton.JITFunction.run = record
    gather_gemm.choose = sparse_conv_backward.choose = try_all
    for size in (1, 4):
        table = torch.zeros(64, 27, dtype=torch.int32)
        x, dy = torch.zeros(64 * size**3, C, dtype=dtype), torch.zeros(64 * size**3, O, dtype=dtype)
        gather_gemm.gather_gemm(x, torch.zeros(27, C, O, dtype=dtype), dy[0], table, plain(size))
        sparse_conv_backward.weight_grad(x, dy, table, plain(size))
        if size == 4:
            half = x[: 64 * 8]
            gather_gemm.gather_gemm(half, torch.zeros(8, 8, C, O, dtype=dtype), None, table, upsampling(4))
            gather_gemm.gather_gemm(dy, torch.zeros(64, O, C, dtype=dtype), None, table, downsampling(4))
            sparse_conv_backward.weight_grad(dy, half, table, downsampling(4))
    return list(found.values())


if __name__ == "__main__":
    arch, dtype, C, O = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    sys.stdout.write(json.dumps(compile_all(arch, dtype, C, O)) + "\n")
