"""Image-based light: energy, mirrors, roughness and metallic, normal maps, shadows, same bytes."""

from dataclasses import replace
from math import pi

import numpy as np
import pytest
import trimesh

from pipeline.core.cameras import look_at_origin, orthographic_camera
from pipeline.core.schema import Material, SurfaceMap
from pipeline.rendering import prefilter, views
from pipeline.rendering.environments import (
    HEIGHT,
    Environment,
    computed_environment,
    directions,
    exposed,
    halved,
    irradiance,
    read_environment,
    sky,
    solid_angles,
    studio,
)
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.prefilter import (
    EnvironmentLight,
    harmonics,
    matte_coefficients,
    prepare,
    reflected_shares,
)
from pipeline.rendering.sky_visibility import (
    BLOCK,
    _arriving_shares,
    light_directions,
    light_from,
)
from pipeline.rendering.surface_shaders import displayed, tone_mapped
from pipeline.rendering.views import render_views, sample_environment
from tests.pipeline.rendering.test_views import SMALL, joined, of_trimesh, quad, torus_knot

SIZE = 96
FRONT = orthographic_camera(0, 0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep prepared environments out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefilter, "CACHE", tmp_path_factory.mktemp("environments"))
        yield


def light_of(radiance, yaw=0.0):
    key = radiance.tobytes()
    if key not in _lights:
        _lights[key] = prepare(Environment(name=f"test-{len(_lights)}", radiance=radiance))
    return EnvironmentLight(environment=_lights[key], yaw=yaw)


_lights = {}


def constant(level=1.0):
    return np.full((HEIGHT, 2 * HEIGHT, 3), level, np.float32)


def smooth():
    """Return an environment that is brighter and redder in a few wide directions."""
    d = directions(HEIGHT).astype(np.float64)
    light = np.full(d.shape, 0.3)
    for axis, color in (([1, 1, 1], [2.0, 1.0, 0.5]), ([-1, 0.2, 0.5], [0.3, 0.6, 1.5])):
        cosine = d @ (np.array(axis) / np.linalg.norm(axis))
        light += np.exp(3 * (cosine - 1))[..., None] * np.array(color)
    return light.astype(np.float32)


def radiance_of(mesh, light, eye=FRONT, size=SIZE):
    """Return linear radiance [size, size, 3], 0 where there is nothing, and the coverage."""
    with open_renderer(mesh, size, with_maps=True, with_shadows=True) as renderer:
        pixels = renderer.draw_environment(eye, light, radiance=True)
    return pixels[..., :3], pixels[..., 3]


def ball(**material):
    return of_trimesh(trimesh.creation.icosphere(4, 0.5), Material(**material))


def normals_of_ball(size=SIZE, radius=0.5):
    """Return the normals [size, size, 3] of the ball in FRONT, and where they are well inside."""
    offset = (np.arange(size) + 0.5 - size / 2) * FRONT.ortho_scale / size / radius
    x, y = np.meshgrid(offset, -offset)
    inside = x * x + y * y < 0.9
    z = np.sqrt(np.where(inside, 1 - x * x - y * y, 0))
    return np.stack([x, y, z], axis=-1), inside


