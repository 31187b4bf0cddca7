"""Rendered views: colours, alpha modes, sides, rejected views and reproducible bytes."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from pipeline.core.cameras import look_at_origin, sample_camera
from pipeline.core.errors import Reject
from pipeline.core.image_codec import decode, encode
from pipeline.core.schema import Material, Mesh, Part, View
from pipeline.rendering import views as render
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.shading import Lighting, sample_lighting, smooth_normals
from pipeline.rendering.views import (
    fault_of,
    render_from,
    render_views,
    unpremultiply,
    view_numbers,
)
from tests.child_python import project_environment, run_python

SMALL = RenderConfig(views=4, image_size=160)


def of_trimesh(shape, material=None, **looks):
    vertices, faces = np.asarray(shape.vertices, np.float64), np.asarray(shape.faces, np.int32)
    whole = {"vertices": slice(0, len(vertices)), "faces": slice(0, len(faces))}
    return Mesh(
        vertices=vertices,
        faces=faces,
        parts=(Part(**whole, material=material or Material(), **looks),),
    )


def joined(*meshes):
    """Return one mesh of several, each of which becomes a part."""
    vertices, faces, parts, v, f = [], [], [], 0, 0
    for mesh in meshes:
        (part,) = mesh.parts
        vertices.append(mesh.vertices)
        faces.append(mesh.faces + v)
        parts.append(
            replace(
                part, vertices=slice(v, v + len(mesh.vertices)), faces=slice(f, f + len(mesh.faces))
            )
        )
        v, f = v + len(mesh.vertices), f + len(mesh.faces)
    return Mesh(
        vertices=np.concatenate(vertices),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts),
    )


def quad(material, z=0.0, size=0.4, uv=None):
    """Return a square that faces +z."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * size + [0, 0, z]
    return of_trimesh(
        trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False), material, uv=uv
    )


def box(size=0.3):
    return trimesh.creation.box([size] * 3)


def l_shape():
    """Return three arms of different lengths: no mirror image or swap of axes looks the same."""
    arms = [
        ([0.4, 0.1, 0.1], [0.2, 0.05, 0.05]),
        ([0.1, 0.3, 0.1], [0.05, 0.15, 0.05]),
        ([0.1, 0.1, 0.2], [0.05, 0.05, 0.1]),
    ]
    return trimesh.util.concatenate(
        [trimesh.creation.box(e).apply_translation(np.add(c, 0.04)) for e, c in arms]
    )


def torus_knot(sides=10, turns=90, thickness=0.07):
    t = np.linspace(0, 2 * np.pi, turns, endpoint=False)
    spine = (
        np.stack(
            [
                np.cos(2 * t) * (2 + np.cos(3 * t)),
                np.sin(2 * t) * (2 + np.cos(3 * t)),
                -np.sin(3 * t),
            ],
            axis=1,
        )
        / 8
    )
    along = np.roll(spine, -1, axis=0) - np.roll(spine, 1, axis=0)
    side = np.cross(along, spine)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    over = np.cross(side, along / np.linalg.norm(along, axis=1, keepdims=True))
    angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)[None, :, None]
    rings = spine[:, None] + thickness * (
        np.cos(angle) * side[:, None] + np.sin(angle) * over[:, None]
    )
    i, j = np.meshgrid(np.arange(turns), np.arange(sides), indexing="ij")
    at = lambda i, j: (i % turns) * sides + j % sides  # noqa: E731
    faces = np.stack(
        [at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j), at(i + 1, j + 1), at(i, j + 1)],
        axis=-1,
    )
    return trimesh.Trimesh(rings.reshape(-1, 3), faces.reshape(-1, 3), process=False)


def test_the_json_of_a_view_has_the_fields_of_the_format():
    (view,) = render_views(of_trimesh(box()), "folder-a", replace(SMALL, views=1))
    assert view.rgba.shape == (160, 160, 4)
    assert view.rgba.dtype == np.uint8
    eye = sample_camera("folder-a", 0, "paper")
    assert view.meta == {"uid": "folder-a", "view": 0, "width": 160, "height": 160, **eye.meta()}
    expected = "azimuth_degrees c2w distance elevation_degrees focal_mm fov_degrees sensor_mm"
    assert " ".join(sorted(eye.meta())) == expected


