"""Kinds of triangles, flood fill, boundary loops and caps."""

import tracemalloc

import numpy as np
import pytest
import trimesh
from scipy import ndimage

from pipeline.core.errors import Reject
from pipeline.core.grid import spacing
from pipeline.core.primitives.triangles import distance2, pack
from pipeline.core.schema import Mesh
from pipeline.geometry import holes
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.flood_fill import bin_triangles, flood_fill, is_reached
from pipeline.geometry.topology import BURIED, SHEET, SOLID, _add_caps, build_topology
from tests.pipeline import known_shapes as geo


def area(triangles):
    return (
        np.linalg.norm(
            np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
        ).sum()
        / 2
    )


def test_pieces_tile_the_surface_and_point_outwards():
    solid = geo.sphere()
    flipped = Mesh(vertices=solid.mesh.vertices, faces=solid.mesh.faces[:, ::-1].copy())
    topology = build_topology(flipped, TopologyConfig(resolution=64))
    assert (topology.kinds == SOLID).all()
    assert area(topology.triangles) == pytest.approx(area(solid.mesh.vertices[solid.mesh.faces]))
    normals = np.cross(
        topology.triangles[:, 1] - topology.triangles[:, 0],
        topology.triangles[:, 2] - topology.triangles[:, 0],
    )
    assert ((normals * topology.triangles.mean(axis=1)).sum(axis=1) > 0).all()


def test_a_bar_through_a_box_is_cut_at_the_seam():
    bar, block = (
        trimesh.creation.box(extents=(0.9, 0.1, 0.12)),
        trimesh.creation.box(extents=(0.4, 0.5, 0.6)),
    )
    topology = build_topology(geo.as_mesh(bar, block), TopologyConfig(resolution=256))
    h = spacing(256)
    buried = area(topology.triangles[topology.kinds == BURIED])
    exact = (
        0.4 * 2 * (0.1 + 0.12) + 2 * 0.1 * 0.12
    )  # the bar's middle and the two plugs it leaves in the block's faces
    assert buried == pytest.approx(exact, abs=2 * 4 * (0.1 + 0.12) * h)
    assert not (topology.kinds == SHEET).any()
    assert len(topology.triangles) < 20_000  # only the seam has small pieces


@pytest.mark.parametrize("count", [0, 1, 60])
def test_bins_list_the_triangles_within_reach_in_ascending_order(count):
    random, resolution, reach = np.random.default_rng(count), 40, 1.5
    corners = random.uniform(-0.45, 0.45, (count, 1, 3)) + random.uniform(-0.1, 0.1, (count, 3, 3))
    corners = np.clip(corners, -0.49, 0.49)
    bins, h = bin_triangles(pack(corners), resolution, reach), spacing(resolution)
    lists = dict(zip(map(tuple, bins.cells), np.split(bins.triangles, bins.offsets[1:-1])))
    assert len(bins.triangles) == bins.offsets[-1]
    assert all((np.diff(own) > 0).all() and len(own) for own in lists.values())
    radius = (np.sqrt(3) * 3.5 + reach) * h  # from the centre of a cell
    places = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    for cell in np.ndindex(*bins.bin_of.shape):
        assert (bins.bin_of[cell] >= 0) == (cell in lists)
        points = (8 * np.array(cell) + places) * h - 0.5
        centre = points.mean(axis=0)
        for t, row in enumerate(pack(corners)):
            is_listed = t in lists.get(cell, ())
            near_centre = np.sqrt(distance2(row, *centre)) <= radius
            if is_listed:
                assert near_centre
            elif near_centre:
                assert min(distance2(row, *point) for point in points) > (reach * h) ** 2


def test_the_flood_fill_equals_a_dense_one():
    """The reference is a dense 6-connected fill with brute-force distances.

    The shape is a sphere with a hole and a box inside.
    """
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.4)
    ball.update_faces(ball.triangles_center[:, 1] < 0.36)
    mesh = geo.as_mesh(ball, trimesh.creation.box(extents=(0.21, 0.2, 0.19)))
    resolution = 48
    packed = pack(mesh.vertices[mesh.faces])
    bins = bin_triangles(packed, resolution)
    flood = flood_fill(packed, bins, np.ones(len(packed), bool))
    index = np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), axis=-1)
    distance = geo.brute_distance(index.reshape(-1, 3) * spacing(resolution) - 0.5, mesh).reshape(
        index.shape[:3]
    )
    labels, _ = ndimage.label(distance > 0.6 * spacing(resolution))
    expected = labels == labels[0, 0, 0]
    got = np.array(
        [
            is_reached(bins.bin_of, flood.outside, flood.whole_cells, *p, True)
            for p in index.reshape(-1, 3)
        ]
    ).reshape(expected.shape)
    np.testing.assert_array_equal(got, expected)
    assert 0.5 < expected.mean() < 0.999


def test_weld_gives_the_same_arrays_for_any_order_winding_and_repetition():
    random = np.random.default_rng(0)
    mesh = geo.torus().mesh
    vertices, faces = holes.weld(mesh.vertices, mesh.faces)
    order = random.permutation(len(mesh.vertices))
    renumber = np.argsort(order)
    shuffled = renumber[mesh.faces][random.permutation(len(mesh.faces))][:, [1, 0, 2]].astype(
        np.int32
    )
    again_vertices, again_faces = holes.weld(
        mesh.vertices[order], np.concatenate([shuffled, shuffled[::3]])
    )
    np.testing.assert_array_equal(again_vertices, vertices)
    np.testing.assert_array_equal(again_faces, faces)