WHITE = (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("metallic", [0.0, 1.0])
@pytest.mark.parametrize("roughness", [0.05, 0.5, 1.0])
def test_a_white_surface_in_even_light_has_the_radiance_of_its_surroundings(metallic, roughness):
    mesh = ball(base_color=WHITE, metallic=metallic, roughness=roughness)
    radiance, coverage = radiance_of(mesh, light_of(constant(0.7)))
    np.testing.assert_allclose(radiance[coverage == 1], 0.7, atol=0.02)


@pytest.mark.parametrize("yaw", [0.0, 1.1])
def test_a_mirror_shows_the_surroundings_of_the_reflected_direction(yaw):
    light = smooth()
    radiance, _ = radiance_of(
        ball(base_color=WHITE, metallic=1.0, roughness=0.0), light_of(light, yaw)
    )
    n, inside = normals_of_ball()
    reflected = 2 * n[..., 2:] * n - np.array([0.0, 0.0, 1.0])
    turn = np.array(  # world directions to those of the environment, a turn by -yaw about y
        [[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]]
    )
    r = reflected[inside] @ turn.T
    row = (np.arccos(np.clip(r[:, 1], -1, 1)) / pi * HEIGHT).astype(int)
    column = ((np.arctan2(r[:, 0], r[:, 2]) / pi + 1) * HEIGHT).astype(int)
    expected = light[row.clip(0, HEIGHT - 1), column % (2 * HEIGHT)]
    np.testing.assert_allclose(radiance[inside], expected, rtol=0.05, atol=0.01)


def monte_carlo(normal, view, base, metallic, roughness, light, *, twice=True):
    """Integrate the metallic-roughness model over all directions of a coarse panorama.

    What metallic microfacets scatter `twice` or more has the form of Kulla and Conty 2017,
    "Revisiting Physically Based Shading at Imageworks".
    """
    while len(light) > 64:
        light = halved(light)
    l = directions(64).reshape(-1, 3).astype(np.float64)
    weight = np.repeat(solid_angles(64), 128)
    nl, nv = l @ normal, float(normal @ view)
    h = l + view
    h /= np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-9)
    nh, vh = h @ normal, h @ view
    a2 = roughness**4
    lobe = a2 / (pi * (nh * nh * (a2 - 1) + 1) ** 2)
    up = np.maximum(nl, 0)
    smith = 0.5 / (up * np.sqrt(nv**2 * (1 - a2) + a2) + nv * np.sqrt(up**2 * (1 - a2) + a2))
    base = np.array(base[:3])
    f0 = 0.04 + (base - 0.04) * metallic
    fresnel = f0 + (1 - f0) * (1 - vh[:, None]) ** 5
    specular = fresnel * (lobe * smith)[:, None]
    # glTF mixes a dielectric, whose diffuse part has the fresnel of 0.04, and a metal
    through = 1 - (0.04 + 0.96 * (1 - vh[:, None]) ** 5)
    diffuse = base / pi * (1 - metallic) * through
    share = reflected_shares()[round(roughness * 31)].sum(axis=-1)
    even = np.linspace(0, 1, 32)
    mean_share = 2 * np.trapezoid(share * even, even)
    mean_fresnel = base + (1 - base) / 21
    again = mean_fresnel**2 * mean_share / (1 - mean_fresnel * (1 - mean_share))
    lost = (1 - np.interp(up, even, share)) * (1 - np.interp(nv, even, share))
    specular += twice * metallic * again * (lost / (pi * (1 - mean_share)))[:, None]
    power = light.reshape(-1, 3) * (weight * up)[:, None]
    return ((specular + diffuse) * power).sum(axis=0)


