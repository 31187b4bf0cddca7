"""Samples in the layouts of four trainers, read as their loaders do and checked by brute force."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from pipeline.conversion.surface_samples import SurfaceSampler
from pipeline.conversion.vecset_asset import write_npz
from pipeline.conversion.vecset_layouts import LAYOUTS, AssetSamples, Counts
from pipeline.core.errors import Reject
from pipeline.core.grid import spacing
from pipeline.core.schema import Mesh
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.point_sdf import PointSdf
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo
from tests.pipeline.conversion import trainer_loaders

HALF_EXTENT = 0.475
HALF = 1.74 / 2 * spacing(128)
COUNTS = Counts(surface=200, space=300, near=400)
UID = "folder-0123"
# Longest coordinate of an asset in the frame of the network.
SIDES = {"hunyuan3d-2.1": 0.9999, "dora": 1.0, "step1x-3d": 1.0, "ultrashape": 1 / 1.02}


def samples_of(mesh, trainer="dora", *, seed=0, fill_smooth=True, degrees=15.0):
    topology = build_topology(mesh, TopologyConfig(resolution=128, sharp_degrees=degrees))
    sampler = SurfaceSampler(topology, PointSdf(topology, HALF))
    frame = LAYOUTS[trainer].frame(HALF_EXTENT)
    return AssetSamples(sampler, frame, (UID, seed), fill_smooth)


def write(root, trainer, samples, counts=COUNTS):
    """Write the files of one asset of the split "val" and the lists."""
    layout = LAYOUTS[trainer]
    for end, arrays in layout.arrays(samples, counts).items():
        path = layout.npz.format(split="val", shard="000003", uid=UID, end=end)
        write_npz(root / path, arrays, compress=False)
    layout.lists(root, {"train": [], "val": [("000003", UID)]})


def read(root, trainer, counts=COUNTS):
    """Return the only asset as the trainer's loader reads it."""
    if trainer == "hunyuan3d-2.1":
        assets = list(trainer_loaders.hunyuan(root / "val"))
    elif trainer == "dora":
        assets = list(trainer_loaders.dora(root, "val", near_rows=counts.near))
        assert len(assets[0][1].points) == 4 * counts.surface + counts.near + counts.space
    elif trainer == "step1x-3d":
        assets = list(trainer_loaders.step1x(root, "val"))
    else:
        assets = list(trainer_loaders.ultrashape(root, "val", half=counts.surface))
    assert len(assets) == 1
    return assets[0][1]


def block():
    """A box whose longest side is 0.95, so that it fills the frame along x."""
    return geo.box((0.95, 0.5, 0.37)).mesh


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_a_round_trip_through_the_loader_gives_points_and_exact_distances(trainer, tmp_path):
    mesh = block()
    write(tmp_path, trainer, samples_of(mesh, trainer))
    loaded = read(tmp_path, trainer)
    # the asset in the frame of the network
    scaled = replace(mesh, vertices=mesh.vertices * (SIDES[trainer] / HALF_EXTENT))
    epsilon = 1e-3 if trainer == "hunyuan3d-2.1" else 1e-6  # of float16 and float32
    # surface points lie on the surface, and their normals are those of the face they lie on
    assert np.abs(geo.brute_distance(loaded.surface.astype(float), scaled)).max() < epsilon
    half_sides = scaled.vertices.max(axis=0)
    axis = (np.abs(loaded.surface) - half_sides).argmax(axis=1)
    rows = np.arange(len(axis))
    expected = np.zeros_like(loaded.normals)
    expected[rows, axis] = np.sign(loaded.surface[rows, axis])
    np.testing.assert_allclose(loaded.normals, expected, atol=epsilon)
    # sharp points lie on two faces at once, and their normals are halfway between those
    on_face = np.abs(np.abs(loaded.sharp) - half_sides) < 2 * epsilon
    assert (on_face.sum(axis=1) >= 2).all()
    along_edge = on_face.sum(axis=1) == 2
    np.testing.assert_allclose(
        loaded.sharp_normals[along_edge],
        (np.sign(loaded.sharp) * on_face / np.sqrt(2))[along_edge],
        atol=2 * epsilon,
    )
    # distances belong to the stored points: brute force and winding numbers
    points = loaded.points.astype(np.float64)
    distance = geo.brute_distance(points, scaled)
    assert np.abs(np.abs(loaded.sdf) - distance).max() < 2 * epsilon
    clear = distance > 2 * epsilon
    inside = geo.winding_number(points, scaled) > 0.5
    np.testing.assert_array_equal((loaded.sdf < 0)[clear], inside[clear])
    assert 0.2 < inside.mean() < 0.8


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_equal_seeds_give_equal_bytes(trainer, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / folder, trainer, samples_of(block(), trainer, seed=seed))
    a, b, c = (sorted((tmp_path / name).rglob("*.npz")) for name in "abc")
    assert len(a) > 0
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    assert all(x.read_bytes() != y.read_bytes() for x, y in zip(a, c))


