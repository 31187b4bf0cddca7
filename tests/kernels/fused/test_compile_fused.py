"""Every launch of the fused kernels and of cross-attention compiles within its limits."""

from __future__ import annotations

from tests.kernels.compile_ahead import SHARED_LIMIT, SPILL_LIMIT, on_architectures
from tests.kernels.compiled_launches import compiled_launches

FUSED = {"_add_norm_fwd", "_add_norm_bwd", "_add_parts", "_gelu_bwd"}


@on_architectures("bfloat16 1024 32", slow=("float16 384 32", "bfloat16 1024 64", "float32 128 32"))
def test_every_launch_compiles(arch, arguments):
    launches = compiled_launches(
        "-m", "tests.kernels.fused.compile_fused", arch, *arguments.split()
    )
    names = {launch["name"] for launch in launches}
    assert names >= FUSED | {"_segment_fwd", "_fold", "_segment_dq", "_segment_dkdv"}
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT, launch
        assert launch["spilled"] <= (0 if launch["name"] in FUSED else SPILL_LIMIT), launch