def test_boundary_loops_of_a_cylinder_without_lids():
    n = 17
    angle = 2 * np.pi * np.arange(n) / n
    ring = 0.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    vertices = np.concatenate([np.column_stack([ring, np.full(n, z)]) for z in (-0.4, 0.4)])
    i = np.arange(n)
    j = (i + 1) % n
    faces = np.concatenate([np.stack([i, j, n + i], 1), np.stack([j, n + j, n + i], 1)]).astype(
        np.int32
    )
    loops = holes.boundary_loops(faces)
    assert sorted(sorted(loop.tolist()) for loop in loops) == [
        list(range(n)),
        list(range(n, 2 * n)),
    ]
    for loop in loops:
        same, cap, _ = holes.cap_loops(vertices, [loop])
        polygon = 0.5 * n * 0.2**2 * np.sin(2 * np.pi / n)
        assert area(same[cap]) == pytest.approx(polygon)
    topology = build_topology(
        Mesh(vertices=vertices, faces=faces), TopologyConfig(resolution=128, max_opening=0.2)
    )
    assert topology.sign_path == "capped"


def test_loops_close_at_fins():
    """A fin on the rim gives edges of three faces. The boundary still consists of closed loops."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    ball.update_faces(ball.triangles_center[:, 1] < 0.38)
    rim = holes.boundary_loops(np.asarray(ball.faces, np.int32))[0]
    vertices = np.concatenate([ball.vertices, [[0.0, 0.47, 0.0]]])
    faces = np.concatenate([ball.faces, [[rim[0], rim[1], len(vertices) - 1]]]).astype(np.int32)
    topology = build_topology(Mesh(vertices=vertices, faces=faces), TopologyConfig(resolution=128))
    assert "capped" in topology.sign_path


def test_a_long_loop_is_capped_by_a_fan():
    n = holes.MAX_EXACT_LOOP + 100
    angle = 2 * np.pi * np.arange(n) / n
    vertices = np.column_stack([0.3 * np.cos(angle), 0.3 * np.sin(angle), np.zeros(n)])
    triangle = np.array([0, 1, 2])
    more, faces, loop_of = holes.cap_loops(vertices, [np.arange(n), triangle, np.arange(n)])
    assert len(more) == n + 2
    np.testing.assert_array_equal(loop_of, np.repeat([0, 1, 2], [n, 1, n]))
    assert sorted(faces[loop_of == 1][0]) == [0, 1, 2]
    for fan, centre in ((0, n), (2, n + 1)):
        assert (faces[loop_of == fan] == centre).any(axis=1).all()
        assert area(more[faces[loop_of == fan]]) == pytest.approx(np.pi * 0.09, rel=1e-3)


def test_caps_repeat_no_face_of_the_mesh():
    """Meshes have openings of one and two triangles, and lone triangles."""
    side = 12
    corners = np.arange(side * side).reshape(side, side)
    a, b, c, d = (
        part.ravel()
        for part in (corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:])
    )
    faces = np.sort(
        np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]), axis=1
    ).astype(np.int32)
    faces = faces[np.random.default_rng(0).random(len(faces)) < 0.6]
    vertices = np.column_stack(
        [np.indices((side, side)).reshape(2, -1).T / side - 0.5, np.zeros(side * side)]
    )
    _, every, _ = holes.cap_loops(vertices, holes.boundary_loops(faces))
    _, capped, cap_of = _add_caps(vertices, faces)
    own = {frozenset(face) for face in faces.tolist()}
    expected = [face for face in every.tolist() if frozenset(face) not in own]
    assert 0 < len(expected) < len(every)
    assert capped[cap_of >= 0].tolist() == expected
    np.testing.assert_array_equal(capped[cap_of < 0], faces)


def test_memory_for_a_long_loop_is_linear_in_its_vertices():
    n = 4000
    x = np.linspace(-0.4, 0.4, n)
    vertices = np.concatenate([np.stack([x, 0 * x + y, 0 * x], axis=1) for y in (0, 0.1)])
    i = np.arange(n - 1)
    faces = np.concatenate(
        [np.stack([i, i + 1, n + i], 1), np.stack([i + 1, n + i, n + i + 1], 1)]
    ).astype(np.int32)
    _add_caps(vertices, faces[:1])  # compiles
    tracemalloc.start()
    _, capped, _ = _add_caps(vertices, faces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(capped) == len(faces) + 2 * n
    assert peak < 1000 * len(vertices)


def test_unusable_meshes_are_refused():
    with pytest.raises(ValueError, match="at least 64, got 32"):
        TopologyConfig(resolution=32)
    with pytest.raises(ValueError, match=r"max_opening must lie in 0\.\.1, got 2"):
        TopologyConfig(max_opening=2)
    line = Mesh(
        vertices=np.array([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0.0]]),
        faces=np.array([[0, 1, 2]], np.int32),
    )
    with pytest.raises(Reject, match="no_area"):
        build_topology(line, TopologyConfig(resolution=64))
    big = Mesh(
        vertices=np.array([[0, 0, 0], [0.7, 0, 0], [0, 0.2, 0.0]]),
        faces=np.array([[0, 1, 2]], np.int32),
    )
    with pytest.raises(ValueError, match=r"extends to 0\.7"):
        build_topology(big, TopologyConfig(resolution=64))
