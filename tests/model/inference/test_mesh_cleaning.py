"""Cleaning of surfaces: holes, floaters and bubbles, and meshes that need no cleaning."""

from functools import cache

import numpy as np
import pytest
import trimesh
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from model.inference import mesh_cleaning
from model.inference.mesh_cleaning import (
    _is_manifold,
    _without_flaps,
    clean_mesh,
    close_holes,
    count_open_edges,
    drop_unused_vertices,
    label_pieces,
    simplify,
)
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.simplification import collapse_edges
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


def euler_number(vertices, faces):
    return trimesh.Trimesh(vertices, faces, process=False, validate=False).euler_number


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
    # The patches continue the ball. Flat caps would lie at a radius of 0.33 and less.
    patch = np.linalg.norm(capped[len(vertices) :], axis=1)
    assert missing == 40 or np.median(patch) == pytest.approx(0.35, rel=0.01)
    if missing == 1:
        np.testing.assert_allclose(patch, 0.35, rtol=0.01)
        assert volume(result.vertices, result.faces) == pytest.approx(
            4 / 3 * np.pi * 0.35**3, rel=0.002
        )


def test_a_patch_over_a_plane_is_flat_and_one_over_a_cap_bulges():
    vertices, faces = extract(bricks_of(ball(0.35)))
    height = vertices[faces].mean(1)[:, 1]
    open_ball = drop_unused_vertices(vertices, faces[height < 0.25])
    capped, capped_faces, holes = close_holes(*open_ball)
    assert holes == 1
    assert_closed_manifold(capped, capped_faces)
    assert capped[len(open_ball[0]) :, 1].max() > 0.29  # the ball has 0.35, a flat cap 0.25
    plate = trimesh.creation.box((1, 1, 1)).subdivide_to_size(0.1)
    centres = plate.vertices[plate.faces].mean(1)
    around = ~((centres[:, 1] > 0.49) & (np.abs(centres[:, [0, 2]]) < 0.25).all(1))
    open_plate = drop_unused_vertices(
        np.asarray(plate.vertices), np.asarray(plate.faces)[around].astype(np.int32)
    )
    patched, patched_faces, holes = close_holes(*open_plate)
    assert holes == 1
    assert count_open_edges(patched_faces) == 0
    np.testing.assert_allclose(patched[len(open_plate[0]) :, 1], 0.5, atol=1e-6)


def frustum(low=0.2, high=0.1, sides=24):
    """Return the side of a cone between two circles, without its base and top."""
    angle = 2 * np.pi * np.arange(sides) / sides
    circle = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], axis=1)
    vertices = np.concatenate([low * circle, high * circle + (0, 0.2, 0)])
    i = np.arange(sides)
    following = (i + 1) % sides
    faces = np.concatenate(
        [
            np.stack([i, sides + i, following], axis=1),
            np.stack([following, sides + i, sides + following], axis=1),
        ]
    )
    return vertices, faces.astype(np.int32)


def test_only_holes_up_to_a_size_are_closed():
    vertices, faces = frustum(low=0.2, high=0.1)
    for max_hole, closed in ((None, 2), (0.41, 2), (0.39, 1), (0.21, 1), (0.19, 0)):
        patched, patched_faces, holes = close_holes(vertices, faces, max_hole)
        assert holes == closed
        assert count_open_edges(patched_faces) == 24 * (2 - closed)
        assert patched_faces.max() == len(patched) - 1
    assert count_open_edges(clean_mesh(vertices, faces, max_hole=0.39).faces) == 24
    whole = clean_mesh(vertices, faces)
    assert volume(whole.vertices, whole.faces) > 0


def test_a_mesh_with_three_faces_at_an_edge_is_refused():
    vertices = np.eye(3)[[0, 1, 2, 0, 1]] + np.arange(5)[:, None] * 0.1
    faces = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]], np.int32)
    with pytest.raises(ValueError, match="at most two faces at each edge"):
        close_holes(vertices, faces)


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
    vertices, faces = extract(bricks_of(ball(0.35)))
    fewer, fewer_faces = simplify(vertices, faces, 1000)
    assert 990 <= len(fewer_faces) <= 1000
    assert_closed_manifold(fewer, fewer_faces)
    np.testing.assert_allclose(np.linalg.norm(fewer, axis=1), 0.35, atol=0.01)
    assert simplify(vertices, faces, len(faces))[1] is faces


HALF = np.array([0.3, 0.2, 0.15])
TURN = trimesh.transformations.euler_matrix(0.35, 0.6, 0.17)[:3, :3]


def turned_box():
    return extract(bricks_of(lambda p: (np.abs(p @ TURN) - HALF).max(-1)))


