"""Every launch of the fused kernels and of cross-attention compiles within its limits."""

from __future__ import annotations

import pytest

from tests.kernels.compiled_launches import compiled_launches

SHARED_LIMIT = 58 * 1024  # at least two programs in the 164 KB of an A100 multiprocessor
SPILL_LIMIT = 256  # bytes per thread, in the attention kernels: see test_compile_ahead
FUSED = {"_add_norm_fwd", "_add_norm_bwd", "_add_parts", "_gelu_bwd"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "C", "D"),
    [
        ("bfloat16", 1024, 32),
        pytest.param("float16", 384, 32, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1024, 64, marks=pytest.mark.slow),
        pytest.param("float32", 128, 32, marks=pytest.mark.slow),
    ],
)
def test_every_launch_compiles(arch, dtype, C, D):
    launches = compiled_launches("-m", "tests.kernels.fused.compile_fused", arch, dtype, C, D)
    names = {launch["name"] for launch in launches}
    assert names >= FUSED | {"_segment_fwd", "_fold", "_segment_dq", "_segment_dkdv"}
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT, launch
        assert launch["spilled"] <= (0 if launch["name"] in FUSED else SPILL_LIMIT), launch