def digest(mesh, uid="folder-a", cfg=SMALL):
    return hashlib.sha256(
        b"".join(encode(view) for view in render_views(mesh, uid, cfg))
    ).hexdigest()


def test_equal_seeds_give_equal_bytes_in_two_processes():
    mesh = of_trimesh(torus_knot())
    assert digest(mesh) == digest(mesh) != digest(mesh, "folder-b")
    here = (
        "from tests.pipeline.rendering.test_views import *; print(digest(of_trimesh(torus_knot())))"
    )
    for threads in ("0", "2"):
        env = project_environment(PYTHONHASHSEED=threads, LP_NUM_THREADS=threads)
        assert run_python("-c", here, env=env).stdout.strip() == digest(mesh)


def lit(mesh, eye=None, size=160, light=None):
    """Return one image from the front."""
    eye = eye or look_at_origin(0, 0, 50)
    with open_renderer(mesh, size) as drawing:
        return unpremultiply(drawing.draw(eye, light or sample_lighting("folder-a", 0, eye)))


def even_light():
    """Return white light from all directions, in which a face shows its own colour."""
    one = np.ones(3, np.float32)
    return Lighting(
        sky=0.6 * one,
        ground=0.6 * one,
        directions=np.zeros((0, 3), np.float32),
        colors=np.zeros((0, 3), np.float32),
    )


CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)  # v = 0 at the bottom


def test_textures_are_neither_flipped_nor_mirrored():
    texture = np.zeros((64, 64, 4), np.uint8)
    texture[..., 3] = 255
    texture[:32, :32, 0] = 255  # top left red
    texture[:32, 32:, 1] = 255  # top right green
    texture[32:, :32, 2] = 255  # bottom left blue; bottom right black
    image = lit(quad(Material(base_color=(1, 1, 1, 1), texture=texture), uv=CORNERS))
    strongest = [
        [image[y, x, :3].argmax() if image[y, x, :3].max() > 120 else 3 for x in (60, 100)]
        for y in (60, 100)
    ]
    assert strongest == [[0, 1], [2, 3]]


@pytest.mark.parametrize("how", ["factor", "texture", "vertices"])
def test_colours_match_those_of_the_material(how):
    """In uniform light of 0.6 a rough surface shows 0.6 of its linear colour."""
    srgb = np.array([200, 120, 40])
    linear = np.where(
        srgb / 255 <= 0.04045, srgb / 255 / 12.92, ((srgb / 255 + 0.055) / 1.055) ** 2.4
    )
    rgba = np.array([*srgb, 255], np.uint8)
    if how == "factor":
        mesh = quad(Material(base_color=(*linear, 1), roughness=1))
    elif how == "texture":
        mesh = quad(
            Material(base_color=(1, 1, 1, 1), roughness=1, texture=np.tile(rgba, (8, 8, 1))),
            uv=CORNERS,
        )
    else:
        mesh = quad(Material(base_color=(1, 1, 1, 1), roughness=1))
        mesh = replace(mesh, parts=(replace(mesh.parts[0], colors=np.tile(rgba, (4, 1))),))
    out = 0.6 * (linear + 0.04)  # 4% more for the reflection of a dielectric
    expected = 255 * np.where(out <= 0.0031308, out * 12.92, 1.055 * out ** (1 / 2.4) - 0.055)
    assert np.abs(lit(mesh, light=even_light())[80, 80, :3] - expected).max() <= 3


def test_colour_is_not_premultiplied():
    """In uniform light all pixels of a ball have one colour, also at its outline."""
    image = lit(
        of_trimesh(trimesh.creation.icosphere(3, 0.4), Material(roughness=1)), light=even_light()
    )
    alpha = image[..., 3]
    assert len(np.unique(alpha)) == 5  # 0 to 4 samples
    for covered in np.unique(alpha)[1:]:
        color = image[alpha == covered][:, :3].astype(int)
        assert np.abs(color - image[80, 80, :3].astype(int)).max() <= 4, covered
    assert not image[alpha == 0].any()


