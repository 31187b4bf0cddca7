"""Every launch of an SSA step compiles for A100 and Hopper, within its limits."""

from __future__ import annotations

import pytest

from tests.kernels.compiled_launches import compiled_launches

SHARED_LIMIT = 58 * 1024  # at least two programs in the 164 KB of an A100 multiprocessor
SPILL_LIMIT = 256  # bytes per thread: what a register cap that buys occupancy may cost


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "group", "D"),
    [
        ("bfloat16", 16, 32),
        pytest.param("float16", 1, 64, marks=pytest.mark.slow),
        pytest.param("bfloat16", 32, 128, marks=pytest.mark.slow),
        pytest.param("bfloat16", 4, 16, marks=pytest.mark.slow),
    ],
)
def test_every_launch_compiles(arch, dtype, group, D):
    launches = compiled_launches(
        "-m", "tests.kernels.attention.compile_ahead", arch, dtype, group, D
    )
    names = {launch["name"] for launch in launches}
    assert names >= {
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
