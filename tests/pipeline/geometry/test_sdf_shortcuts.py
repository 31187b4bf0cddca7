"""The compiled shortcuts of the SDF against distances and sides without any shortcut."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.triangles import distance2, pack
from pipeline.geometry import sdf
from pipeline.geometry.flood_fill import bin_triangles, flood_fill
from pipeline.geometry.topology import BURIED, SHEET, SOLID

RESOLUTION = 32
H = spacing(RESOLUTION)
SIZES = {"specks": 0.3, "cell": 4.0, "large": 18.0}  # extent of the triangles in voxels


def random_triangles(rng, count, size, spread=8.0):
    """Return corners [count, 3, 3] of triangles around the origin, some of them slivers."""
    centres = rng.uniform(-spread, spread, (count, 1, 3))
    corners = centres + size * rng.uniform(-0.5, 0.5, (count, 3, 3))
    thin = rng.random(count) < 0.2
    corners[thin, 2] = corners[thin, 0] + 0.97 * (corners[thin, 1] - corners[thin, 0]) + 0.02
    return H * corners


def exact_distances(packed, points):
    """Return the distances [P, T] of points to triangles in float64."""
    return np.sqrt([[distance2(row, *point) for row in packed] for point in points])


def random_scene(rng, size):
    """Return topology and bins of random pieces of all kinds."""
    count = 25 if size > CELL_SIDE else 250
    corners = np.clip(random_triangles(rng, count, size, spread=5.0), -0.48, 0.48)
    if size < CELL_SIDE:  # pieces beside each other in one plane tie
        corners[::2, :, 2] = 0.0031
    packed = pack(corners)
    flood = flood_fill(packed, bin_triangles(packed, RESOLUTION), np.ones(count, np.bool_))
    kinds = rng.choice([SOLID, SHEET, BURIED], count, p=[0.6, 0.2, 0.2]).astype(np.uint8)
    topology = SimpleNamespace(
        resolution=RESOLUTION,
        triangles=corners,
        kinds=kinds,
        flood=flood,
        sharp_edges=np.empty((0, 2, 3)),
    )
    return packed, topology


def slow_values(packed, topology, points):
    """Return clamp(sdf / tau) of points from all triangles, each distance and side in float64."""
    kinds, flood = topology.kinds, sdf.flood_sides(topology.flood)
    tau, half = band(RESOLUTION), sdf.SHEET_HALF_VOXELS * H
    trusted, everything = sdf.FLOOD_VOXELS * H, np.arange(len(packed), dtype=np.int32)
    room, distances = np.empty(len(packed)), exact_distances(packed, points)
    solid = np.min(distances[:, kinds == SOLID], axis=1, initial=np.inf)
    sheet = np.min(distances[:, kinds == SHEET], axis=1, initial=np.inf)
    outside = [
        sdf.is_outside_exact(packed, kinds, everything, room, *point, trusted, flood)
        for point in points
    ]
    signed = np.minimum(np.where(outside, solid, -solid), sheet - half)
    return np.clip(signed / tau, -1, 1)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_bricks_equal_those_of_all_triangles_in_float64(size, seed):
    rng = np.random.default_rng([seed, int(10 * size)])
    packed, topology = random_scene(rng, size)
    bricks = sdf.compute_bricks(topology, RESOLUTION)
    places = np.stack(np.unravel_index(np.arange(CELL_SIDE**3), (CELL_SIDE,) * 3), axis=1)
    index = (bricks.cells[:, None].astype(np.int64) * CELL_SIDE + places).reshape(-1, 3)
    chosen = rng.choice(len(index), min(300, len(index)), replace=False)
    points = index[chosen] / (RESOLUTION - 1) - 0.5
    expected = slow_values(packed, topology, points)
    stored = bricks.values.reshape(-1)[chosen].astype(np.float64)
    assert np.abs(stored - expected).max() < 1e-3
    clear = np.abs(expected) > 1e-3
    assert clear.any()
    np.testing.assert_array_equal(stored[clear] < 0, expected[clear] < 0)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_slabs_that_are_left_out_hold_no_point_within_the_limit(size):
    rng = np.random.default_rng(int(10 * size))
    packed = pack(random_triangles(rng, 200, size))
    shapes = sdf._shapes(packed, H)
    grid = sdf._make_room(1)[9]
    points = H * grid.T.astype(np.float64)
    limits, gaps = np.empty((2, 64), np.float32), np.empty((2, 16), np.float32)
    distances = exact_distances(packed, points) / H
    left_out = 0
    for t, row in enumerate(packed):
        limits[:] = rng.uniform(0, 4, (2, 64)) ** 2
        corner = (row[:3] / H).astype(np.float32)
        slabs = sdf._near_slabs(sdf._shape_at(shapes, t), *corner, limits, 1, gaps)
        close = (distances[:, t] < np.sqrt(limits[1]) - 1e-3).reshape(4, 16).any(axis=1)
        kept = slabs >> np.arange(4) & 1 == 1
        assert kept[close].all()
        left_out += 4 - kept.sum()
    assert left_out > 100


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_float32_distances_are_within_the_assumed_error(size):
    rng = np.random.default_rng(int(10 * size))
    packed = pack(random_triangles(rng, 200, size))
    room = sdf._make_room(len(packed))
    distances, closest, centres = room[4], room[5], room[10]
    kinds = rng.integers(0, 3, len(packed)).astype(np.uint8)
    everything = np.arange(len(packed), dtype=np.int32)
    shapes = sdf._shapes(packed, H)
    sdf._to_centres(
        packed, shapes, kinds, everything, 0.0, 0.0, 0.0, H, centres, distances, closest
    )
    expected = exact_distances(packed, H * centres.T.astype(np.float64)).T / H
    assert np.abs(distances - expected).max() < sdf.SLACK / 10
    for kind in (SOLID, SHEET):
        np.testing.assert_array_equal(closest[kind], distances[kinds == kind].min(axis=0))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sides_depend_on_the_possible_ties_alone(size):
    rng = np.random.default_rng(int(10 * size))
    packed, topology = random_scene(rng, size)
    kinds, flood = topology.kinds, sdf.flood_sides(topology.flood)
    trusted, everything = sdf.FLOOD_VOXELS * H, np.arange(len(packed), dtype=np.int32)
    room, ties = np.empty(len(packed)), np.empty(len(packed), np.int32)
    points = H * rng.uniform(-6, 6, (300, 3))
    solid = exact_distances(packed[kinds == SOLID], points).min(axis=1)
    fewer = 0
    for point, bound in zip(points, solid + rng.uniform(0, 0.02 * H, len(points))):
        count = sdf._possible_ties(packed, kinds, everything, *point, bound, trusted, ties)
        sides = [
            sdf.is_outside_exact(packed, kinds, candidates, room, *point, trusted, flood)
            for candidates in (everything, ties[:count])
        ]
        assert sides[0] == sides[1]
        fewer += count < len(packed)
    assert fewer


@pytest.mark.parametrize("spread", [0, 1e-3, 5], ids=["equal", "close", "apart"])
def test_triangles_are_tried_once_each_and_by_distance_to_one_step(spread):
    distances = np.random.default_rng(0).random(200).astype(np.float32) * spread + 2
    order = np.full(200, -1, np.int32)
    sdf._write_order(distances, 200, order, np.empty(sdf.ORDER_STEPS + 1, np.int32))
    assert sorted(order.tolist()) == list(range(200))
    step = max(spread, sdf.SLACK) / (sdf.ORDER_STEPS - 1)
    assert (np.diff(distances[order]) > -1.01 * step).all()