def test_unpremultiply_inverts_premultiplication():
    rng = np.random.default_rng(0)
    straight = rng.integers(0, 256, (50, 40, 4), dtype=np.uint8)
    straight[:5, :, 3] = 0
    straight[5:10, :, 3] = 255
    alpha = straight[..., 3:].astype(float)
    premultiplied = np.concatenate(
        [np.rint(straight[..., :3] * alpha / 255), alpha], axis=2
    ).astype(np.uint8)
    result = unpremultiply(premultiplied)
    assert (result[..., 3] == straight[..., 3]).all()
    error = np.abs(result[..., :3].astype(float) - straight[..., :3])
    assert (error <= np.where(alpha > 0, 127.5 / np.maximum(alpha, 1) + 0.5, 255)).all()
    assert not result[:5, :, :3].any()
    assert (result[5:10] == straight[5:10]).all()


def test_mask_cuts_and_blend_is_translucent():
    ramp = np.full((4, 256, 4), 255, np.uint8)
    ramp[..., 3] = np.arange(256)
    material = Material(base_color=(1, 1, 1, 1), texture=ramp)
    alpha = {}
    for mode in ("OPAQUE", "MASK", "BLEND"):
        mesh = quad(replace(material, alpha_mode=mode, alpha_cutoff=0.25), uv=CORNERS)
        alpha[mode] = lit(mesh)[80, :, 3].astype(float)
    inside = np.flatnonzero(alpha["OPAQUE"] == 255)
    assert set(np.unique(alpha["OPAQUE"])) <= {0, 64, 128, 191, 255}
    u = (inside + 0.5 - inside[0]) / len(inside)
    assert (alpha["MASK"][inside][u < 0.23] == 0).all()
    assert (alpha["MASK"][inside][u > 0.27] == 255).all()
    assert np.abs(alpha["BLEND"][inside] / 255 - u).max() < 0.03


def test_blended_faces_are_drawn_from_far_to_near():
    """Red glass is in front of blue glass and a wall, in any order of the file."""
    glass = {"alpha_mode": "BLEND", "roughness": 1.0}
    red = quad(Material(base_color=(1, 0, 0, 0.5), **glass), z=0.2)
    blue = quad(Material(base_color=(0, 0, 1, 0.5), **glass), z=0.0, size=0.45)
    wall = quad(Material(base_color=(0, 1, 0, 1), roughness=1.0), z=-0.2, size=0.2)
    first, *others = [
        lit(joined(*order), light=even_light())
        for order in ((red, blue, wall), (wall, blue, red), (blue, wall, red))
    ]
    assert all((first == other).all() for other in others)
    over_wall, over_nothing = first[80, 80], first[80, 80 - 30]
    # In uniform light of 0.6, a channel of 1 becomes 0.6 * (1 + 4%) in linear light, and 0 becomes
    # the 4% of the reflection.
    full, none = (255 * (1.055 * (0.6 * (own + 0.04)) ** (1 / 2.4) - 0.055) for own in (1, 0))
    reds, greens, blues = none + (full - none) * np.eye(3)
    assert np.abs(over_wall - [*(reds / 2 + blues / 4 + greens / 4), 255]).max() <= 2
    assert np.abs(over_nothing - [*(reds / 2 + blues / 4) / 0.75, 0.75 * 255]).max() <= 3
    behind = lit(joined(red, blue), eye=look_at_origin(180, 0, 50), light=even_light())[80, 80]
    assert np.abs(behind - [*(blues / 2 + reds / 4) / 0.75, 0.75 * 255]).max() <= 3


@pytest.mark.parametrize("given", [True, False], ids=["normals", "no normals"])
@pytest.mark.parametrize("subdivisions", [3, 5])  # lit per pixel, lit per vertex
def test_the_winding_of_faces_does_not_matter(given, subdivisions):
    """Faces are visible and lit from both sides, with normals of the file and without."""
    ball = trimesh.creation.icosphere(subdivisions, radius=0.4)
    normals = (ball.vertices / 0.4).astype(np.float32) if given else None
    mesh = of_trimesh(ball, normals=normals)
    turned = mesh.faces.copy()
    turned[::2] = turned[::2, ::-1]
    difference = np.abs(lit(mesh).astype(int) - lit(replace(mesh, faces=turned)))
    assert difference.max() <= 3
    assert (difference > 1).mean() < 1e-3


