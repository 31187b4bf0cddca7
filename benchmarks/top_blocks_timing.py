"""Measures the choice of the blocks of largest score against torch.topk and the memory's speed."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.gpu import require_gpu
from benchmarks.gpu_timing import gpu_and_versions, graph_milliseconds
from benchmarks.ssa_config import TopBlocksConfig
from kernels import BlockIndex, token_order
from kernels.attention.inverse_lists import chunk_ranges, new_ranks
from kernels.attention.top_blocks import choose_groups, top_blocks

HEADS = 2


def index_of_blocks(blocks: int, rows: int, device: str = "cpu") -> BlockIndex:
    """Return the index of one asset with full blocks of equal size, of at least `rows` tokens.

    Args:
        blocks: Number of blocks, at most 32^3.
        rows: Least number of tokens, at most 512 for each block.
        device: Where the index is put.
    """
    tokens = -(-rows // blocks)
    block, voxel = torch.arange(blocks), torch.arange(tokens)
    corner = torch.stack([block // 1024, block // 32 % 32, block % 32], 1) * 8
    local = torch.stack([voxel // 64, voxel // 8 % 8, voxel % 8], 1)
    xyz = (corner[:, None] + local).view(-1, 3)
    coords = torch.cat([xyz.new_zeros(len(xyz), 1), xyz], 1).int()
    return BlockIndex.from_coords(coords[token_order(coords)].to(device), 1)


def probabilities(index: BlockIndex, rows: int) -> Tensor:
    """Return scores that are spread as those of random queries and keys: fp32 [HEADS, rows, M]."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (HEADS, rows, index.max_blocks)
    return torch.randn(shape, device="cuda", generator=generator).mul_(0.5).exp_()


def measure(index: BlockIndex, cfg: TopBlocksConfig, rows: int) -> dict[str, float]:
    """Return milliseconds by name: "groups N", "default" and "torch.topk".

    Raises:
        AssertionError: If the choices of two settings differ.
    """
    scores = probabilities(index, rows)
    (queries,) = chunk_ranges(index, 1, 1 << 40)
    ranks = new_ranks(index, queries, HEADS, cfg.top_k)
    expected = torch.topk(scores, cfg.top_k, 2).indices.sort(2).values.int()
    times = {}
    settings: dict[str, int | None] = {
        f"groups {n}": n for n in cfg.groups if n == 0 or cfg.top_k <= n < index.max_blocks
    }
    settings["default"] = None
    for name, groups in settings.items():
        selected = torch.empty(HEADS, index.num_tokens, cfg.top_k, dtype=torch.int32, device="cuda")

        def choose(selected: Tensor = selected, groups: int | None = groups) -> None:
            top_blocks(scores, index, selected, ranks, groups=groups)

        times[name] = graph_milliseconds(choose)
        # Random fp32 scores of a row can be equal, where torch may take another block.
        same = (selected[:, :rows] == expected).all(2).double().mean().item()
        assert same > 0.999, f"{name} chose other blocks in {1 - same:.2%} of the rows"
    times["torch.topk"] = graph_milliseconds(lambda: torch.topk(scores, cfg.top_k, 2))
    return times


def time_top_blocks(cfg: TopBlocksConfig) -> None:
    """Print nanoseconds for each row of scores.

    Raises:
        UserError: If there is no GPU.
    """
    require_gpu()
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in gpu_and_versions().items()) + "\n")
    for blocks in cfg.blocks:
        rows = min(cfg.rows, 512 * blocks)
        index = index_of_blocks(blocks, rows, "cuda")
        times = measure(index, cfg, rows)
        parts = [f"{name} {1e6 * ms / (HEADS * rows):.2f}" for name, ms in times.items()]
        default = choose_groups(blocks, cfg.top_k)
        sys.stdout.write(
            f"{blocks} blocks, ns a row: {', '.join(parts)} (default: groups {default})\n"
        )
        torch.cuda.empty_cache()
