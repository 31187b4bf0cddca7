"""Every launch of an SSA step compiles for A100 and Hopper, within its limits."""

from __future__ import annotations

from tests.kernels.compile_ahead import SHARED_LIMIT, SPILL_LIMIT, on_architectures
from tests.kernels.compiled_launches import compiled_launches


@on_architectures("bfloat16 16 32", slow=("float16 1 64", "bfloat16 32 128", "bfloat16 4 16"))
def test_every_launch_compiles(arch, arguments):
    launches = compiled_launches(
        "-m", "tests.kernels.attention.compile_ssa", arch, *arguments.split()
    )
    names = {launch["name"] for launch in launches}
    assert names >= {
        "_block_mean_fwd",
        "_segment_fwd",
        "_block_score",
        "_top_blocks",
        "_count",
        "_fill",
        "_selection_fwd",
        "_selection_combine",
        "_gates_bwd",
        "_segment_dq",
        "_segment_dkdv",
        "_selection_dq",
        "_selection_dkdv",
        "_combine_dq",
        "_reduce_dkdv",
        "_gated_sum",
    }
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT, launch
        assert launch["spilled"] <= SPILL_LIMIT, launch