@pytest.mark.parametrize("target", [1600, 800, 400, 200, 100, 50])
def test_a_simplified_mesh_stays_a_closed_manifold(target):
    vertices, faces = simplify(*turned_box(), target)
    assert 0.9 * target <= len(faces) <= target
    assert_closed_manifold(vertices, faces)


@cache
def porous_ball():
    """Return a ball full of caves, whose walls and bridges are a few voxels thick."""
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((R,) * 3), 1.5)
    noise *= 0.02 / noise.std()
    cleaned = clean_mesh(*extract(bricks_of(lambda p: np.maximum(noise, ball(0.2)(p)))))
    return cleaned.vertices, cleaned.faces


@pytest.mark.parametrize("share", [0.3, 0.1, 0.05])
@pytest.mark.parametrize("large", [10**9, 1000])
def test_thin_walls_do_not_grow_together_in_simplification(share, large, monkeypatch):
    monkeypatch.setattr(mesh_cleaning, "LARGE", large)
    vertices, faces = porous_ball()
    assert_closed_manifold(vertices, faces)
    target = int(share * len(faces))
    # The collapses of meshoptimizer alone let parts of this mesh touch in edges.
    assert count_open_edges(collapse_edges(vertices, faces, target)) > 0
    fewer, fewer_faces = simplify(vertices, faces, target)
    assert 0.9 * target <= len(fewer_faces) <= target
    assert_closed_manifold(fewer, fewer_faces)
    # A file without vertex numbers, such as an STL file, has the same edges.
    assert len(np.unique(fewer.astype(np.float32), axis=0)) == len(fewer)
    assert euler_number(fewer, fewer_faces) == euler_number(vertices, faces)


def test_a_large_mesh_is_halved_by_the_faster_library(monkeypatch):
    seen = []

    def collapse(vertices, faces, target):
        seen.append((len(faces), target))
        return collapse_edges(vertices, faces, target)

    monkeypatch.setattr(mesh_cleaning, "collapse_edges", collapse)
    monkeypatch.setattr(mesh_cleaning, "LARGE", 3000)
    vertices, faces = simplify(*extract(bricks_of(ball(0.35))), 500)
    assert [target == count // 2 for count, target in seen] == [True] * 3
    assert 0.9 * 500 <= len(faces) <= 500
    assert_closed_manifold(vertices, faces)
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), 0.35, atol=0.01)


def test_a_mesh_is_manifold_if_no_edges_and_no_vertices_of_its_parts_touch():
    cube = trimesh.creation.box()
    vertices, faces = np.asarray(cube.vertices), np.asarray(cube.faces, np.int32)
    both = np.concatenate([vertices, vertices + 1])
    assert _is_manifold(vertices, faces)
    assert _is_manifold(vertices, faces[1:])
    low = int(np.flatnonzero((vertices == 0.5).all(1))[0])
    high = len(vertices) + int(np.flatnonzero((vertices == -0.5).all(1))[0])
    second = faces + len(vertices)
    assert _is_manifold(both, np.concatenate([faces, second]))
    second[second == high] = low
    assert not _is_manifold(both, np.concatenate([faces, second]))
    assert not _is_manifold(vertices, np.concatenate([faces, faces[:1]]))
    flap = np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    np.testing.assert_array_equal(_without_flaps(np.concatenate([flap, faces[3:]])), faces[3:])


def test_a_hole_that_was_kept_stays_in_simplification():
    vertices, faces = extract(bricks_of(ball(0.35)))
    vertices, faces = drop_unused_vertices(vertices, faces[vertices[faces].mean(1)[:, 1] < 0.2])
    fewer, fewer_faces = simplify(vertices, faces, 1000)
    assert len(fewer_faces) <= 1000
    assert euler_number(fewer, fewer_faces) == 1  # a disc
    edges = np.sort(fewer_faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    edges, counts = np.unique(edges, axis=0, return_counts=True)
    border = fewer[np.unique(edges[counts == 1])]
    np.testing.assert_allclose(border[:, 1], 0.2, atol=2 / R)


def test_simplification_keeps_sharp_edges():
    half, turn = HALF, TURN
    vertices, faces = turned_box()
    fewer, fewer_faces = simplify(vertices, faces, 200)
    assert len(fewer_faces) <= 200
    inward = (np.abs(fewer[fewer_faces].mean(1) @ turn) - half).max(-1)
    assert np.abs(inward).max() < 1.5 / R  # no face cuts off a corner or an edge
    corners = half * np.array(np.meshgrid(*[[-1, 1]] * 3)).T.reshape(-1, 3) @ turn.T
    nearest = np.linalg.norm(corners[:, None] - fewer[None], axis=-1).min(1)
    assert nearest.max() < 2 / R


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
