"""Transformed bricks equal the bricks of the transformed shape."""

import numpy as np
import pytest

from model.sparse_tensor import BrickBatch
from pipeline.core.cameras import look_at_origin
from tests.train.analytic_builds import bricks_of, ellipsoid, grid
from train.data.symmetry import SYMMETRIES, move_bricks, quarter_turn, transform_points

R = 32
FIELD = ellipsoid((0.09, -0.05, 0.02), (0.31, 0.2, 0.12))  # no symmetry of its own


def transform_bricks(bricks, symmetry):
    moved, points = move_bricks(bricks, symmetry)
    (result,) = BrickBatch.collate([moved], [points]).bricks()
    return result


def moved_back(symmetry):
    """Return where each grid point of the moved shape was, as exact coordinates [R, R, R, 3]."""
    axes, mirrored = SYMMETRIES[symmetry]
    matrix = np.zeros((3, 3), int)
    for axis in range(3):
        matrix[axis, axes[axis]] = -1 if mirrored[axis] else 1
    points = np.stack(np.meshgrid(*[np.arange(R)] * 3, indexing="ij"), -1)
    doubled = 2 * points - (R - 1)  # about the centre
    source = (doubled @ matrix + R - 1) // 2  # the inverse of an orthogonal matrix is its transpose
    return grid(R)[tuple(np.moveaxis(source, -1, 0))]


@pytest.mark.parametrize("symmetry", range(48))
def test_transformed_bricks_equal_those_of_the_moved_shape(symmetry):
    moved, expected = (
        transform_bricks(bricks_of(FIELD, R), symmetry),
        bricks_of(FIELD, R, moved_back(symmetry)),
    )
    assert moved.resolution == R
    for name in ("cells", "values", "sharp"):
        ours, theirs = getattr(moved, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, name)


def test_there_are_48_and_the_first_changes_nothing():
    matrices = {symmetry for symmetry in SYMMETRIES}
    assert len(matrices) == len(SYMMETRIES) == 48
    bricks = bricks_of(FIELD, R)
    assert transform_bricks(bricks, 0).values.tobytes() == bricks.values.tobytes()
    assert len({transform_bricks(bricks, n).values.tobytes() for n in range(48)}) == 48


def test_points_move_like_cells():
    bricks = bricks_of(FIELD, R)
    for symmetry in (5, 23, 47):
        moved = transform_points(bricks.cells, R // 8, symmetry)
        assert {*map(tuple, moved.tolist())} == {
            *map(tuple, transform_bricks(bricks, symmetry).cells.tolist())
        }


@pytest.mark.parametrize("symmetry", [-1, 48])
def test_other_symmetries_are_refused(symmetry):
    with pytest.raises(ValueError, match=r"symmetry must be in 0\.\.47"):
        transform_bricks(bricks_of(FIELD, R), symmetry)


@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_bring_what_a_camera_sees_to_the_front(turns):
    seen = look_at_origin(90.0 * turns, 0.0, 50.0).c2w[:3, 2].round()  # direction of the eye
    axes, mirrored = SYMMETRIES[quarter_turn(turns)]
    moved = np.where(mirrored, -1, 1) * seen[list(axes)]
    np.testing.assert_array_equal(moved, [0, 0, 1])
    up = np.where(mirrored, -1, 1) * np.array([0, 1, 0])[list(axes)]
    np.testing.assert_array_equal(up, [0, 1, 0])
    matrix = np.where(mirrored, -1, 1)[:, None] * np.eye(3)[list(axes)]
    assert np.linalg.det(matrix) == 1  # a turn and no mirroring
    flip = SYMMETRIES[quarter_turn(turns, mirrored=True)]
    flipped = np.where(flip[1], -1, 1)[:, None] * np.eye(3)[list(flip[0])]
    np.testing.assert_array_equal(flipped, np.diag([-1, 1, 1]) @ matrix)
