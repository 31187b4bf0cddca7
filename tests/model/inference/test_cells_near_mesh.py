"""The cells near a mesh: against brute force over all grid points, and at the band's border."""

import numpy as np
import pytest
import trimesh

from model.inference.cells_near_mesh import cells_near
from pipeline.core.grid import CELL_SIDE, band, spacing


def brute_force(vertices, faces, resolution):
    """Return the cells of all grid points within tau, by trimesh's closest points in fp64."""
    line = np.arange(resolution) * spacing(resolution) - 0.5
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    triangles = vertices[faces]
    best = np.full(len(points), np.inf)
    for triangle in triangles:
        close = trimesh.triangles.closest_point(
            np.broadcast_to(triangle, (len(points), 3, 3)), points
        )
        best = np.minimum(best, np.linalg.norm(close - points, axis=1))
    near = (
        (best < band(resolution))
        .reshape((resolution // CELL_SIDE, CELL_SIDE) * 3)
        .any(axis=(1, 3, 5))
    )
    return np.argwhere(near)


def soup(seed, faces, size):
    random = np.random.default_rng(seed)
    centre = random.uniform(-0.5, 0.5, (faces, 1, 3))
    return (centre + size * random.uniform(-1, 1, (faces, 3, 3))).reshape(-1, 3), np.arange(
        3 * faces
    ).reshape(-1, 3)


@pytest.mark.parametrize("resolution", [16, 24])
@pytest.mark.parametrize("size", [0.02, 0.4])
def test_cells_equal_those_of_brute_force(resolution, size):
    for seed in range(3):
        vertices, faces = soup(seed, 4, size)  # partly outside the cube
        np.testing.assert_array_equal(
            cells_near(vertices, faces, resolution), brute_force(vertices, faces, resolution)
        )


@pytest.mark.parametrize("shape", ["point", "segment"])
def test_a_face_without_area_counts_as_a_segment_or_point(shape):
    vertices = np.array([[0.1, 0.2, 0.3]] * 3)
    if shape == "segment":
        vertices[1] += [0.2, -0.1, -0.4]
    np.testing.assert_array_equal(
        cells_near(vertices, np.array([[0, 1, 2]]), 16),
        brute_force_of_points(vertices[0], vertices[1], 16),
    )


def brute_force_of_points(a, b, resolution):
    line = np.arange(resolution) * spacing(resolution) - 0.5
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    along = b - a
    t = np.clip((points - a) @ along / max(along @ along, 1e-300), 0, 1)
    near = np.linalg.norm(points - a - t[:, None] * along, axis=1) < band(resolution)
    return np.argwhere(near.reshape((resolution // CELL_SIDE, CELL_SIDE) * 3).any(axis=(1, 3, 5)))


def test_points_exactly_at_tau_do_not_count():
    step = spacing(16)
    tau = band(16)  # 1/8, so that the triangle is exactly tau from the first grid plane
    vertices = np.array(
        [[-0.5 + tau, -9.0, -9.0], [-0.5 + tau, 9.0, -9.0], [-0.5 + tau, 0.0, 18.0]]
    )
    found = cells_near(vertices, np.array([[0, 1, 2]]), 16)
    assert set(found[:, 0]) == {0}
    assert step < tau
    outside = vertices - [2 * tau, 0, 0]  # exactly tau beyond the wall: no point is strictly closer
    assert len(cells_near(outside, np.array([[0, 1, 2]]), 16)) == 0


def test_invalid_input_is_refused():
    vertices, faces = soup(0, 1, 0.1)
    with pytest.raises(ValueError, match="multiple of 8, got 20"):
        cells_near(vertices, faces, 20)
    with pytest.raises(ValueError, match="vertices must be finite"):
        cells_near(vertices * np.nan, faces, 16)
    assert cells_near(vertices, faces[:0], 16).shape == (0, 3)
