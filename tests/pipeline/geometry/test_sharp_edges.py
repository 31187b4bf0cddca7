"""Sharp bits: points near the edges of a box are marked, and no points of a sphere."""

import numpy as np
import pytest
import trimesh

from pipeline.core.grid import band, spacing
from pipeline.core.schema import Mesh
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.sharp_edges import SHARP_VOXELS
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo


def bits(bricks):
    return np.unpackbits(bricks.sharp, axis=1, bitorder="little").astype(bool)


def distance_to_box_edges(points, half):
    """Return the distance to the 12 edges of a centred box."""
    gap = np.abs(np.abs(points) - half)
    best = np.full(points.shape[:-1], np.inf)
    for axis in range(3):  # edges along this axis
        others = [a for a in range(3) if a != axis]
        along = np.maximum(np.abs(points[..., axis]) - half[axis], 0)
        best = np.minimum(
            best, np.sqrt(gap[..., others[0]] ** 2 + gap[..., others[1]] ** 2 + along**2)
        )
    return best


def test_a_box_gives_its_twelve_edges_and_nothing_else():
    half = np.array([0.41, 0.3, 0.22])
    bricks = compute_bricks(
        build_topology(geo.box(2 * half).mesh, TopologyConfig(resolution=128)), 128
    )
    points, h = geo.points_of(bricks), spacing(128)
    active = np.abs(geo.distances_of(bricks)) * h < band(128) * 0.999
    distance = distance_to_box_edges(points, half)
    clear = np.abs(distance - SHARP_VOXELS * h) > 1e-6
    np.testing.assert_array_equal(
        bits(bricks)[clear & active], (distance < SHARP_VOXELS * h)[clear & active]
    )
    assert not bits(bricks)[np.abs(bricks.values) == 1].any()


def doubled(quads, vertices):
    """Return each quad as two triangles, and again as the two of the other diagonal."""
    fan = [quad[[0, k, k + 1]] for side in quads for quad in (side, side[::-1]) for k in (1, 2)]
    return Mesh(vertices=np.asarray(vertices, np.float64), faces=np.array(fan, np.int32))


def test_the_backs_of_flat_quads_add_no_edge():
    """Each side of a cube has 4 x 4 quads, all of them twice. Its 12 edges are found once."""
    n, half = 4, 0.4
    grid = (
        2 * half * np.stack(np.meshgrid(*[np.arange(n + 1)] * 2, indexing="ij"), axis=-1) / n - half
    )
    number = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    side = np.stack(
        [number[:-1, :-1], number[1:, :-1], number[1:, 1:], number[:-1, 1:]], axis=-1
    ).reshape(-1, 4)
    sheets = [
        np.insert(grid.reshape(-1, 2), axis, sign * half, axis=1)
        for axis in range(3)
        for sign in (-1, 1)
    ]
    quads = np.concatenate([side + k * len(sheets[0]) for k in range(6)])
    topology = build_topology(doubled(quads, np.concatenate(sheets)), TopologyConfig(resolution=64))
    ends = topology.sharp_edges
    assert (
        np.isclose(np.abs(ends), half).all(axis=1).sum(axis=1) == 2
    ).all()  # two coordinates are those of a wall
    assert np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1).sum() == pytest.approx(12 * 2 * half)
    assert len(np.unique(ends.mean(axis=1).round(6), axis=0)) == len(ends) == 12 * n


def test_a_flat_quad_with_a_back_has_no_sharp_edge():
    corners = [[-0.4, 0, -0.4], [0.4, 0, -0.4], [0.4, 0, 0.4], [-0.4, 0, 0.4]]
    topology = build_topology(
        doubled(np.array([[0, 1, 2, 3]]), corners), TopologyConfig(resolution=64)
    )
    assert len(topology.sharp_edges) == 0


def test_a_sphere_has_no_sharp_edge():
    bricks = compute_bricks(
        build_topology(geo.sphere(subdivisions=3).mesh, TopologyConfig(resolution=128)), 128
    )
    assert not bits(bricks).any()


def test_buried_edges_do_not_count():
    """A cube inside a ball is not visible, so its edges are not sharp."""
    ball, cube = geo.sphere(0.4, subdivisions=3).mesh, trimesh.creation.box(extents=(0.3, 0.3, 0.3))
    both = geo.as_mesh(trimesh.Trimesh(ball.vertices, ball.faces, process=False), cube)
    topology = build_topology(both, TopologyConfig(resolution=128))
    assert len(topology.sharp_edges) == 0


def test_the_visible_part_of_an_edge_counts():
    """A long bar passes through a ball. Its four long edges end at the ball."""
    ball, bar = geo.sphere(0.2, subdivisions=3).mesh, trimesh.creation.box(extents=(0.9, 0.1, 0.1))
    both = geo.as_mesh(trimesh.Trimesh(ball.vertices, ball.faces, process=False), bar)
    topology = build_topology(both, TopologyConfig(resolution=128))
    long = np.abs(topology.sharp_edges[:, 0, 0] - topology.sharp_edges[:, 1, 0]) > 0.1
    ends = np.abs(topology.sharp_edges[long][..., 0])
    assert long.sum() == 8
    assert abs(ends.min() - np.sqrt(0.2**2 - 2 * 0.05**2)) < 4 * spacing(128)
