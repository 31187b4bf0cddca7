"""Every launch of convolution, pooling and GroupNorm compiles within its limits."""

from __future__ import annotations

from tests.kernels.compile_ahead import on_architectures
from tests.kernels.compiled_launches import compiled_launches

SHARED_LIMIT = {80: 82 * 1024, 90: 114 * 1024}  # two programs on a multiprocessor


@on_architectures(
    "bfloat16 64 32 1",
    slow=(
        "bfloat16 64 32 6",
        "float16 32 32 6",
        "bfloat16 512 512 6",
        "bfloat16 1 33 6",
        "float32 130 65 6",
    ),
)
def test_every_launch_compiles(arch, arguments):
    launches = compiled_launches("-m", "tests.kernels.conv.compile_conv", arch, *arguments.split())
    assert {launch["name"] for launch in launches} - {"_weight_grad", "_weight_grad_by_tap"} == {
        "_gather_gemm",
        "_pool_fwd",
        "_pool_bwd",
        "_parts",
        "_statistics",
        "_apply",
        "_grad_parts",
        "_add_parts",
        "_grad_apply",
    }
    assert any(launch["name"].startswith("_weight_grad") for launch in launches)
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT[arch], launch
        assert launch["spilled"] == 0, launch
