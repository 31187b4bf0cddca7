"""Stored distances and signs against brute force on the tessellated mesh."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.marching_cubes import extract, watertight_mesh
from pipeline.core.schema import Mesh
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import SHEET_HALF_VOXELS, compute_bricks
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo

SOLIDS = {"sphere": geo.sphere, "box": geo.box, "torus": geo.torus, "capsule": geo.capsule}
RESOLUTIONS = [64, 128, 256, pytest.param(512, marks=pytest.mark.slow)]


def bricks_of(mesh, resolution, topology=128):
    return compute_bricks(build_topology(mesh, TopologyConfig(resolution=topology)), resolution)


def signs(bricks):
    """Return [M, 512]: whether each point is inside. A stored zero counts as neither."""
    return bricks.values < 0


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("name", SOLIDS)
def test_values_signs_and_cells_equal_brute_force(name, resolution):
    solid = SOLIDS[name]().scaled(min(1.0, 56 / resolution), np.array([0.0123, -0.0045, 0.0071]))
    tau = band(resolution)
    bricks = bricks_of(solid.mesh, resolution)

    candidates = geo.grid_points_where(solid.smooth, tau + solid.sag, resolution)
    near = geo.brute_distance(candidates * spacing(resolution) - 0.5, solid.mesh) < tau
    expected_blocks = np.unique(candidates[near] // CELL_SIDE, axis=0)
    np.testing.assert_array_equal(bricks.cells, expected_blocks)

    points = geo.points_of(bricks).reshape(-1, 3)
    smooth = solid.smooth(points)
    inside = smooth < 0
    unclear = np.abs(smooth) <= solid.sag
    inside[unclear] = geo.winding_number(points[unclear], solid.mesh) > 0.5
    near = np.abs(smooth) < tau + solid.sag
    distance = np.full(len(points), np.inf)
    distance[near] = geo.brute_distance(points[near], solid.mesh)
    expected = np.clip(np.where(inside, -distance, distance) / tau, -1, 1)
    stored = bricks.values.reshape(-1).astype(np.float64)
    assert np.abs(stored - expected).max() < 1e-3
    clear = np.abs(expected) > 1e-3
    np.testing.assert_array_equal(stored[clear] < 0, expected[clear] < 0)


def test_the_surface_is_not_offset():
    """The stored surface is offset from the true one by less than 0.02 voxels on average."""
    solid = geo.sphere(subdivisions=5)
    bricks = bricks_of(solid.mesh, 128)
    near = np.abs(bricks.values) < 0.9
    offset = geo.distances_of(bricks) - solid.smooth(geo.points_of(bricks)) / spacing(128)
    assert abs(offset[near].mean()) < 0.02


def test_a_sphere_inside_a_sphere_is_removed():
    outer, inner = geo.sphere(0.45), geo.sphere(0.25, centre=(0.05, 0.02, -0.03))
    both = Mesh(
        vertices=np.concatenate([outer.mesh.vertices, inner.mesh.vertices]),
        faces=np.concatenate([outer.mesh.faces, inner.mesh.faces + len(outer.mesh.vertices)]),
    )
    alone, nested = bricks_of(outer.mesh, 128), bricks_of(both, 128)
    np.testing.assert_array_equal(nested.cells, alone.cells)
    np.testing.assert_array_equal(nested.values, alone.values)


def test_two_overlapping_spheres_are_their_union():
    """Values are exact outside. Inside they are within one voxel at the seam."""
    resolution = 64
    a, b = geo.sphere(0.28, (-0.13, 0.01, 0.02), 4), geo.sphere(0.25, (0.17, -0.02, 0.0), 4)
    mesh = geo.as_mesh(
        *(trimesh.Trimesh(s.mesh.vertices, s.mesh.faces, process=False) for s in (a, b))
    )
    bricks = bricks_of(mesh, resolution, topology=64)
    points = geo.points_of(bricks)
    union = np.minimum(a.smooth(points), b.smooth(points))
    clear = np.abs(union) > a.sag + b.sag
    np.testing.assert_array_equal(signs(bricks)[clear], (union < 0)[clear])
    h = spacing(resolution)
    error = np.abs(
        geo.distances_of(bricks) - np.clip(union, -band(resolution), band(resolution)) / h
    )
    at_seam = np.abs(a.smooth(points) - b.smooth(points)) < 3 * h
    sag = max(a.sag, b.sag) / h + 5e-3
    assert error[(union > 0) & ~at_seam].max() < sag
    assert (
        error[(union > 0) & at_seam].max() < sag + 0.25
    )  # the seam is found to a quarter of a voxel
    # inside, the formula of the union is only a bound on the distance to the visible surface
    deep = (union < 0) & (union > -band(resolution))
    true = (
        np.maximum(-geo.brute_distance(points[deep], visible_part(mesh, (a, b))), -band(resolution))
        / h
    )
    assert np.abs(geo.distances_of(bricks)[deep] - true).max() < 1


def visible_part(mesh, solids):
    """Return the faces of a union whose centre lies in no other solid."""
    centres = mesh.vertices[mesh.faces].mean(axis=1)
    depth = np.min([s.smooth(centres) for s in solids], axis=0)
    return replace(mesh, faces=mesh.faces[depth > -1.5 * max(s.sag for s in solids)])


@settings(max_examples=12, deadline=None)
@example(30312)  # it has a long flat crevice
@given(st.integers(0, 2**31 - 1))
def test_signs_of_a_union_of_random_boxes_are_right(seed):
    """Coarse faces that pass through each other at any angle leave no inner wall and no pocket."""
    random = np.random.default_rng(seed)
    boxes, insides = [], []
    for _ in range(3):
        shape = trimesh.creation.box(extents=random.uniform(0.12, 0.4, 3))
        turn = trimesh.transformations.random_rotation_matrix(random.random(3))
        turn[:3, 3] = random.uniform(-0.12, 0.12, 3)
        shape.apply_transform(turn)
        boxes.append(shape)
        half, back = (
            shape.primitive.extents / 2 if hasattr(shape, "primitive") else None,
            np.linalg.inv(turn),
        )
        insides.append(
            (
                np.ptp(trimesh.transform_points(shape.vertices, back), axis=0) / 2
                if half is None
                else half,
                back,
            )
        )
    bricks = bricks_of(geo.as_mesh(*boxes), 64)
    points = geo.points_of(bricks)
    each = []
    for half, back in insides:
        q = np.abs(points @ back[:3, :3].T + back[:3, 3]) - half
        each.append(np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0))
    distance, second, _ = np.sort(each, axis=0)
    h = spacing(64)
    # the barrier closes crevices between faces that meet at a flat angle; other signs are exact
    clear = np.abs(distance) > 0.1 * h
    wrong = signs(bricks)[clear] != (distance < 0)[clear]
    assert not wrong[distance[clear] < 0].any()
    assert distance[clear][wrong].max(initial=0) < 1.0 * h
    assert second[clear][wrong].max(initial=0) < 1.0 * h, "no crevice here"
    assert wrong.mean() < 3e-3


def test_orientation_and_duplicates_do_not_matter():
    solid = geo.torus()
    mesh, random = solid.mesh, np.random.default_rng(1)
    clean = bricks_of(mesh, 128)
    flipped = mesh.faces.copy()
    some = random.random(len(flipped)) < 0.5
    flipped[some] = flipped[some][:, ::-1]
    doubled = np.concatenate([mesh.faces, mesh.faces[:, ::-1]])
    split = mesh.faces + 0  # each face has vertices of its own, as after UV seams
    variants = {
        "inverted": replace(mesh, faces=mesh.faces[:, ::-1].copy()),
        "flipped": replace(mesh, faces=flipped),
        "duplicated": replace(mesh, faces=np.concatenate([mesh.faces, mesh.faces])),
        "double-sided": replace(mesh, faces=doubled),
        "unwelded": Mesh(
            vertices=mesh.vertices[split].reshape(-1, 3),
            faces=np.arange(3 * len(split), dtype=np.int32).reshape(-1, 3),
        ),
    }
    for name, variant in variants.items():
        bricks = bricks_of(variant, 128)
        np.testing.assert_array_equal(bricks.cells, clean.cells, err_msg=name)
        np.testing.assert_array_equal(bricks.values, clean.values, err_msg=name)
        np.testing.assert_array_equal(bricks.sharp, clean.sharp, err_msg=name)


def sheet_mesh():
    """Return a wavy open sheet of 24 x 24 quads."""
    u, v = np.meshgrid(np.linspace(-0.45, 0.45, 25), np.linspace(-0.3, 0.3, 25), indexing="ij")
    vertices = np.stack([u, 0.08 * np.sin(9 * u) * np.cos(7 * v), v], axis=-1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")
    corner = (25 * i + j).reshape(-1)
    faces = np.concatenate(
        [
            np.stack([corner, corner + 1, corner + 26], 1),
            np.stack([corner, corner + 26, corner + 25], 1),
        ]
    )
    return Mesh(vertices=vertices, faces=faces.astype(np.int32))


@pytest.mark.parametrize("resolution", [128, 256])
def test_an_open_sheet_becomes_a_thin_shell(resolution):
    sheet = sheet_mesh()
    topology = build_topology(sheet, TopologyConfig(resolution=128))
    assert topology.sign_path == "sheet"
    bricks = compute_bricks(topology, resolution)
    h = spacing(resolution)
    some = np.random.default_rng(0).choice(bricks.values.size, 60_000, replace=False)
    distance = (
        geo.brute_distance(geo.points_of(bricks).reshape(-1, 3)[some], sheet) / h
        - SHEET_HALF_VOXELS
    )
    stored = geo.distances_of(bricks).reshape(-1)[some]
    assert np.abs(stored - np.minimum(distance, band(resolution) / h)).max() < 5e-3
    assert stored.min() < -0.5  # there is an inside
    assert 2 * SHEET_HALF_VOXELS < 2  # voxels of thickness


def test_a_closed_part_beside_a_sheet_stays_exact():
    sheet, ball = sheet_mesh(), geo.sphere(0.12, (0.0, 0.3, 0.0))
    both = Mesh(
        vertices=np.concatenate([sheet.vertices, ball.mesh.vertices]),
        faces=np.concatenate([sheet.faces, ball.mesh.faces + len(sheet.vertices)]),
    )
    bricks = bricks_of(both, 128)
    points, stored = geo.points_of(bricks), geo.distances_of(bricks)
    h = spacing(128)
    by_ball = np.abs(ball.smooth(points)) < band(128)
    distance = geo.brute_distance(points[by_ball], ball.mesh)
    inside = geo.winding_number(points[by_ball], ball.mesh) > 0.5
    expected = np.clip(np.where(inside, -distance, distance), -band(128), band(128)) / h
    assert np.abs(stored[by_ball] - expected).max() < 2e-3
    # the ball is too far away to change the signs at the sheet
    by_sheet = (ball.smooth(points) > 3 * band(128)) & (
        np.random.default_rng(0).random(stored.shape) < 0.05
    )
    shell = geo.brute_distance(points[by_sheet], sheet) / h - SHEET_HALF_VOXELS
    assert np.abs(stored[by_sheet] - np.minimum(shell, band(128) / h)).max() < 5e-3


def volume_of(bricks):
    mesh = watertight_mesh(bricks)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume


@pytest.mark.parametrize("resolution", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_openings_are_closed_if_they_are_small(resolution):
    """A sphere with a small hole and a solid without its base are filled. A bowl stays open."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.45)
    holed = ball.copy()
    holed.update_faces(holed.triangles_center[:, 1] < 0.43)
    topology = build_topology(geo.as_mesh(holed), TopologyConfig(resolution=resolution))
    assert "capped" in topology.sign_path
    assert volume_of(compute_bricks(topology, resolution)) == pytest.approx(ball.volume, rel=0.02)

    profile = np.array(
        [
            [0, 0.45],
            [0.16, 0.42],
            [0.24, 0.3],
            [0.3, 0.0],
            [0.33, -0.2],
            [0.25, -0.4],
            [0.13, -0.45],
        ]
    )
    vase = trimesh.creation.revolve(profile[::-1], sections=48)
    full = trimesh.creation.revolve(np.concatenate([[[0, -0.45]], profile[::-1]]), sections=48)
    turn = trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0])
    topology = build_topology(
        geo.as_mesh(vase.apply_transform(turn)), TopologyConfig(resolution=resolution)
    )
    assert "capped" in topology.sign_path
    assert volume_of(compute_bricks(topology, resolution)) == pytest.approx(full.volume, rel=0.05)

    bowl = ball.copy()
    bowl.update_faces(bowl.triangles_center[:, 1] < 0.1)
    assert (
        build_topology(geo.as_mesh(bowl), TopologyConfig(resolution=resolution)).sign_path
        == "sheet"
    )


