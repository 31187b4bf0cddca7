"""SparseTensor, Level and BrickBatch against brute force on small random assets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from kernels import token_order
from model.sparse_tensor import BrickBatch, Level, SparseTensor
from pipeline.core.schema import Bricks
from tests.kernel_inputs import random_coords

torch.set_num_threads(1)


def random_level(tokens, side=24, resolution=32, seed=0):
    coords = random_coords(tokens, side, seed)
    return Level.from_coords(coords[token_order(coords)], resolution, len(tokens))


def random_bricks(cells, resolution=64, seed=0):
    """Return an asset of random cells, as stored. About a third of the grid points are active."""
    rng = np.random.default_rng(seed)
    side = resolution // 8
    flat = np.sort(rng.choice(side**3, cells, replace=False))
    blocks = np.stack([flat // side**2, flat // side % side, flat % side], 1).astype(np.int16)
    values = np.clip(rng.uniform(-3, 3, (cells, 512)), -1, 1).astype(np.float16)
    sharp = np.packbits(
        (np.abs(values) < 1) & (rng.random((cells, 512)) < 0.1), axis=1, bitorder="little"
    )
    return Bricks(resolution=resolution, cells=blocks, values=values, sharp=sharp)


def test_asset_starts_are_the_first_rows():
    level = random_level([5, 0, 7, 0])
    assert level.asset_starts.tolist() == [0, 5, 5, 12, 12]
    assert level.asset_starts.dtype == level.coords.dtype == torch.int32
    assert len(level) == 12
    assert (
        Level.from_coords(torch.zeros(0, 4, dtype=torch.int32), 8, 3).asset_starts.tolist()
        == [0] * 4
    )


@pytest.mark.parametrize(
    ("rows", "resolution", "batch_size", "message"),
    [
        ([[0, 0, 0, 8]], 8, 1, r"resolution|0 <= x, y, z < 8; row 0 is \[0, 0, 0, 8\]"),
        ([[0, 0, 0, 1], [0, -1, 0, 0]], 8, 1, r"0 <= x, y, z < 8; row 1 is \[0, -1, 0, 0\]"),
        ([[0, 0, 0, 1], [2, 0, 0, 0]], 8, 2, r"0 <= batch < 2.*row 1 is \[2"),
        ([[0, 0, 0, 1], [0, 0, 0, 0]], 8, 1, "sorted"),
        ([[0, 0, 0, 4], [0, 0, 1, 0]], 8, 1, "sorted"),  # by (x, y, z), but not by sub-block
        ([[0, 0, 0, 1], [0, 0, 0, 1]], 8, 1, r"repeat a voxel; row 1 is \[0, 0, 0, 1\]"),
        ([[0, 0, 0, 1]], 0, 1, "resolution must be an int from 1"),
        ([[0, 0, 0, 1]], 8, 0, "batch_size must be an int from 1"),
        ([[0, 0, 0, 1]], 8, 1.0, "batch_size must be an int from 1"),
    ],
)
def test_invalid_coordinates_are_refused(rows, resolution, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Level.from_coords(torch.tensor(rows, dtype=torch.int32), resolution, batch_size)


def test_tensors_of_a_level_share_its_indices():
    x = SparseTensor(torch.zeros(12, 3), random_level([5, 7]))
    y = x.replace(torch.ones(12, 8))
    assert y.level is x.level
    assert y.level.neighbors is x.level.neighbors
    assert y.level.block_index is x.level.block_index
    assert y.level.parents.level is x.level.parents.level
    assert (y.coords, y.resolution, y.batch_size) == (x.coords, 32, 2)
    assert x.level.to("cpu") is x.level


def test_a_batch_moves_as_a_whole():
    batch = BrickBatch.collate([random_bricks(9)])
    moved = batch.to("meta")
    for tensor in (moved.values, moved.sharp, moved.cells.coords, moved.cells.asset_starts):
        assert tensor.device.type == "meta"
    assert (moved.resolution, moved.cells.resolution, moved.batch_size) == (64, 8, 1)
    assert batch.to("cpu").cells is batch.cells


@pytest.mark.parametrize(
    "feats", [torch.zeros(11, 3), torch.zeros(12), torch.zeros(12, 3, device="meta")]
)
def test_features_must_fit_their_level(feats):
    with pytest.raises(ValueError, match=r"feats must be \[12, C\] on cpu, got"):
        SparseTensor(feats, random_level([5, 7]))


def test_parents_hold_their_children():
    level = random_level([40, 0, 60], side=6, resolution=6)
    parent, parent_of, children = level.parents
    assert (parent.resolution, parent.batch_size) == (3, 3)
    halved = level.coords.clone()
    halved[:, 1:] //= 2
    assert torch.equal(parent.coords[parent_of.long()], halved)
    assert torch.equal(parent.coords, parent.coords[token_order(parent.coords)])
    assert len(parent) == len(torch.unique(halved, dim=0))
    assert parent.asset_starts.tolist() == [
        0,
        *torch.bincount(parent.coords[:, 0], minlength=3).cumsum(0).tolist(),
    ]
    rows = {tuple(c): n for n, c in enumerate(level.coords.tolist())}
    for p, (b, x, y, z) in enumerate(parent.coords.tolist()):
        expected = [
            rows.get((b, 2 * x + (c >> 2), 2 * y + (c >> 1 & 1), 2 * z + (c & 1)), -1)
            for c in range(8)
        ]
        assert children[p].tolist() == expected
    with pytest.raises(ValueError, match="resolution must be even to have parents, got 3"):
        _ = parent.parents


def test_neighbours_belong_to_the_same_asset():
    level = random_level([60, 60], side=5, resolution=8)
    rows = {tuple(c): n for n, c in enumerate(level.coords.tolist())}
    for n, (b, x, y, z) in enumerate(level.coords.tolist()):
        expected = [
            rows.get((b, x + dx, y + dy, z + dz), -1)
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            for dz in (-1, 0, 1)
        ]
        assert level.neighbors[n].tolist() == expected


def test_windows_have_8_cells_and_are_shifted_by_4():
    level = random_level([300], side=16, resolution=16)
    window = ((level.coords[:, 1:] + 4) // 8)[level.block_index.shifted_order.long()]
    assert len(torch.unique(window, dim=0)) == len(level.block_index.shifted_starts) - 1
    assert (level.block_index.shifted_of.diff() == (window.diff(dim=0) != 0).any(1).int()).all()


def test_a_batch_is_converted_back_to_bricks():
    bricks = [random_bricks(9, seed=1), random_bricks(0), random_bricks(40, seed=2)]
    batch = BrickBatch.collate(bricks)
    assert (batch.resolution, batch.cells.resolution, batch.batch_size) == (64, 8, 3)
    assert batch.values.dtype == torch.float16
    for one, back in zip(bricks, batch.bricks(), strict=True):
        assert back.resolution == one.resolution
        for name in ("cells", "values", "sharp"):
            assert getattr(back, name).dtype == getattr(one, name).dtype
            assert np.array_equal(getattr(back, name), getattr(one, name)), name


def test_decoded_values_replace_those_of_the_batch():
    batch = BrickBatch.collate([random_bricks(9), random_bricks(5, seed=1)])
    decoded = torch.linspace(-2, 2, 14)[:, None].expand(14, 512)
    back = np.concatenate([one.values for one in batch.bricks(decoded)])
    cells = [tuple(c) for one in batch.bricks() for c in one.cells.tolist()]
    assert [
        (b.item(), *c) for b, c in zip(batch.cells.coords[:, 0].sort().values, cells, strict=True)
    ] == sorted(tuple(c) for c in batch.cells.coords.tolist())
    for row, (b, *c) in enumerate(batch.cells.coords.tolist()):
        place = next(i for i, cell in enumerate(cells) if cell == tuple(c) and (i >= 9) == b)
        assert (back[place] == np.float16(max(-1.0, min(1.0, decoded[row, 0].item())))).all()
    with pytest.raises(ValueError, match=r"values must be \[14, 512\], got \[13, 512\]"):
        batch.bricks(decoded[:13])


@pytest.mark.gpu
def test_a_batch_reaches_the_gpu_through_pinned_memory():
    batch = BrickBatch.collate([random_bricks(9), random_bricks(4, seed=1)])
    pinned = batch.pin_memory()
    assert all(
        x.is_pinned()
        for x in (pinned.values, pinned.sharp, pinned.cells.coords, pinned.cells.asset_starts)
    )
    moved = pinned.to("cuda", non_blocking=True).voxels()
    assert torch.equal(moved.coords.cpu(), batch.voxels().coords)
    assert torch.equal(moved.feats.cpu(), batch.voxels().feats)
    assert torch.equal(
        moved.level.parents.level.neighbors.cpu(), batch.voxels().level.parents.level.neighbors
    )


def test_cells_without_active_values_after_rounding_are_dropped():
    one = random_bricks(6)
    one.values[2] = np.where(one.values[2] < 0, -1, 1)
    batch = BrickBatch.collate([one])
    assert len(batch.cells) == 5
    assert np.array_equal(batch.bricks()[0].cells, np.delete(one.cells, 2, axis=0))


def test_bricks_of_fp32_are_gathered_like_those_of_fp16_and_not_mixed_with_them():
    half = random_bricks(20)
    wide = replace(half, values=half.values.astype(np.float32))
    wide.values[3, :] = [1, -1] * 256  # no active value
    half.values[3, :] = [1, -1] * 256
    batch, expected = BrickBatch.collate([wide]), BrickBatch.collate([half])
    assert batch.values.dtype == torch.float32
    assert torch.equal(batch.values, expected.values.float())
    assert torch.equal(batch.sharp, expected.sharp)
    with pytest.raises(ValueError, match=r"one dtype, got \['float16', 'float32'\]"):
        BrickBatch.collate([half, wide])


def test_voxels_are_the_active_points_in_order():
    bricks = [random_bricks(30, seed=1), random_bricks(0), random_bricks(50, seed=2)]
    x = BrickBatch.collate(bricks).voxels()
    expected = {}
    for asset, one in enumerate(bricks):
        for block, values in zip(one.cells.tolist(), one.values, strict=True):
            for point in np.flatnonzero(np.abs(values) < 1).tolist():
                local = (point // 64, point // 8 % 8, point % 8)
                expected[(asset, *(8 * b + p for b, p in zip(block, local, strict=True)))] = float(
                    values[point]
                )
    assert {
        tuple(c): v for c, v in zip(x.coords.tolist(), x.feats[:, 0].tolist(), strict=True)
    } == expected
    assert x.feats.dtype == torch.float32
    checked = Level.from_coords(x.coords, 64, 3)  # sorted, in range, without repeated voxels
    assert torch.equal(checked.asset_starts, x.level.asset_starts)
    assert x.level.coords.dtype == torch.int32


def test_the_third_parents_of_the_voxels_are_the_cells():
    batch = BrickBatch.collate(
        [random_bricks(60, seed=1), random_bricks(0), random_bricks(20, seed=2)]
    )
    level = batch.voxels().level
    for _ in range(3):
        level = level.parents.level
    assert level.resolution == batch.cells.resolution
    assert torch.equal(level.coords, batch.cells.coords)
    assert torch.equal(level.asset_starts, batch.cells.asset_starts)


def test_a_batch_may_consist_of_empty_assets():
    batch = BrickBatch.collate([random_bricks(0)])
    assert len(batch.voxels().level) == len(batch.cells) == 0
    assert [len(one.cells) for one in batch.bricks()] == [0]


def test_a_batch_has_one_resolution():
    with pytest.raises(ValueError, match=r"one resolution, got \[64, 128\]"):
        BrickBatch.collate([random_bricks(3), random_bricks(3, resolution=128)])
    with pytest.raises(ValueError, match=r"one resolution, got \[\]"):
        BrickBatch.collate([])
    batch = BrickBatch.collate([random_bricks(3)])
    with pytest.raises(ValueError, match="resolution must be 8 x the cells' 8, got 32"):
        BrickBatch(batch.cells, batch.values, batch.sharp, 32)
    with pytest.raises(ValueError, match=r"values must be float \[3, 512\]"):
        BrickBatch(batch.cells, batch.values[:2], batch.sharp, 64)
    with pytest.raises(ValueError, match=r"sharp must be bool \[3, 512\]"):
        BrickBatch(batch.cells, batch.values, batch.sharp.byte(), 64)


def test_the_token_order_is_the_documented_one():
    """The tests above use the order of the kernels, so it is tested here."""
    coords = torch.tensor(
        [[0, 0, 0, 4], [0, 0, 1, 0], [0, 4, 0, 0], [0, 0, 0, 8]], dtype=torch.int32
    )
    assert kernels.token_order(coords).tolist() == [1, 0, 2, 3]
