"""The parts of the SSA benchmark that need no GPU: token sets, bounds, table, plot and peer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import ssa_timing
from benchmarks.ssa_config import SsaConfig
from benchmarks.token_sets import surface_coords
from benchmarks.top_blocks_timing import index_of_blocks
from kernels import BlockIndex, select_blocks, token_order
from pipeline.core.errors import UserError
from tests.child_python import run_python


def test_surfaces_have_the_wanted_size_and_the_statistics_of_surfaces():
    coords = surface_coords(2062, 32)
    assert abs(len(coords) - 2062) <= 21
    assert torch.equal(token_order(coords), torch.arange(len(coords)))
    assert torch.equal(coords, surface_coords(2062, 32))
    index = BlockIndex.from_coords(coords, 1)
    sizes = torch.diff(index.block_starts).double()
    assert 100 < (sizes**2).sum() / sizes.sum() < 250  # tokens in the block of an average token
    assert 12 < index.num_tokens / index.num_compressed < 22


def test_floors_computed_by_hand():
    # There are two blocks of two tokens and one; every query selects both.
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 9]], dtype=torch.int32)
    index = BlockIndex.from_coords(coords, 1)
    config = SsaConfig(heads=4, kv_heads=2, head_size=16)
    selected = select_blocks(torch.ones(3, 4, 16), torch.ones(2, 2, 16), index, top_k=2)
    floors = ssa_timing.floors(index, selected, config, {"flop": 1e3, "exp": 1e3, "byte": 1e3})
    compressed = 4 * 3 * 2
    selection = 4 * 3 * 3
    window = 4 * (2 * 2 + 1)
    scores = compressed + selection + window
    assert floors["forward_flop"] == pytest.approx((4 * scores + 2 * compressed) * 16)
    assert floors["forward_exp"] == pytest.approx(scores + compressed)
    assert floors["backward_flop"] == pytest.approx(10 * scores * 16)
    assert floors["backward_exp"] == pytest.approx(scores)
    assert floors["forward_byte"] == pytest.approx(
        2 * 3 * 4 * 16 * 2 + 2 * (2 * 3 + 2 * 2) * 2 * 16
    )


FLOORS = [f"{way}_{kind}" for way in ("forward", "backward") for kind in ("flop", "exp", "byte")]
ROW = {
    "tokens": 100,
    "top_k": 8,
    "forward": 2.0,
    "backward": 4.0,
    "graph_forward": 1.0,
    "graph_step": 3.0,
    "peak_gb": 0.5,
    "floors": dict.fromkeys(FLOORS, 0.5),
    "flash": (10.0, 30.0),
    "cudnn": None,
}


def test_table_and_plot(tmp_path):
    line = ssa_timing.table([ROW]).splitlines()[-1]
    assert line == "| 100 | 8 | 2/4 | 1/2 | 0.5/0.5 | 50%/25% | 10/30 | - | 10x/15x | 0.50 |"
    ssa_timing.plot([ROW, {**ROW, "tokens": 200}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_coordinates(tmp_path):
    rng = np.random.default_rng(0)
    sets = {"a": np.unique(rng.integers(0, 30, (50, 3)), axis=0), "b": np.array([[1, 2, 3]])}
    np.savez(tmp_path / "sets.npz", **sets)
    small, large = ssa_timing.token_sets(SsaConfig(coords=tmp_path / "sets.npz"))
    assert small.tolist() == [[0, 1, 2, 3]]
    assert BlockIndex.from_coords(large, 1).num_tokens == len(sets["a"])
    np.save(tmp_path / "bad.npy", np.zeros((4, 3)))
    with pytest.raises(
        UserError, match=r"coords must hold integer arrays \[N, 3\], got float64 \(4, 3\)"
    ):
        ssa_timing.token_sets(SsaConfig(coords=tmp_path / "bad.npy"))


def test_a_peer_is_loaded_from_a_file(tmp_path):
    (tmp_path / "peer.py").write_text(
        "def spatial_sparse_attention(q, *rest):\n    return q\n", encoding="utf-8"
    )
    assert ssa_timing.load_peer(tmp_path / "peer.py")(5) == 5
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="peer must define spatial_sparse_attention"):
        ssa_timing.load_peer(tmp_path / "empty.py")


def test_the_benchmark_refuses_a_machine_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(UserError, match="needs a CUDA device"):
        ssa_timing.time_ssa(SsaConfig())


def test_large_sets_lie_in_larger_grids():
    tokens = (2062, 10682, 45668, 130812, 525000)
    assert [ssa_timing.grid_side(n) for n in tokens] == [32, 64, 128, 128, 256]


@pytest.mark.parametrize(("blocks", "rows"), [(1, 512), (1500, 4000)])
def test_the_benchmark_of_the_choice_has_full_blocks(blocks, rows):
    index = index_of_blocks(blocks, rows)
    assert index.max_blocks == index.num_blocks == blocks
    assert rows <= index.num_tokens < rows + blocks
    assert (torch.diff(index.block_starts) == index.num_tokens // blocks).all()


@pytest.mark.parametrize(("module", "words"), [("ssa", ["ssa"]), ("conv", [])])
def test_help_explains_each_option_and_imports_no_torch(module, words):
    code = f"""
import sys
from benchmarks.{module} import main
try:
    main({[*words, "--help"]})
except SystemExit as end:
    assert not end.code
assert not {{"torch", "triton", "numpy"}} & set(sys.modules)
"""
    result = run_python("-c", code)
    assert "--out" in result.stdout
    assert "Directory that" in result.stdout
