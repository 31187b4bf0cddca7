"""The launches of convolution, pooling and GroupNorm, to be compiled without a GPU.

`python -m tests.kernels.conv.compile_conv 80 bfloat16 64 32 6` (target, dtype, C, O, number
of tile sizes) prints the resources that each kernel of forward and gradients needs, on full blocks,
with and without duplication.
"""

from __future__ import annotations

import importlib

import torch
from triton.backends.compiler import GPUTarget

from kernels.conv import gather_gemm, sparse_conv_backward
from kernels.conv.gather_gemm import plain_taps
from tests.kernels.compile_ahead import print_launches


def launch_all(target: GPUTarget, dtype: torch.dtype, C: int, O: int, sizes: int) -> None:
    """Launch every kernel of forward and backward."""

    def try_all(key, candidates, launch, like, kernels):
        for candidate in candidates[1:sizes]:
            launch(candidate)
        return candidates[0]

    warpgroups = target.backend == "cuda" and target.arch // 10 in (9, 10)
    for module in (gather_gemm, sparse_conv_backward):
        module.has_warpgroup_products = lambda device: warpgroups
    gather_gemm.choose = sparse_conv_backward.choose = try_all
    for name in ("group_norm", "pool", "sparse_conv"):  # they register the operators
        importlib.import_module(f"kernels.conv.{name}")
    ops = torch.ops.sparse3d
    M, size = 16, 4
    table = torch.zeros(M, 27, dtype=torch.int32)
    weight, bias = torch.zeros(27, C, O), torch.zeros(O, dtype=dtype)
    gather_gemm.gather_gemm(
        torch.zeros(M, C, dtype=dtype), weight.to(dtype), None, table, plain_taps(1)
    )
    for upsample in (False, True):
        rows = M * size**3
        x = torch.zeros(rows // 8 if upsample else rows, C, dtype=dtype)
        dy = torch.zeros(rows, O, dtype=dtype)
        ops.sparse_conv(x, weight, bias, table, size, upsample, False)
        ops.sparse_conv_backward(dy, x, weight, table, size, upsample, False, [True, True, True])
    starts, one = torch.tensor([0, len(x)]).int(), torch.ones(C)
    _, mean, rstd = ops.group_norm(x, starts, 1, one, one, 1e-5, True)
    ops.group_norm_backward(x, x, starts, one, one, mean, rstd, True)
    children = torch.zeros(M, 8, dtype=torch.int32)
    ops.pool_children_backward(ops.pool_children(x, children, False), children, len(x), False)


if __name__ == "__main__":
    print_launches(launch_all)