def test_a_sheet_is_visible_from_both_sides():
    mesh = quad(Material(double_sided=False))
    images = [lit(mesh, eye=look_at_origin(azimuth, 20, 50)) for azimuth in (0, 180)]
    assert (images[0][..., 3] == images[1][:, ::-1, 3]).mean() > 0.999
    assert all(image[80, 80, :3].min() > 60 for image in images)


def test_images_are_neither_dark_nor_overexposed():
    looks = {
        "white": Material(base_color=(1, 1, 1, 1)),
        "grey": Material(base_color=(0.5, 0.5, 0.5, 1)),
    }
    looks["metal"] = Material(base_color=(0.9, 0.9, 0.9, 1), metallic=1.0, roughness=0.2)
    looks["gold"] = Material(base_color=(1.0, 0.77, 0.34, 1), metallic=1.0, roughness=0.5)
    numbers = {}
    for name, material in looks.items():
        ball = of_trimesh(trimesh.creation.icosphere(4, 0.4), material)
        numbers[name] = view_numbers(render_views(ball, "folder-a", replace(SMALL, views=12)))
        assert 0.35 < numbers[name]["brightness_mean"] < 0.9, name
        assert numbers[name]["contrast_mean"] > 0.03, name
        assert numbers[name]["white_max"] < 0.02, name
        assert 0.05 < numbers[name]["coverage_min"] < numbers[name]["coverage_mean"] < 0.6
    assert numbers["white"]["brightness_mean"] > numbers["grey"]["brightness_mean"] + 0.05
    counts = [
        len(sample_lighting("folder-a", view, sample_camera("folder-a", view)).colors)
        for view in range(200)
    ]
    assert set(counts) == {1, 2, 3}


def test_small_faces_are_lit_like_large_ones():
    """A fine ball, lit per vertex, looks like a coarse one with the same normals, lit per pixel."""
    images = []
    for subdivisions in (2, 5):
        ball = trimesh.creation.icosphere(subdivisions, 0.4)
        images.append(
            lit(of_trimesh(ball, normals=(ball.vertices / 0.4).astype(np.float32))).astype(int)
        )
    both = (images[0][..., 3] == 255) & (images[1][..., 3] == 255)
    assert np.abs(images[0] - images[1])[both].mean() < 1.5


def test_normals_keep_creases_and_smooth_the_rest():
    for solid in (
        box(),
        trimesh.creation.cone(0.3, 0.3, sections=4),
        trimesh.creation.icosahedron(),
    ):
        corners = smooth_normals(solid.vertices.astype(np.float32), solid.faces)
        assert np.abs(corners - solid.face_normals[:, None]).max() < 1e-6
    can = trimesh.creation.cylinder(0.3, 0.6, sections=32)
    corners, places = (
        smooth_normals(can.vertices.astype(np.float32), can.faces),
        can.vertices[can.faces],
    )
    cap = np.abs(can.face_normals[:, 2]) > 0.5
    assert np.abs(np.abs(corners[cap][..., 2]) - 1).max() < 1e-6
    radial = places[~cap] * [1, 1, 0] / 0.3
    assert (
        np.einsum("fij,fij->fi", corners[~cap], radial).min() > 0.995
    )  # neighbouring facets meet at 11 degrees
    seam = trimesh.Trimesh(
        can.vertices[can.faces].reshape(-1, 3),
        np.arange(len(can.faces) * 3).reshape(-1, 3),
        process=False,
    )
    assert (
        np.abs(smooth_normals(seam.vertices.astype(np.float32), seam.faces) - corners).max() < 1e-5
    )
    assert smooth_normals(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)).shape == (
        0,
        3,
        3,
    )


