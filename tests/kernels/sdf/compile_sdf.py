"""The launches of signed distances on the GPU, to be compiled without a GPU.

`python -m tests.kernels.sdf.compile_sdf 80 float64` (target, dtype of the triangles) prints the
resources that each kernel needs.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.sdf import distances
from tests.kernels.compile_ahead import print_launches


def launch_all(_target: GPUTarget, dtype: torch.dtype) -> None:
    """Launch every kernel."""
    compile_only = triton.JITFunction.run

    def record(fn, *args, **options):
        compile_only(fn, *args, **options)
        if fn.__name__ == "_distances":
            args[9].fill_(1)  # mark points for the votes

    triton.JITFunction.run = record
    side = torch.zeros(8, 8, 8)
    outside = torch.zeros(1, 8, dtype=torch.int64)
    flood = distances.FloodBits(bin_of=side.int(), outside=outside, whole_cells=side.bool())
    packed, kinds = torch.rand(5, 16, dtype=dtype), torch.zeros(5, dtype=torch.uint8)
    triangles = distances.grid_triangles(packed, kinds, 64)
    cells, ids = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    lengths = {"tau": 0.01, "sheet_half": 0.01, "trusted": 0.01, "tie": 2e-7}
    distances.cell_distances(triangles, flood, cells, torch.tensor([0, 2, 5]), ids, **lengths)


if __name__ == "__main__":
    print_launches(launch_all)
