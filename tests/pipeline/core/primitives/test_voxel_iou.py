"""Inside of closed meshes, compared with formulas, and intersection over union."""

import numpy as np
import pytest
import torch
import trimesh

from pipeline.core.grid import band, spacing
from pipeline.core.primitives.voxel_iou import (
    OFFSETS,
    inside,
    intersection_over_union,
    solid_intersection_over_union,
)


def points(side):
    """Return the points that `inside` classifies."""
    line = np.arange(side)
    x, y, z = np.meshgrid(line + 0.5, line + OFFSETS[0], line + OFFSETS[1], indexing="ij")
    return np.stack([x, y, z], -1) / side - 0.5


def test_a_rotated_box_and_a_ball_match_their_formulas():
    turn = trimesh.transformations.rotation_matrix(0.7, [1, 2, 3])
    box = trimesh.creation.box([0.7, 0.4, 0.3], transform=turn)
    local = np.abs(points(40) @ turn[:3, :3]) < np.array([0.35, 0.2, 0.15])
    np.testing.assert_array_equal(inside(box.vertices, box.faces, 40), local.all(axis=-1))
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    assert (
        intersection_over_union(
            inside(ball.vertices, ball.faces), np.linalg.norm(points(64), axis=-1) < 0.4
        )
        > 0.99
    )


def test_a_cavity_is_outside_and_many_layers_are_counted():
    shells = [
        trimesh.creation.icosphere(subdivisions=3, radius=0.48 * n / 100) for n in range(1, 101)
    ]
    both = trimesh.util.concatenate([shells[99], shells[49]])
    radius = np.linalg.norm(points(64), axis=-1)
    assert (
        intersection_over_union(
            inside(both.vertices, both.faces), (radius < 0.48) & (radius > 0.24)
        )
        > 0.97
    )
    layers = trimesh.util.concatenate(shells)  # up to 200 crossings on a line
    middle = inside(layers.vertices, layers.faces, 64)[32, 32, 32:]
    expected = np.floor(100 * radius[32, 32, 32:] / 0.48) % 2 == 1
    assert (middle == expected).mean() > 0.7


def test_intersection_over_union():
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    assert intersection_over_union(a, b) == 1.0
    a[0], b[:, :2] = True, True
    assert intersection_over_union(a, b) == pytest.approx(2 / 6)
    assert not inside(np.zeros((3, 3)), np.array([[0, 1, 2]]), 8).any()


def plate(bottom, top, side=8, resolution=256):
    """Return the stored values of a plate across the whole grid, of which `side` rows are taken."""
    y = torch.arange(side, dtype=torch.float64)
    distance = torch.maximum(bottom - y, y - top) * spacing(resolution) / band(resolution)
    return distance.clamp(-1, 1)[:, None].expand(side, 5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((2.01, 4.5), (2.01, 4.5), 1.0),
        ((1.99, 4.5), (2.01, 4.5), 2.49 / 2.51),  # the masks differ in one of three layers
        ((2.0, 3.5), (2.3, 3.8), 1.2 / 1.8),
        ((1.0, 2.0), (4.0, 5.0), 0.0),
    ],
)
def test_the_overlap_of_plates_is_exact_between_grid_points(a, b, expected):
    found = solid_intersection_over_union(plate(*a), plate(*b), 256)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    masks = plate(*a) < 0, plate(*b) < 0
    if a == (1.99, 4.5):
        assert intersection_over_union(*masks) == pytest.approx(2 / 3)


def test_solids_without_a_point_inside_overlap_completely():
    empty = torch.ones(4, 4)
    assert solid_intersection_over_union(empty, empty, 64).item() == 1.0
    assert solid_intersection_over_union(empty, -empty, 64).item() == 0.0
