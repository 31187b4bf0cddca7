"""Normals, depth, albedo, material and masks, the cameras of files, and transforms.json."""

import json
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from pipeline.core.cameras import (
    camera_from_matrix,
    look_at_origin,
    orthographic_camera,
    project,
    read_cameras,
    sample_camera,
    text_of_camera,
    unproject,
)
from pipeline.core.errors import Reject
from pipeline.core.image_codec import decode_any
from pipeline.core.product import VIEW_KINDS, Product
from pipeline.core.schema import Material
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.surface_views import surface_views, view_cameras
from pipeline.rendering.transforms import camera_of_frame, dump_transforms, transforms_of
from pipeline.rendering.views import render_views
from pipeline.storage.render_shard import RenderShard, check_render_shard, write_render_shard
from pipeline.storage.transforms_shard import read_transforms_shard, write_transforms_shard
from tests.pipeline.rendering.test_views import l_shape, of_trimesh, quad

SIZE = 96
CFG = RenderConfig(views=2, image_size=SIZE, light="ibl")


def decoded(mesh, kind, cfg=CFG):
    """Return the decoded files of the views of one kind, and their json."""
    extension = Product(kind, "paper").extension("png")
    return [
        (decode_any(data, extension), meta) for data, meta in surface_views(mesh, "a", cfg, kind)
    ]


def distances(mesh, points):
    """Return the distance of points [N, 3] from a mesh, by trimesh."""
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    return trimesh.proximity.closest_point_naive(shape, points)


@pytest.mark.parametrize("cameras", ["paper", "orthographic"])
def test_depth_unprojected_through_transforms_lies_on_the_mesh(cameras):
    mesh, cfg = of_trimesh(l_shape()), replace(CFG, cameras=cameras)
    eyes = view_cameras(mesh, "a", cfg)
    content = json.loads(dump_transforms(transforms_of(eyes, SIZE, ["0.png", "1.png"])))
    normal_images = decoded(mesh, "normals", cfg)
    for frame, (depth, meta), (normals, _) in zip(
        content["frames"], decoded(mesh, "depth", cfg), normal_images, strict=True
    ):
        assert depth.dtype == np.float32
        assert meta["c2w"] == frame["transform_matrix"]
        # by the numbers of the frame alone, as a NeRF makes its rays
        x = (np.arange(SIZE) + 0.5 - frame["cx"]) / frame["fl_x"]
        y = -(np.arange(SIZE) + 0.5 - frame["cy"]) / frame["fl_y"]
        x, y = np.meshgrid(x, y)
        z = depth[..., 0]
        scale = 1 if "ortho_scale" in frame else z
        matrix = np.array(frame["transform_matrix"])
        local = np.stack([x * scale, y * scale, -z], axis=-1)
        points = (local @ matrix[:3, :3].T + matrix[:3, 3])[z > 0]
        assert len(points) > 100
        some = slice(None, None, 7)
        _, away, face = distances(mesh, points[some])
        assert away.max() < 1e-4
        # the faces of the shape are flat, so their normals are known
        shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        agreement = (shape.face_normals[face] * normals[z > 0][some]).sum(axis=1)
        assert np.quantile(agreement, 0.1) > 0.999
        # the library's own function says the same
        known_points, known = unproject(z, camera_of_frame(frame))
        np.testing.assert_allclose(known_points[known], points, atol=1e-6)


def test_normals_of_a_ball_are_those_of_the_ball():
    mesh = of_trimesh(trimesh.creation.icosphere(4, 0.4))
    for (normals, _), (depth, meta) in zip(decoded(mesh, "normals"), decoded(mesh, "depth")):
        eye = look_at_origin(
            *(meta[n] for n in ("azimuth_degrees", "elevation_degrees", "focal_mm"))
        )
        points, known = unproject(depth[..., 0], eye)
        radial = points[known] / np.linalg.norm(points[known], axis=1, keepdims=True)
        cosine = (normals[known].astype(np.float64) * radial).sum(axis=1)
        assert cosine.min() > 0.99
        np.testing.assert_allclose(np.linalg.norm(normals[known], axis=1), 1, atol=2e-3)
        assert (normals[~known] == 0).all()


