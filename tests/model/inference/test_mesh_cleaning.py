"""Cleaning of surfaces: holes, floaters and bubbles, and meshes that need no cleaning."""

import numpy as np
import pytest
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from model.inference.mesh_cleaning import (
    clean_mesh,
    close_holes,
    count_open_edges,
    drop_unused_vertices,
    label_pieces,
    simplify,
)
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.schema import Bricks

R = 64


def bricks_of(sdf, keep=lambda cells: np.ones(len(cells), bool)):
    """Return bricks of a distance function of points [..., 3], without some of its cells.

    `keep` returns which of the cells [M, 3] remain.
    """
    line = np.arange(R) * spacing(R) - 0.5
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1)
    values = np.clip(sdf(grid) / band(R), -1, 1).astype(np.float16)
    side = R // CELL_SIDE
    cells = (
        values.reshape((side, CELL_SIDE) * 3)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(side, side, side, -1)
    )
    blocks = np.argwhere((np.abs(cells) < 1).any(axis=-1))
    blocks = blocks[keep(blocks)]
    sharp = np.zeros((len(blocks), 64), np.uint8)
    return Bricks(
        resolution=R, cells=blocks.astype(np.int16), values=cells[tuple(blocks.T)], sharp=sharp
    )


def ball(radius, centre=(0.0, 0.0, 0.0)):
    return lambda p: np.linalg.norm(p - np.array(centre), axis=-1) - radius


def union(*shapes):
    return lambda p: np.min([shape(p) for shape in shapes], axis=0)


def volume(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def assert_closed_manifold(vertices, faces):
    """Assert that edges have two opposite faces, and that the faces of a vertex are one fan."""
    assert count_open_edges(faces) == 0
    mesh = trimesh.Trimesh(vertices, faces, process=False, validate=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    links = {}
    for face in faces:
        for i in range(3):
            links.setdefault(face[i], []).append((face[(i + 1) % 3], face[(i + 2) % 3]))
    for link in links.values():
        following = dict(link)
        first = node = link[0][0]
        for _ in range(len(link) - 1):
            node = following[node]
            assert node != first, "two fans meet in one vertex"


def test_a_closed_mesh_is_unchanged():
    vertices, faces = extract(bricks_of(ball(0.35)))
    result = clean_mesh(vertices, faces)
    np.testing.assert_array_equal(result.vertices, vertices)
    np.testing.assert_array_equal(result.faces, faces)
    assert (result.holes, result.floaters, result.bubbles) == (0, 0, 0)


@pytest.mark.parametrize("missing", [1, 8, 40])
def test_holes_of_missing_cells_are_closed(missing):
    random = np.random.default_rng(missing)
    whole = bricks_of(ball(0.35))
    lost = random.permutation(len(whole.cells)) < missing
    bricks = bricks_of(ball(0.35), lambda blocks: ~lost)
    vertices, faces = extract(bricks)
    assert count_open_edges(faces) > 0
    capped, capped_faces, holes = close_holes(vertices, faces)
    assert holes >= 1
    assert_closed_manifold(capped, capped_faces)
    result = clean_mesh(vertices, faces)
    assert_closed_manifold(result.vertices, result.faces)
    if missing == 1:  # a flat cap over a small hole
        assert volume(result.vertices, result.faces) == pytest.approx(
            4 / 3 * np.pi * 0.35**3, rel=0.02
        )


def test_pieces_that_touch_in_a_border_vertex_are_separated():
    # A fan of two separate triangle pairs around vertex 0: its border passes there twice.
    vertices = np.array(
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0, 0], [-1, -1, 0], [0, -1, 0.0]]
    )
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 4, 5], [0, 5, 6]], np.int32)
    closed, closed_faces, holes = close_holes(vertices, faces)
    assert holes == 2
    assert len(closed) == 7 + 1 + 2  # a copy of vertex 0, two centres
    assert_closed_manifold(closed, closed_faces)


def test_floaters_and_bubbles_are_removed():
    vertices, faces = extract(
        bricks_of(union(ball(0.3, (-0.1, 0, 0)), ball(0.03, (0.4, 0.4, 0.4))))
    )
    hollow = extract(bricks_of(ball(0.1, (-0.1, 0, 0))))
    everything = np.concatenate([vertices, hollow[0]])
    all_faces = np.concatenate([faces, hollow[1][:, ::-1] + len(vertices)])
    result = clean_mesh(everything, all_faces, min_piece=0.02)
    assert (result.holes, result.floaters, result.bubbles) == (0, 1, 1)
    assert volume(result.vertices, result.faces) == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=0.01)
    kept = clean_mesh(everything, all_faces, min_piece=0.0)
    assert (kept.floaters, kept.bubbles) == (0, 1)


def test_a_mesh_that_is_inside_out_as_a_whole_is_kept():
    vertices, faces = extract(bricks_of(ball(0.3)))
    assert len(clean_mesh(vertices, faces[:, ::-1].copy()).faces) == len(faces)


def test_open_edges_are_counted():
    tetrahedron = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]], np.int32)
    assert count_open_edges(tetrahedron) == 0
    assert count_open_edges(tetrahedron[1:]) == 3
    turned = tetrahedron.copy()
    turned[0] = turned[0][::-1]
    assert count_open_edges(turned) > 0
    # Vertex 8 belongs to no face and is a piece of its own.
    assert len(set(label_pieces(9, np.concatenate([tetrahedron, tetrahedron + 4])))) == 3
    vertices, faces = drop_unused_vertices(np.arange(27.0).reshape(9, 3), tetrahedron + 4)
    np.testing.assert_array_equal(vertices, np.arange(27.0).reshape(9, 3)[4:8])
    np.testing.assert_array_equal(faces, tetrahedron)


def test_simplification_reduces_the_faces():
    pytest.importorskip("fast_simplification")
    vertices, faces = extract(bricks_of(ball(0.35)))
    fewer, fewer_faces = simplify(vertices, faces, 1000)
    assert 900 <= len(fewer_faces) <= 1000
    assert count_open_edges(fewer_faces) == 0
    np.testing.assert_allclose(np.linalg.norm(fewer, axis=1), 0.35, atol=0.01)
    assert simplify(vertices, faces, len(faces))[1] is faces


def test_invalid_arguments_are_refused():
    vertices, faces = extract(bricks_of(ball(0.35)))
    with pytest.raises(ValueError, match="min_piece must be in"):
        clean_mesh(vertices, faces, min_piece=1.0)
    with pytest.raises(ValueError, match="must have a face, got none"):
        clean_mesh(vertices, faces[:0])
    with pytest.raises(ValueError, match="at least 4 faces, got 3"):
        simplify(vertices, faces, 3)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_those_of_a_graph_library(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    faces = rng.integers(0, count, (rng.integers(0, 40), 3)).astype(np.int32)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges)), tuple(edges.T)), shape=(count, count))
    expected = connected_components(graph, directed=False)[1]
    np.testing.assert_array_equal(label_pieces(count, faces), expected)
