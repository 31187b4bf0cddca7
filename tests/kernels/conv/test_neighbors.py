"""The neighbour map and the parent voxels against plain dictionaries."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import neighbor_map, parent_voxels, token_order
from kernels.runtime.coords import MAX_BATCH, MAX_COORD
from tests.kernel_inputs import DEVICE, random_coords

LAST = MAX_COORD - 1
CORNERS = torch.tensor(
    [
        [0, 0, 0, 0],
        [0, 0, 0, LAST],
        [0, 0, 1, 0],
        [0, LAST, LAST, LAST],
        [1, 0, 0, 0],
        [0, LAST, LAST, 0],
        [MAX_BATCH - 1, LAST, LAST, LAST],
        [MAX_BATCH - 1, LAST, LAST, LAST - 1],
    ]
).int()
SETS = {
    "random": random_coords([200, 0, 90], 9, seed=3),  # any order, an empty asset, half full
    "full": random_coords([64], 4),
    "one": random_coords([1], 5),
    "none": random_coords([0], 5),
    "borders": CORNERS,  # the voxel past a border is not the first of the next line
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("coords", SETS.values(), ids=SETS)
def test_neighbor_map(coords, dtype):
    row_of = {tuple(c): row for row, c in enumerate(coords.tolist())}
    offsets = list(itertools.product((-1, 0, 1), repeat=3))
    expected = [
        [row_of.get((b, x + i, y + j, z + k), -1) for i, j, k in offsets]
        for b, x, y, z in coords.tolist()
    ]
    rows = neighbor_map(coords.to(DEVICE, dtype))
    assert rows.dtype == torch.int32
    assert rows.tolist() == expected
    assert rows.shape == (len(coords), 27)


@pytest.mark.parametrize("coords", SETS.values(), ids=SETS)
def test_parent_voxels(coords):
    result = parent_voxels(coords.to(DEVICE))
    halved = [(b, x // 2, y // 2, z // 2) for b, x, y, z in coords.tolist()]
    assert {x.dtype for x in result} == {torch.int32}
    assert len(result.coords_P4) == len(set(halved))
    assert torch.equal(
        token_order(result.coords_P4), torch.arange(len(result.coords_P4), device=DEVICE)
    )
    assert [tuple(result.coords_P4[row].tolist()) for row in result.parent_of_N.tolist()] == halved
    expected = torch.full((len(result.coords_P4), 8), -1)
    for row, ((_, x, y, z), parent) in enumerate(
        zip(coords.tolist(), result.parent_of_N.tolist(), strict=True)
    ):
        expected[parent, x % 2 * 4 + y % 2 * 2 + z % 2] = row
    assert result.children_P8.tolist() == expected.tolist()


@pytest.mark.parametrize("function", [neighbor_map, parent_voxels])
@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(3, 3, dtype=torch.int32), r"coords must be \[N, 4\].*got \[3, 3\]"),
        (torch.zeros(3, 4), "coords must be int32 or int64, got torch.float32"),
    ],
)
def test_bad_coordinates_are_named(function, coords, message):
    with pytest.raises(ValueError, match=message):
        function(coords)