def test_masks_and_colours_have_the_coverage_of_the_renders():
    color = (0.5, 0.1, 0.2, 1.0)
    mesh = of_trimesh(l_shape(), Material(base_color=color, metallic=0.25, roughness=0.6))
    renders = list(render_views(mesh, "a", replace(CFG, light="lamps")))
    kinds = {kind: decoded(mesh, kind) for kind in ("mask", "albedo", "metallic-roughness")}
    for view, (mask, meta), (albedo, _), (material, _) in zip(renders, *kinds.values()):
        assert meta["c2w"] == view.meta["c2w"]
        np.testing.assert_array_equal(mask, view.rgba[..., 3])
        np.testing.assert_array_equal(albedo[..., 3], mask)
        inside = mask == 255
        srgb = 255 * (1.055 * np.array(color[:3]) ** (1 / 2.4) - 0.055)
        np.testing.assert_allclose(albedo[inside][:, :3], np.tile(srgb, (inside.sum(), 1)), atol=1)
        np.testing.assert_allclose(material[inside][:, :3], [[0, 153, 64]] * inside.sum(), atol=1)


def test_translucent_surfaces_have_no_depth_and_half_a_mask():
    mesh = quad(Material(base_color=(1.0, 1.0, 1.0, 0.4), alpha_mode="BLEND"))
    front = text_of_camera(read_cameras(json.dumps(FILE))[2])
    cfg = replace(CFG, views=1, camera_list=(front,))
    assert (decoded(mesh, "depth", cfg)[0][0] == 0).all()
    mask = decoded(mesh, "mask", cfg)[0][0]
    assert mask.max() == pytest.approx(102, abs=1)


FILE = {
    "cameras": [
        {"azimuth_degrees": 30, "elevation_degrees": 10, "focal_mm": 50},
        {"azimuth_degrees": 90, "elevation_degrees": 0, "projection": "orthographic"},
        {"c2w": [[1, 0, 0, 0.1], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]], "fov_degrees": 30},
    ]
}


def test_the_cameras_of_a_file_are_used_as_they_are():
    cameras = read_cameras(json.dumps(FILE))
    np.testing.assert_allclose(cameras[0].c2w, look_at_origin(30, 10, 50).c2w, atol=1e-9)
    assert cameras[0].focal_mm == pytest.approx(50)
    assert cameras[1].ortho_scale == orthographic_camera(90, 0).ortho_scale
    assert cameras[2].fov_degrees == 30
    texts = tuple(text_of_camera(camera) for camera in cameras)
    cfg = replace(CFG, views=3, camera_list=texts)
    views = list(render_views(of_trimesh(l_shape()), "a", replace(cfg, light="lamps")))
    assert [view.meta["camera_in_file"] for view in views] == [0, 1, 2]
    assert views[2].meta["c2w"] == FILE["cameras"][2]["c2w"]
    for view, camera in zip(views, cameras, strict=True):
        xy, _ = project(of_trimesh(l_shape()).vertices, camera, SIZE, SIZE)
        rows, columns = np.nonzero(view.rgba[..., 3])
        assert columns.min() == pytest.approx(xy[:, 0].min(), abs=1.5)
        assert rows.max() + 1 == pytest.approx(xy[:, 1].max(), abs=1.5)


