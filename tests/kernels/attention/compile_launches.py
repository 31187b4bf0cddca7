"""The alternatives to the launches of the SSA kernels, to be compiled without a GPU.

`python -m tests.kernels.attention.compile_launches 80 bfloat16` (target, dtype) prints the
resources of every alternative.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget

from benchmarks.launch_alternatives import ALTERNATIVES, alternatives, make_step
from tests.kernel_inputs import random_index
from tests.kernels.compile_ahead import print_launches

GROUP, G, D, TOP_K = 16, 2, 32, 3


def launch_alternatives(_target: GPUTarget, dtype: torch.dtype) -> None:
    """Launch each kernel alone, with its present launch and with every alternative."""
    # With so many compressed tokens the gradients of keys have the launch of large assets.
    index = random_index([6000], 64)
    N, P, H = index.num_tokens, index.num_compressed, G * GROUP
    rows = ((N, H, D), (N, G, D), (N, G, D), (P, G, D), (P, G, D), (N, 3))
    inputs = [torch.zeros(shape, dtype=dtype) for shape in rows]
    step = make_step(index, inputs, TOP_K, inputs[0], 1.0)
    for kernel, changes in ALTERNATIVES.items():
        for launch in (None, *alternatives(step.present[kernel], changes).values()):
            step.run[kernel](launch)


if __name__ == "__main__":
    print_launches(launch_alternatives)