def test_assets_without_a_usable_view_are_rejected():
    invisible = of_trimesh(box(), Material(base_color=(1, 1, 1, 0), alpha_mode="BLEND"))
    with pytest.raises(Reject) as rejected:
        list(render_views(invisible, "folder-a", SMALL))
    assert (rejected.value.reason, rejected.value.numbers["view"]) == ("render_empty", 0)
    with pytest.raises(Reject, match="render_cut_off"):
        list(render_views(of_trimesh(box(2.0)), "folder-a", SMALL))


def test_reasons_to_reject_an_image():
    image = np.zeros((100, 100, 4), np.uint8)
    assert fault_of(image, 1e-4) == "render_empty"
    image[40:60, 40:60] = (90, 90, 90, 255)
    assert fault_of(image, 0.05) == "render_empty"
    assert fault_of(image, 1e-4) == "render_constant"
    image[40:60, 40, 3] = 64  # partly covered pixels do not count
    image[40:60, 41:45, :3] += 2  # rounding does not count
    assert fault_of(image, 1e-4) == "render_constant"
    image[40:60, 41:45, 2] += 1
    assert fault_of(image, 1e-4) is None
    for edge in (np.s_[0, 50], np.s_[99, 50], np.s_[50, 0], np.s_[50, 99]):
        cut = image.copy()
        cut[edge] = (90, 90, 90, 64)
        assert fault_of(cut, 1e-4) == "render_cut_off"


def test_a_bad_view_is_rendered_again_with_the_next_camera(monkeypatch):
    faults = iter([None, "render_constant", "render_empty", None, None])
    monkeypatch.setattr(render, "fault_of", lambda *_: next(faults))
    views = list(render_views(of_trimesh(box()), "folder-a", replace(SMALL, views=3)))
    assert [v.meta["view"] for v in views] == [0, 1, 2]
    assert [v.meta["focal_mm"] for v in views] == [
        sample_camera("folder-a", v, attempt=a).focal_mm for v, a in ((0, 0), (1, 2), (2, 0))
    ]


@pytest.mark.parametrize("format", ["png", "webp"])
def test_encoding_is_lossless_and_repeatable(format):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (64, 48, 4), dtype=np.uint8)
    rgba[:8, :, 3] = 0  # colours with alpha 0 are kept
    view = View(rgba=rgba, meta={})
    assert (decode(encode(view, format)) == rgba).all()
    assert encode(view, format) == encode(view, format)


def test_configuration_is_checked():
    for wrong in (
        {"views": 0},
        {"image_size": 0},
        {"attempts": 0},
        {"cameras": "orbit"},
        {"format": "jpeg"},
        {"min_coverage": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RenderConfig(**wrong)
    with pytest.raises(ValueError, match="format"):
        encode(View(rgba=np.zeros((2, 2, 4), np.uint8), meta={}), "jpeg")  # pyright: ignore[reportArgumentType]


def test_without_egl_the_error_names_the_packages():
    """A process without an EGL driver raises RunError."""
    code = (
        "from pipeline.rendering.gl_context import *; from pipeline.core.errors import RunError\n"
    )
    code += "try: renderer_string()\nexcept RunError as error: print(error)"
    env = project_environment(__EGL_VENDOR_LIBRARY_FILENAMES="/nonexistent")
    assert "libegl1 libgl1 libgl1-mesa-dri" in run_python("-c", code, env=env).stdout


def test_importing_views_loads_no_graphics_library():
    code = "import sys, pipeline.rendering.views\n"
    code += "print({'moderngl', 'trimesh', 'torch'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"


def test_a_given_camera_gives_the_image_of_the_sampled_one():
    mesh = of_trimesh(l_shape())
    (first, *_) = render_views(mesh, "a", replace(SMALL, views=1))
    eye, other = sample_camera("a", 0), look_at_origin(200.0, -20.0, 50.0)
    same, behind = render_from(mesh, [eye, other], SMALL.image_size, lights="a")
    np.testing.assert_array_equal(same, first.rgba)  # lights of (uid, view 0)
    assert behind[..., 3].any()
    assert ((behind[..., 3] > 0) & (same[..., 3] > 0)).sum() < 0.8 * (same[..., 3] > 0).sum()
