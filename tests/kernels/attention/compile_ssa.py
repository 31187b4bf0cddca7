"""The launches of one SSA step, forward and backward, to be compiled without a GPU.

`python -m tests.kernels.attention.compile_ssa 80 bfloat16 16 32` (target, dtype, H / G, D)
prints the resources that each kernel needs.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget

from kernels.attention.block_mean import _run_forward
from kernels.attention.ssa import ssa_backward, ssa_forward
from kernels.attention.top_blocks import choose_groups, rank_dtype, top_blocks
from tests.kernel_inputs import random_index
from tests.kernels.compile_ahead import print_launches


def launch_step(
    _target: GPUTarget, dtype: torch.dtype, group: int, D: int, G: int = 2, top_k: int = 3
) -> None:
    """Launch every kernel of pooling, forward and backward, with ordered and unordered windows."""
    index = random_index([700, 300], 24)
    N, P, H = index.num_tokens, index.num_compressed, G * group
    rows = ((N, H, D), (N, G, D), (N, G, D), (P, G, D), (P, G, D), (N, 3))
    inputs = [torch.zeros(shape, dtype=dtype) for shape in rows]
    _run_forward(inputs[1].flatten(1), index, False)
    for shifted, k in ((False, top_k), (True, index.max_blocks)):
        out, *saved = ssa_forward(inputs, index, k, shifted, 1.0)
        ssa_backward(out, inputs, saved, index, k, shifted, 1.0)
    # Rows that are narrowed by groups.
    for columns, k in ((493, 8), (914, 8), (16384, 32)):
        scores, selected = torch.zeros(G, N, columns), torch.empty(G, N, k, dtype=torch.int32)
        assert choose_groups(columns, k)
        top_blocks(scores, index, selected, torch.zeros(1, dtype=rank_dtype(k)))


if __name__ == "__main__":
    print_launches(launch_step)