def test_a_transforms_json_is_a_camera_file():
    eyes = [sample_camera("a", view) for view in range(2)]
    cameras = read_cameras(json.dumps(transforms_of(eyes, 64, ["0.png", "1.png"])))
    for camera, eye in zip(cameras, eyes, strict=True):
        np.testing.assert_allclose(camera.c2w, eye.c2w, atol=1e-9)
        assert camera.fov_degrees == pytest.approx(eye.fov_degrees)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "no readable cameras"),
        ('{"cameras": []}', "no cameras"),
        ('{"cameras": [{"c2w": [[1]], "fov_degrees": 30}]}', "4 x 4"),
        (
            '{"cameras": [{"azimuth_degrees": 1, "elevation_degrees": 0, "focal_mm": 0}]}',
            "focal_mm",
        ),
        (json.dumps({"cameras": [{"c2w": np.eye(4).tolist()}]}), "must be positive"),
        (
            json.dumps({"cameras": [{"c2w": (2 * np.eye(4)).tolist(), "fov_degrees": 9}]}),
            "rotation",
        ),
    ],
)
def test_a_camera_file_with_a_fault_is_refused(content, words):
    with pytest.raises(ValueError, match=words):
        read_cameras(content)


def test_cameras_of_a_file_that_see_nothing_reject_the_asset():
    behind = camera_from_matrix(
        np.array(look_at_origin(0, 0, 50).c2w) * [1, 1, 1, 1], fov_degrees=30, number=0
    )
    away = behind.c2w.copy()
    away[:3, 3] = [0, 0, -5]  # it looks along -z and the object is behind it
    text = text_of_camera(camera_from_matrix(away, fov_degrees=30, number=0))
    cfg = replace(CFG, views=1, camera_list=(text,), light="lamps")
    with pytest.raises(Reject) as verdict:
        list(render_views(of_trimesh(l_shape()), "a", cfg))
    assert verdict.value.reason == "render_empty"


def test_orthographic_sets_begin_with_the_six_axes():
    eyes = [sample_camera("a", view, "orthographic") for view in range(8)]
    assert [(e.azimuth_degrees, e.elevation_degrees) for e in eyes[:6]] == [
        *((0, 0), (90, 0), (180, 0), (270, 0)),
        *((0, 90), (0, -90)),
    ]
    assert all(eye.is_orthographic for eye in eyes)
    assert eyes[6].azimuth_degrees != eyes[7].azimuth_degrees
    # parallel rays: depth does not change where a point is
    xy, _ = project(np.array([[0.2, 0.1, 0.3], [0.2, 0.1, -0.3]]), eyes[0], 64, 64)
    np.testing.assert_allclose(xy[0], xy[1])


@pytest.mark.parametrize("kind", [kind for kind in VIEW_KINDS if kind != "renders"])
def test_a_shard_of_views_is_read_and_checked(kind, tmp_path):
    mesh, product = of_trimesh(l_shape()), Product(kind, "orthographic")
    cfg, extension = replace(CFG, cameras="orthographic"), product.extension("png")
    path = tmp_path / "000000.tar"
    views = list(surface_views(mesh, "a", cfg, kind))
    write_render_shard(path, [("a", views)], extension)
    pixels, meta = RenderShard(path).read_array("a", 1)
    np.testing.assert_array_equal(pixels, decode_any(views[1][0], extension))
    assert meta["projection"] == "orthographic"
    check = {"image_size": SIZE, "cameras": "orthographic", "extension": extension}
    assert check_render_shard(path, ["a"], 2, **check) == []
    assert check_render_shard(path, ["a"], 2, **{**check, "extension": "png"})
    assert check_render_shard(path, ["a"], 2, **{**check, "cameras": "wide"})


def test_transforms_shards_are_read_back(tmp_path):
    content = transforms_of([sample_camera("a", 0)], 64, ["../a-00.png"])
    path = tmp_path / "000000.tar"
    write_transforms_shard(path, [("a", dump_transforms(content)), ("b", b"{}")])
    assert read_transforms_shard(path) == {"a": content, "b": {}}
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged"):
        read_transforms_shard(path)


@pytest.mark.parametrize("name", ["normals-paper", "metallic-roughness-wide", "transforms-my_set"])
def test_product_names_are_parsed_back(name):
    assert str(Product.parse(name)) == name
    assert Product.parse(name).kind in name