def test_arrays_have_the_shapes_and_types_of_the_trainers_scripts():
    shapes = {
        trainer: {
            f"{end}:{name}": (array.shape, array.dtype.name)
            for end, arrays in LAYOUTS[trainer].arrays(samples_of(block(), trainer), COUNTS).items()
            for name, array in arrays.items()
        }
        for trainer in LAYOUTS
    }
    assert shapes == {
        "hunyuan3d-2.1": {
            "_surface:random_surface": ((200, 6), "float16"),
            "_surface:sharp_surface": ((200, 6), "float16"),
            "_sdf:vol_points": ((300, 3), "float16"),
            "_sdf:vol_label": ((300,), "float16"),
            "_sdf:random_near_points": ((400, 3), "float16"),
            "_sdf:random_near_label": ((400,), "float16"),
            "_sdf:sharp_near_points": ((200, 3), "float16"),
            "_sdf:sharp_near_label": ((200,), "float16"),
        },
        "dora": {
            ":fps_coarse_surface": ((200, 1, 6), "float32"),
            ":fps_sharp_surface": ((200, 1, 6), "float32"),
            ":sharp_near_surface": ((800, 4), "float32"),
            ":rand_points": ((700, 4), "float32"),
        },
        "step1x-3d": {
            ":surface": ((200, 6), "float32"),
            ":sharp_surface": ((200, 6), "float32"),
            ":volume_rand_points": ((300, 4), "float32"),
            ":near_surface_points": ((400, 4), "float32"),
            ":bounds": ((), "float32"),
        },
        "ultrashape": {
            ":clean_surface_points": ((400, 3), "float32"),
            ":clean_surface_normals": ((400, 3), "float32"),
            ":uniform_near_points": ((400, 3), "float32"),
            ":uniform_near_sdf": ((400,), "float32"),
            ":curvature_near_points": ((200, 3), "float32"),
            ":curvature_near_sdf": ((200,), "float32"),
            ":space_points": ((300, 3), "float32"),
            ":space_sdf": ((300,), "float32"),
        },
    }


def test_only_edges_above_the_angle_are_sharp():
    """The sides of an octagonal prism meet at 45 degrees, its ends at 90."""
    prism = trimesh.creation.cylinder(radius=0.3, height=0.9, sections=8)
    sharp = samples_of(geo.as_mesh(prism), degrees=60.0).sharp(500) * HALF_EXTENT
    np.testing.assert_allclose(np.abs(sharp[:, 2]), 0.45, atol=1e-9)
    sharp = samples_of(geo.as_mesh(prism), degrees=15.0).sharp(500) * HALF_EXTENT
    ends = np.abs(sharp[:, 2]) > 0.45 - 1e-6
    assert 0.3 < ends.mean() < 0.7  # two octagons of 0.23 a side, and eight edges of 0.9


def test_an_open_surface_gets_points_on_both_sides_of_its_shell():
    """Two rectangles meet at 150 degrees. Their edge is a ridge and a groove."""
    y, z = -0.3 + 0.45 * np.sin(np.radians(150)), 0.45 * np.cos(np.radians(150))
    corners = [[-0.4, -0.3, 0], [0.4, -0.3, 0], [0.4, -0.3, 0.45], [-0.4, -0.3, 0.45]]
    corners += [[-0.4, y, z], [0.4, y, z]]
    faces = [[0, 1, 2], [0, 2, 3], [0, 4, 1], [1, 4, 5]]
    mesh = Mesh(vertices=np.array(corners), faces=np.array(faces, np.int32))
    samples = samples_of(mesh)
    uniform, sharp = samples.uniform(2000), samples.sharp(500)
    for points in (uniform, sharp):
        cube = points[:, :3] * HALF_EXTENT
        np.testing.assert_allclose(geo.brute_distance(cube, mesh), HALF, atol=1e-6)
        # the normals lead away from the sheet
        further = geo.brute_distance(cube + 1e-3 * points[:, 3:], mesh)
        assert (further > HALF + 9e-4).all()
    cube = sharp[:, :3] * HALF_EXTENT
    away = np.linalg.norm(cube[:, 1:] - [-0.3, 0], axis=1)
    ridge = cube[:, 1] < -0.3
    assert 0.4 < ridge.mean() < 0.6
    np.testing.assert_allclose(away[ridge], HALF, atol=1e-6)
    np.testing.assert_allclose(away[~ridge], HALF / np.sin(np.radians(75)), atol=1e-5)


def test_no_point_lies_inside_another_part():
    """Half of a sheet is inside a box. The box is not hidden by it, but the sheet is."""
    box = trimesh.creation.box((0.4, 0.4, 0.4))
    sheet = trimesh.Trimesh(
        [[-0.4, 0.01, -0.1], [0.4, 0.01, -0.1], [0.0, 0.01, 0.1]], [[0, 1, 2]], process=False
    )
    samples = samples_of(geo.as_mesh(box, sheet))
    cube = samples.uniform(3000)[:, :3] * HALF_EXTENT
    assert np.abs(cube).max(axis=1).min() > 0.2 - 1e-9
    assert (np.abs(cube[:, 0]) > 0.25).any()  # the ends of the sheet have points


def test_assets_without_sharp_edges_get_uniform_points_or_are_left_out():
    ball = geo.sphere(subdivisions=4).mesh
    samples = samples_of(ball, degrees=30)
    assert samples.is_smooth
    sharp = samples.sharp(100)
    np.testing.assert_allclose(np.linalg.norm(sharp[:, 3:], axis=1), 1, atol=1e-9)
    assert not np.array_equal(sharp, samples.uniform(100))
    with pytest.raises(Reject, match="no_sharp_edges"):
        samples_of(ball, degrees=30, fill_smooth=False).sharp(100)
