"""Signed distances at points off the grid, against brute force and winding numbers."""

import numpy as np
import pytest
import trimesh

from pipeline.core.grid import band, spacing
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.point_sdf import PointSdf
from pipeline.geometry.sdf import SHEET_HALF_VOXELS, compute_bricks
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo

HALF = 0.01


def sdf_of(mesh, resolution=64, half=HALF):
    return PointSdf(build_topology(mesh, TopologyConfig(resolution=resolution)), half)


@pytest.mark.parametrize("solid", [geo.box(), geo.torus(), geo.sphere()], ids=["box", "torus", "s"])
def test_distances_and_signs_equal_brute_force_everywhere(solid):
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [
            rng.uniform(-0.6, 0.6, (2000, 3)),  # some lie outside the cube
            trimesh.sample.sample_surface(
                trimesh.Trimesh(solid.mesh.vertices, solid.mesh.faces), 2000, seed=1
            )[0]
            + rng.normal(scale=0.003, size=(2000, 3)),
        ]
    )
    sdf = sdf_of(solid.mesh).at(points)
    np.testing.assert_allclose(np.abs(sdf), geo.brute_distance(points, solid.mesh), atol=1e-12)
    clear = np.abs(sdf) > 1e-9
    np.testing.assert_array_equal(
        (sdf < 0)[clear], geo.winding_number(points, solid.mesh)[clear] > 0.5
    )


def test_a_sheet_is_a_shell_of_the_given_thickness():
    corners = np.array([[-0.4, 0, -0.4], [0.4, 0, -0.4], [0.4, 0, 0.4], [-0.4, 0, 0.4]])
    plane = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    points = np.random.default_rng(0).uniform(-0.45, 0.45, (2000, 3))
    mesh = geo.as_mesh(plane)
    np.testing.assert_allclose(
        sdf_of(mesh).at(points), geo.brute_distance(points, mesh) - HALF, atol=1e-12
    )


def test_values_at_grid_points_are_those_of_the_bricks():
    """The asset has a solid inside another one, an overlapping one and a sheet."""
    sheet = trimesh.Trimesh(
        [[-0.1, 0.3, -0.3], [0.4, 0.31, -0.3], [0.4, 0.3, 0.3]], [[0, 1, 2]], process=False
    )
    parts = [
        geo.box((0.5, 0.4, 0.3), (-0.1, 0.0, 0.0)),
        geo.box((0.5, 0.2, 0.2), (0.15, 0.03, 0.01)),
    ]
    parts = [trimesh.Trimesh(part.mesh.vertices, part.mesh.faces, process=False) for part in parts]
    mesh = geo.as_mesh(*parts, trimesh.creation.icosphere(radius=0.08), sheet)
    topology = build_topology(mesh, TopologyConfig(resolution=64))
    bricks = compute_bricks(topology, 64)
    half = SHEET_HALF_VOXELS * spacing(64)
    sdf = PointSdf(topology, half).at(geo.points_of(bricks).reshape(-1, 3))
    stored = bricks.values.reshape(-1).astype(np.float64)
    np.testing.assert_allclose(np.clip(sdf / band(64), -1, 1), stored, atol=1e-3)
    clear = np.abs(stored) > 1e-3
    np.testing.assert_array_equal((sdf < 0)[clear], (stored < 0)[clear])


def test_normals_on_an_edge_are_the_mean_of_its_two_faces():
    mesh = geo.box((0.8, 0.4, 0.4)).mesh
    edge = np.stack([np.linspace(-0.3, 0.3, 50), np.full(50, 0.2), np.full(50, 0.2)], axis=1)
    normals, is_solid = sdf_of(mesh).normals_at(edge, 1e-6)
    np.testing.assert_allclose(normals, np.tile([0, 0.5**0.5, 0.5**0.5], (50, 1)), atol=1e-9)
    assert is_solid.all()