def test_all_components_are_kept():
    parts = [geo.sphere(0.06, (x, y, 0.0)).mesh for x in (-0.4, 0.0, 0.4) for y in (-0.3, 0.0, 0.3)]
    shapes = [trimesh.Trimesh(p.vertices, p.faces, process=False) for p in parts]
    vertices, faces = extract(bricks_of(geo.as_mesh(*shapes), 64))
    assert len(trimesh.Trimesh(vertices, faces, process=False).split()) == 9


def test_a_closed_plate_thinner_than_a_voxel_of_the_topology_keeps_its_thickness():
    plate = geo.box((0.9, 0.006, 0.7), (0.0, 0.0013, 0.0))  # 0.76 voxel of the 128 grid
    topology = build_topology(plate.mesh, TopologyConfig(resolution=128))
    assert topology.sign_path == "closed"
    bricks = compute_bricks(topology, 512)
    h = spacing(512)
    expected = np.clip(plate.smooth(geo.points_of(bricks)), -band(512), band(512)) / h
    assert np.abs(geo.distances_of(bricks) - expected).max() < 5e-3


def test_resolutions_agree_and_refinement_changes_no_sign():
    # a cross: its concave edges are too wide for the barrier to close
    mesh = geo.as_mesh(
        *(geo.rotated(trimesh.creation.box(extents=e)) for e in [(0.6, 0.3, 0.2), (0.2, 0.21, 0.6)])
    )
    topology = build_topology(mesh, TopologyConfig(resolution=128))
    fine = compute_bricks(topology, 256)
    dense = np.full((256,) * 3, np.nan)
    for block, values in zip(fine.cells, fine.values):
        x, y, z = block * 8
        dense[x : x + 8, y : y + 8, z : z + 8] = values.reshape(8, 8, 8).astype(np.float64) * band(
            256
        )
    for resolution in (64, 128, 192):
        coarse = compute_bricks(topology, resolution)
        points = geo.points_of(coarse).reshape(-1, 3)
        nearest = np.rint((points + 0.5) / spacing(256)).astype(int)
        other = dense[tuple(nearest.T)]
        known = ~np.isnan(other)
        mine = coarse.values.reshape(-1).astype(np.float64) * band(resolution)
        limit = min(band(256), band(resolution))
        error = np.abs(np.clip(mine, -limit, limit) - np.clip(other, -limit, limit))[known]
        assert error.max() < spacing(resolution)
        apart = known & (np.abs(mine) > 0.87 * spacing(256))
        np.testing.assert_array_equal(mine[apart] < 0, other[apart] < 0)


def test_resolution_must_be_a_multiple_of_the_cell():
    topology = build_topology(geo.box().mesh, TopologyConfig(resolution=64))
    with pytest.raises(ValueError, match="multiple of 8, got 100"):
        compute_bricks(topology, 100)
