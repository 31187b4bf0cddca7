"""Marching cubes: all cases of the tables, and the closed mesh of a field."""

import numpy as np
import pytest
import trimesh

from pipeline.core.errors import Reject
from pipeline.core.grid import band, spacing
from pipeline.core.primitives import marching_cubes as isosurface
from pipeline.core.primitives.marching_cubes import extract, watertight_mesh
from pipeline.core.schema import Bricks
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo


def bricks_from(dense):
    """Return bricks with all cells of a dense [R, R, R] field."""
    size = len(dense) // 8
    blocks = np.argwhere(np.ones((size,) * 3, bool)).astype(np.int16)
    values = dense.reshape(size, 8, size, 8, size, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 512)
    sharp = np.zeros((len(blocks), 64), np.uint8)
    return Bricks(
        resolution=len(dense), cells=blocks, values=values.astype(np.float32), sharp=sharp
    )


def directed_edges(faces):
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def assert_closed_and_oriented(faces):
    """Assert that each directed edge occurs once and its reverse too: a closed manifold."""
    edges = directed_edges(faces)
    keys = edges[:, 0].astype(np.int64) << 32 | edges[:, 1]
    reverse = edges[:, 1].astype(np.int64) << 32 | edges[:, 0]
    assert len(np.unique(keys)) == len(keys)
    np.testing.assert_array_equal(np.sort(keys), np.sort(reverse))


@pytest.mark.parametrize("seed", range(5))
def test_random_fields_give_closed_manifolds(seed):
    """Noise has all 256 cases and all ambiguous faces. Padding closes the surface."""
    field = np.ones((32, 32, 32))
    field[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).uniform(-1, 1, (28, 28, 28))
    vertices, faces = extract(bricks_from(field))
    assert_closed_and_oriented(faces)
    assert trimesh.Trimesh(vertices, faces, process=False).volume > 0  # normals point outwards


def test_every_case_separates_inside_from_outside():
    for case in range(256):
        rows = isosurface._TABLE[case, : isosurface._TRIANGLES[case]]
        crossed = {
            e for e, (a, b) in enumerate(isosurface._EDGES) if (case >> a & 1) != (case >> b & 1)
        }
        assert set(rows.reshape(-1).tolist()) == crossed


def test_vertices_are_interpolated_on_grid_edges():
    """A tilted plane is linear, so the surface lies in the plane up to rounding."""
    i, j, k = np.indices((16, 16, 16))
    vertices, faces = extract(bricks_from(0.3 * i - 0.2 * j + 0.5 * k - 3.31))
    index = (vertices + 0.5) / spacing(16)
    assert np.abs(index @ [0.3, -0.2, 0.5] - 3.31).max() < 1e-5
    normals = np.cross(
        vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]]
    )
    assert (normals @ [0.3, -0.2, 0.5] > -1e-12).all()  # towards larger values


def test_cubes_with_a_missing_corner_are_left_out():
    """A plane through two neighbouring cells ends at the last stored points and stays plane."""
    i, j, k = np.indices((24, 16, 16))
    dense = np.full((24, 24, 24), 9.0)
    dense[:, :16, :16] = j - 7.5 + 0 * i + 0 * k
    whole = bricks_from(dense)
    keep = (whole.cells[:, 2] == 0) & (whole.cells[:, 1] < 2) & (whole.cells[:, 0] < 2)
    part = Bricks(
        resolution=24, cells=whole.cells[keep], values=whole.values[keep], sharp=whole.sharp[keep]
    )
    vertices, faces = extract(part)
    index = (vertices + 0.5) / spacing(24)
    np.testing.assert_allclose(index[:, 1], 7.5)
    assert index.max(axis=0) == pytest.approx([15, 7.5, 7])
    assert len(faces) == 2 * 15 * 7


@pytest.mark.parametrize("resolution", [64, 256])
def test_the_watertight_mesh_is_closed_and_on_the_zero_level(resolution):
    solid = geo.torus()
    bricks = compute_bricks(build_topology(solid.mesh, TopologyConfig(resolution=128)), resolution)
    mesh = watertight_mesh(bricks)
    assert_closed_and_oriented(mesh.faces)
    dense = np.full((resolution,) * 3, np.nan)
    for (x, y, z), values in zip(bricks.cells.astype(int) * 8, bricks.values):
        dense[x : x + 8, y : y + 8, z : z + 8] = values.reshape(8, 8, 8)
    index = (mesh.vertices + 0.5) / spacing(resolution)
    low = np.clip(np.floor(index).astype(int), 0, resolution - 2)
    t = index - low
    value = np.zeros(len(index))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, t, 1 - t), axis=1)
        value += np.where(weight > 1e-6, weight * np.nan_to_num(dense[tuple((low + corner).T)]), 0)
    assert np.abs(value).max() * band(resolution) / spacing(resolution) < 0.05
    volume = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume
    exact = trimesh.Trimesh(solid.mesh.vertices, solid.mesh.faces, process=False).volume
    assert volume == pytest.approx(exact, rel=0.02)


def test_no_surface_is_rejected():
    cells, values = np.zeros((0, 3), np.int16), np.zeros((0, 512), np.float16)
    sharp = np.zeros((0, 64), np.uint8)
    empty = Bricks(resolution=64, cells=cells, values=values, sharp=sharp)
    with pytest.raises(Reject, match="no_surface"):
        watertight_mesh(empty)