@pytest.mark.parametrize("metallic", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("roughness", [0.4, 0.7, 1.0])
def test_roughness_and_metallic_agree_with_the_integral(metallic, roughness):
    base = (0.8, 0.4, 0.2, 1.0)
    light = smooth()
    mesh = ball(base_color=base, metallic=metallic, roughness=roughness)
    radiance, _ = radiance_of(mesh, light_of(light))
    n, inside = normals_of_ball()
    rows, columns = np.nonzero(inside & (n[..., 2] > 0.5))
    errors = []
    for k in range(0, len(rows), max(1, len(rows) // 24)):
        at = rows[k], columns[k]
        expected = monte_carlo(n[at], np.array([0.0, 0.0, 1.0]), base, metallic, roughness, light)
        errors.append(radiance[at] / expected - 1)
    assert abs(np.mean(errors)) < 0.05
    assert np.quantile(np.abs(errors), 0.9) < 0.1


def test_the_share_that_mirrors_reflect_agrees_with_the_integral():
    table = reflected_shares()
    side = len(table)
    normal = np.array([0.0, 1.0, 0.0])
    for i, j in ((16, 25), (24, 12), (31, 28)):
        roughness, nv = i / (side - 1), j / (side - 1)
        view = np.array([np.sqrt(1 - nv**2), nv, 0.0])
        for f0 in (0.04, 1.0):
            grey = (f0,) * 3
            white = monte_carlo(normal, view, grey, 1.0, roughness, constant(), twice=False)
            np.testing.assert_allclose(f0 * table[i, j, 0] + table[i, j, 1], white[0], rtol=0.03)


def test_no_surface_reflects_more_light_than_arrives():
    for roughness in (0.0, 0.3, 1.0):
        for metallic in (0.0, 1.0):
            radiance, coverage = radiance_of(
                ball(base_color=WHITE, metallic=metallic, roughness=roughness),
                light_of(constant()),
            )
            assert radiance[coverage == 1].max() <= 1.02
    table = reflected_shares()
    assert (table >= 0).all()
    assert table.sum(axis=-1).max() <= 1 + 1e-6


def test_a_tilted_normal_map_shades_like_a_tilted_surface():
    """u of the quad runs along +x and v along +y, so a normal of the map is one of the world."""
    corners_uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    light = light_of(smooth())
    for tilt in ([0.5, 0.0], [0.0, 0.5], [-0.3, 0.4]):
        n = np.array([*tilt, np.sqrt(1 - tilt[0] ** 2 - tilt[1] ** 2)])
        texel = np.rint(n * 127 + 128).astype(np.uint8)
        values = np.broadcast_to(texel, (4, 4, 3)).copy()
        material = Material(
            base_color=WHITE, roughness=1.0, maps={"normal": SurfaceMap(values=values)}
        )
        mesh = quad(material)
        part = replace(mesh.parts[0], uv=None, normal_uv=corners_uv)
        radiance, coverage = radiance_of(replace(mesh, parts=(part,)), light)
        mapped = radiance[coverage == 1].mean(axis=0)
        turned, _ = radiance_of(ball(base_color=WHITE, roughness=1.0), light)
        normals, inside = normals_of_ball()
        nearest = np.argmax(np.where(inside, normals @ n, -1))
        expected = turned.reshape(-1, 3)[nearest]
        np.testing.assert_allclose(mapped, expected, rtol=0.06)


def test_a_normal_map_is_mirrored_on_the_back_of_its_surface():
    """The back of a bump is a dent, so its normal is the opposite one."""
    corners_uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    values = np.broadcast_to(np.uint8([192, 128, 238]), (2, 2, 3)).copy()
    material = Material(maps={"normal": SurfaceMap(values=values)})
    mesh = quad(material)
    mesh = replace(mesh, parts=(replace(mesh.parts[0], normal_uv=corners_uv),))
    with open_renderer(mesh, 32, with_maps=True) as renderer:
        front, _ = renderer.draw_normals_and_depth(FRONT)
        back, _ = renderer.draw_normals_and_depth(orthographic_camera(180, 0))
    n = np.array([64 / 127, 0, 110 / 127])
    np.testing.assert_allclose(front[16, 16], n / np.linalg.norm(n), atol=0.01)
    np.testing.assert_allclose(back[16, 16], -front[16, 16], atol=1e-5)


def test_maps_replace_the_numbers_of_the_material():
    corners_uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    halves = np.zeros((2, 4), np.uint8)
    halves[:, 2:] = 255  # the right half is metallic
    maps = {
        "metallic": SurfaceMap(values=halves),
        "roughness": SurfaceMap(values=np.full((2, 2), 51, np.uint8)),
        "occlusion": SurfaceMap(values=np.full((2, 2), 128, np.uint8)),
    }
    uv = {f"{name}_uv": corners_uv for name in maps}
    mesh = quad(Material(base_color=(0.9, 0.5, 0.1, 1.0), maps=maps))
    mesh = replace(mesh, parts=(replace(mesh.parts[0], **uv),))
    with open_renderer(mesh, 64, with_maps=True, with_shadows=True) as renderer:
        material = renderer.draw_property(FRONT, "MATERIAL")
        lit = renderer.draw_environment(FRONT, light_of(constant()), radiance=True)
    assert material[32, 24].tolist() == [0, 51, 0, 255]
    assert material[32, 40].tolist() == [0, 51, 255, 255]
    np.testing.assert_allclose(lit[32, 24, :3].max(), 128 / 255 * 0.9, atol=0.08)  # occluded


def test_a_crevice_is_darker_and_a_convex_shape_is_not():
    floor = of_trimesh(
        trimesh.creation.box([0.9, 0.02, 0.9]).apply_translation([0, -0.3, 0]),
        Material(base_color=(0.5, 0.5, 0.5, 1.0)),
    )
    wall = of_trimesh(
        trimesh.creation.box([0.9, 0.6, 0.02]).apply_translation([0, 0, -0.2]),
        Material(base_color=(0.5, 0.5, 0.5, 1.0)),
    )
    eye = orthographic_camera(0, 45)
    light = light_of(constant())
    alone, covered = radiance_of(floor, light, eye)
    assert alone[covered == 1].min() > 0.49  # a box casts no shadow on itself
    both, _ = radiance_of(joined(floor, wall), light, eye)
    # a point of the floor in front of the wall: far from it, then next to it
    scale = SIZE / eye.ortho_scale

    def at(z):
        local = np.array([0.0, -0.29, z]) @ eye.c2w[:3, :3]
        return both[int(SIZE / 2 - local[1] * scale), SIZE // 2, 0]

    assert at(-0.15) < 0.85 * at(0.4)


def test_a_wall_throws_a_shadow_away_from_the_light():
    plate = Material(base_color=(0.5, 0.5, 0.5, 1.0), roughness=1.0)
    floor = of_trimesh(trimesh.creation.box([0.9, 0.02, 0.9]), plate)
    wall = of_trimesh(trimesh.creation.box([0.02, 0.4, 0.9]).apply_translation([0, 0.21, 0]), plate)
    sun = np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
    panorama = (0.02 + 40 * (directions(HEIGHT) @ sun > 0.99))[..., None] * np.ones(3)
    light = light_of(panorama.astype(np.float32))
    top = orthographic_camera(0, 90)
    radiance, _ = radiance_of(joined(floor, wall), light, top)
    bright = radiance[SIZE // 2, int(SIZE / 2 + 0.2 * SIZE / top.ortho_scale), 0]
    dark = radiance[SIZE // 2, int(SIZE / 2 - 0.2 * SIZE / top.ortho_scale), 0]
    assert dark < 0.2 * bright
    # a quarter turn moves the light to -z, and the shadow is even on both sides
    turned, _ = radiance_of(joined(floor, wall), replace(light, yaw=pi / 2), top)
    left = turned[SIZE // 2, int(SIZE / 2 - 0.2 * SIZE / top.ortho_scale), 0]
    right = turned[SIZE // 2, int(SIZE / 2 + 0.2 * SIZE / top.ortho_scale), 0]
    assert left == pytest.approx(right, rel=0.2)


def test_emission_adds_light_and_unlit_surfaces_show_their_colour():
    glowing = ball(base_color=(0, 0, 0, 1), roughness=1.0, emissive=(0.5, 0.25, 0.0))
    radiance, coverage = radiance_of(glowing, light_of(constant(0.0)))
    np.testing.assert_allclose(radiance[coverage == 1].mean(axis=0), [0.5, 0.25, 0], atol=1e-3)
    plain = ball(base_color=(0.2, 0.5, 0.1, 1), unlit=True)
    radiance, coverage = radiance_of(plain, light_of(constant(3.0)))
    np.testing.assert_allclose(radiance[coverage == 1].mean(axis=0), [0.2, 0.5, 0.1], atol=1e-3)


def test_a_picture_is_the_tone_mapped_radiance():
    mesh, light = ball(base_color=(0.9, 0.3, 0.1, 1), roughness=0.5), light_of(smooth() * 2)
    radiance, coverage = radiance_of(mesh, light)
    with open_renderer(mesh, SIZE, with_maps=True, with_shadows=True) as renderer:
        picture = renderer.draw_environment(FRONT, light)
    inside = coverage == 1
    expected = displayed(radiance[inside])
    assert np.abs(picture[inside][:, :3].astype(int) - expected).max() <= 2


def test_tone_mapping_keeps_dark_colours_and_compresses_bright_ones():
    dark = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.1]])
    np.testing.assert_allclose(tone_mapped(dark), dark - 0.04)
    steps = tone_mapped(np.linspace(0, 50, 500)[:, None] * np.ones(3))
    assert (np.diff(steps[:, 0]) > 0).all()
    assert steps.max() < 1


def test_every_computed_environment_is_exposed_and_seeded():
    for panorama in (studio(3), sky(1)):
        normals = directions(8).reshape(-1, 3)
        level = irradiance(halved(halved(panorama)), normals[normals[:, 1] > -0.3]).mean()
        assert 0.6 < level < 0.9
        assert panorama.min() >= 0
        np.testing.assert_allclose(exposed(panorama * 7), exposed(panorama), rtol=1e-5)
    np.testing.assert_array_equal(studio(3), studio(3))
    assert np.abs(studio(3) - studio(4)).max() > 1
    assert computed_environment(12).name == "sky-02"


def test_matte_light_agrees_with_the_integral():
    panorama = sky(2)
    normals = directions(8).reshape(-1, 3)
    exact = irradiance(panorama, normals)
    fit = harmonics(normals) @ matte_coefficients(panorama)
    assert np.abs(fit - exact).mean() < 0.02 * exact.mean()
    assert np.abs(fit - exact).max() < 0.1 * exact.mean()


def test_the_light_directions_gather_all_light():
    panorama = sky(0)
    total = (panorama * solid_angles(HEIGHT)[:, None, None]).sum(axis=(0, 1))
    for yaw in (0.0, 2.0):
        np.testing.assert_allclose(light_from(panorama, yaw).sum(axis=0), total, rtol=1e-3)
    assert np.abs(light_directions().mean(axis=0)).max() < 0.02


def test_the_shares_of_light_are_those_of_the_sum_over_directions():
    """More vertices than one block has, without reflected light (the colour is black)."""
    rng = np.random.default_rng(0)
    count, towards = BLOCK + 7, light_directions()
    seen = rng.integers(0, 256, (count, len(towards)), dtype=np.uint8)
    normals = rng.normal(size=(count, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    light = rng.random((len(towards), 3), dtype=np.float32)
    shares = np.empty((count, 2, 4), np.uint8)
    black = np.zeros((count, 3), np.float32)
    _arriving_shares(seen, normals, towards, light, black, shares)
    power = np.concatenate([light, np.ones((len(towards), 1))], axis=1)
    for side, sign in ((0, 1), (1, -1)):
        weight = np.maximum(sign * normals.astype(np.float64) @ towards.T, 0)
        share = (weight * seen / 255) @ power / (weight @ power)
        # the fit of reflected light at a black surface, which never takes light away
        reflected = ((-0.3324 * share + 0.6417) * share + 0.6903) * share
        share[:, :3] = np.maximum(share, reflected)[:, :3]
        np.testing.assert_allclose(shares[:, side], 255 * share, atol=0.51)


def test_an_hdr_file_becomes_an_environment(tmp_path):
    import OpenImageIO as oiio

    panorama = studio(1)[::2, ::2]
    for suffix, tolerance in ((".exr", 1e-3), (".hdr", 0.02)):
        path = tmp_path / f"room{suffix}"
        spec = oiio.ImageSpec(panorama.shape[1], panorama.shape[0], 3, "float")
        output = oiio.ImageOutput.create(str(path))
        output.open(str(path), spec)
        output.write_image(np.ascontiguousarray(panorama * 5))
        output.close()
        read = read_environment(path)
        assert read.name == "room"
        expected = exposed(np.repeat(np.repeat(panorama, 2, axis=0), 2, axis=1))
        np.testing.assert_allclose(read.radiance, expected, rtol=tolerance, atol=tolerance)


def test_the_environment_of_a_view_is_seeded(monkeypatch):
    monkeypatch.setattr(views, "prepared_environment", lambda number, folder: number)
    eye = look_at_origin(100, 20, 50)
    lights = [sample_environment("a", view, eye) for view in range(6)]
    again = [sample_environment("a", view, eye) for view in range(6)]
    assert lights == again
    assert len({light.environment for light in lights}) > 2
    assert all(abs(np.degrees(light.yaw) - 100) <= 75 for light in lights)


def test_equal_seeds_give_equal_bytes(monkeypatch):
    few = [light_of(smooth()).environment, light_of(constant()).environment]
    monkeypatch.setattr(views, "prepared_environment", lambda number, folder: few[number % 2])
    mesh, cfg = of_trimesh(torus_knot()), replace(SMALL, views=2, light="ibl")
    first = [view.rgba.tobytes() for view in render_views(mesh, "a", cfg)]
    assert first == [view.rgba.tobytes() for view in render_views(mesh, "a", cfg)]
    assert first != [view.rgba.tobytes() for view in render_views(mesh, "b", cfg)]
