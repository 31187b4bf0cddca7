"""BlockIndex against dictionaries of blocks that are built token by token."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import BlockIndex, invert_order, token_order
from kernels.attention.block_index import TILE_BLOCKS, TILE_COMPRESSED
from tests.kernel_inputs import DEVICE, random_coords, random_index

CASES = [
    ([1], 8, 8, 4),
    ([300], 24, 8, 4),
    ([300], 80, 8, 4),  # most blocks hold one token, which gives the longest chains of tiles
    ([0, 150, 0, 0, 70, 0], 24, 8, 4),
    ([512], 8, 8, 4),  # one full block
    ([700], 16, 8, 1),  # a block has up to 512 compressed tokens, more than a tile
    ([90, 40], 12, 4, 4),
    ([90, 40], 12, 6, 2),
    ([0, 0], 8, 8, 4),
]


@pytest.mark.parametrize(("tokens", "side", "select", "compress"), CASES)
def test_metadata_matches_a_dictionary(tokens, side, select, compress):
    coords = random_coords(tokens, side)
    key = [
        (b, *(i // select for i in xyz), *(i % select // compress for i in xyz), *xyz)
        for b, *xyz in coords.tolist()
    ]
    expected = sorted(range(len(key)), key=lambda i: key[i])
    order = token_order(coords, select, compress)
    assert order.tolist() == expected
    assert torch.equal(coords[order][invert_order(order)], coords)
    index = BlockIndex.from_coords(
        coords[order].to(DEVICE), len(tokens), select_block=select, compress_block=compress
    )
    key.sort()
    blocks = [list(group) for _, group in itertools.groupby(key, key=lambda k: k[:4])]
    sub_blocks = [list(group) for _, group in itertools.groupby(key, key=lambda k: k[:7])]
    N, M, P = len(key), len(blocks), len(sub_blocks)
    assert (index.num_tokens, index.num_blocks, index.num_compressed) == (N, M, P)
    assert index.asset_of.tolist() == [k[0] for k in key]
    assert index.block_starts.tolist() == [0, *itertools.accumulate(map(len, blocks))]
    assert index.compressed_starts.tolist() == [0, *itertools.accumulate(map(len, sub_blocks))]
    assert index.block_of.tolist() == [i for i, block in enumerate(blocks) for _ in block]
    assert index.compressed_of.tolist() == [
        i for i, sub_block in enumerate(sub_blocks) for _ in sub_block
    ]
    block_number = {block[0][:4]: i for i, block in enumerate(blocks)}
    assert index.compressed_block.tolist() == [
        block_number[sub_block[0][:4]] for sub_block in sub_blocks
    ]
    assert index.compressed_asset.tolist() == [sub_block[0][0] for sub_block in sub_blocks]
    assert index.block_asset.tolist() == [block[0][0] for block in blocks]
    firsts = (
        (index.token_starts, key),
        (index.asset_blocks, [block[0] for block in blocks]),
        (index.asset_compressed, [sub_block[0] for sub_block in sub_blocks]),
    )
    for starts, rows in firsts:
        assert starts.tolist() == [sum(row[0] < a for row in rows) for a in range(len(tokens) + 1)]
    assert index.block_compressed.tolist() == [
        sum(b < i for b in index.compressed_block.tolist()) for i in range(M + 1)
    ]
    per_asset = [sum(b[0][0] == a for b in blocks) for a in range(len(tokens))]
    assert (index.max_tokens, index.max_blocks) == (max(tokens), max(per_asset))
    assert index.max_block_tokens == max(map(len, blocks), default=0)


@pytest.mark.parametrize(("tokens", "side", "select", "compress"), CASES)
def test_tiles_are_greedy_runs_of_whole_blocks(tokens, side, select, compress):
    index = random_index(tokens, side, select_block=select, compress_block=compress)
    sizes, assets = torch.diff(index.block_compressed).tolist(), index.block_asset.tolist()
    starts, first = [], 0
    for i in range(index.num_blocks):
        fits = (
            sum(sizes[first : i + 1]) <= TILE_COMPRESSED
            and i - first < TILE_BLOCKS
            and assets[i] == assets[first]
        )
        if i == 0 or not fits:
            starts.append(i)
            first = i
    assert index.tile_blocks.tolist() == [*starts, index.num_blocks]


@pytest.mark.parametrize("window", [8, 6])
@pytest.mark.parametrize("shift", [0, 3, 4])
def test_windows_hold_exactly_the_tokens_of_a_cube(window, shift):
    coords = random_coords([200, 0, 60], 24)
    coords = coords[token_order(coords)]
    index = BlockIndex.from_coords(coords.to(DEVICE), 3, window=window, window_shift=shift)
    aligned = (index.window_order, index.window_of, index.window_starts)
    assert (len(aligned[0]) == 0) == (window == 8)  # the token order itself
    for offset, (order, of, starts) in (
        (0, aligned),
        (shift, (index.shifted_order, index.shifted_of, index.shifted_starts)),
    ):
        order = order.cpu() if len(order) else torch.arange(260)
        assert sorted(order.tolist()) == list(range(260))
        cube = torch.cat([coords[:, :1], (coords[:, 1:] + offset) // window], 1)[order]
        same = (cube[:, None] == cube[None]).all(2)
        assert torch.equal(same, of.cpu()[:, None] == of.cpu()[None])
        assert starts.tolist() == [0, *(torch.bincount(of.cpu()).cumsum(0)).tolist()]


def test_chunks_cover_every_query_once_within_an_asset():
    index = random_index([5000, 0, 7000, 1], 32)
    starts, pairs, tokens = index.chunk_table
    assert starts == index.chunk_starts.tolist()
    assert pairs == index.chunk_pairs.tolist()
    assert starts[0] == 0
    assert starts[-1] == 12001
    sizes = torch.diff(torch.tensor(starts))
    assert sizes.min() >= 1
    assert len(sizes) > 3  # assets are really cut
    assets = index.asset_of[torch.tensor(starts[:-1], device=index.device)]
    ends = index.asset_of[torch.tensor(starts[1:], device=index.device) - 1]
    assert torch.equal(assets, ends)
    assert index.chunk_asset.tolist() == assets.tolist()
    assert tokens == [[5000, 0, 7000, 1][a] for a in assets.tolist()]
    assert index.chunk_of.tolist() == [
        i for i, size in enumerate(sizes.tolist()) for _ in range(size)
    ]
    blocks = torch.diff(index.asset_blocks)
    assert torch.diff(torch.tensor(pairs)).tolist() == blocks[assets.long()].tolist()
    assert index.chunk_ranks.tolist() == [
        0,
        *(sizes * blocks[assets.long()].cpu()).cumsum(0).tolist(),
    ]
    assert index.pair_block.tolist() == [
        b for a in assets.tolist() for b in range(index.asset_blocks[a], index.asset_blocks[a + 1])
    ]
    assert index.pair_chunk.tolist() == [
        i for i in range(len(sizes)) for _ in range(pairs[i + 1] - pairs[i])
    ]


def test_an_index_can_be_rebuilt_from_its_tensors():
    index = random_index([20, 30], 16)
    again = BlockIndex(*index.tensors())
    assert all(torch.equal(a, b) for a, b in zip(index.tensors(), again.tensors(), strict=True))
    assert again.max_blocks == index.max_blocks


def sorted_coords(n: int = 40) -> torch.Tensor:
    coords = random_coords([n, n], 16)
    return coords[token_order(coords)]


def changed(row: int, column: int, value: int) -> torch.Tensor:
    coords = sorted_coords()
    coords[row, column] = value
    return coords


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (sorted_coords().flip(0), r"sorted by .*row 1 is"),
        (torch.cat([sorted_coords()[:1], sorted_coords()]), r"not repeat a voxel; row 1 is"),
        (changed(0, 1, -1), r"0 <= x, y, z < 32768; row 0 is \[0, -1"),
        (changed(79, 3, 32768), r"row 79 is .*32768\]"),
        (changed(79, 0, 2), r"0 <= batch < 2 .*row 79 is \[2"),
        (changed(0, 0, -1), r"0 <= batch < 2 .*row 0 is \[-1"),
        (sorted_coords()[:, :3], r"coords must be \[N, 4\].*got \[80, 3\]"),
        (sorted_coords().float(), r"coords must be int32 or int64, got torch.float32"),
    ],
)
def test_bad_coordinates_are_named(coords, message):
    with pytest.raises(ValueError, match=message):
        BlockIndex.from_coords(coords.to(DEVICE), 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an int from 1"),
        (
            {"select_block": 8, "compress_block": 3},
            "compress_block must divide select_block = 8, got 3",
        ),
        ({"select_block": 0}, "select_block must be an int from 1"),
        ({"window": 0}, "window must be an int from 1"),
        ({"window_shift": 8}, "window_shift must be an int from 0 to window - 1 = 7, got 8"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        BlockIndex.from_coords(sorted_coords(), **{"batch_size": 2, **sizes})


def test_the_largest_coordinates_do_not_collide():
    top = 32767
    coords = torch.tensor(
        [[0, 0, 0, 0], [0, top, top, top], [32767, 0, 0, top], [32767, top, top, top]]
    )
    coords = coords[token_order(coords)]
    index = BlockIndex.from_coords(coords, 32768)
    assert index.num_blocks == 4
    assert index.asset_of.tolist() == [0, 0, 32767, 32767]


@pytest.mark.gpu
def test_the_index_makes_one_copy_to_the_host():
    coords = sorted_coords().cuda()
    BlockIndex.from_coords(coords, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        BlockIndex.from_coords(coords, 2)
    copies = [event.name for event in profile.events() if "DtoH" in event.name]
    assert len(copies) == 1, copies
