"""Rendered materials: wrap modes, filters, emission, unlit surfaces and products of colours."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.core.color import linear_to_srgb, srgb_to_linear
from pipeline.core.schema import Material, Sampler
from pipeline.curation.screening_metrics import is_textured
from tests.pipeline.rendering.test_views import CORNERS, even_light, joined, lit, quad

WHITE = (1.0, 1.0, 1.0, 1.0)
BLACK = (0.0, 0.0, 0.0, 1.0)
RED, GREEN, BLUE, YELLOW = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]


def pixels(rows) -> np.ndarray:
    """Return an opaque texture of rows of colours."""
    image = np.asarray(rows, dtype=np.uint8)
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


def shown(linear):
    """Return the 8-bit colour that the renderer shows for linear light, compressed above 0.7."""
    linear = np.asarray(linear, dtype=np.float64)
    over = np.maximum(linear - 0.7, 0)
    return 255 * linear_to_srgb(np.minimum(linear, 0.7) + over / (1 + over / 0.3))


def with_look(mesh, **changes):
    return replace(mesh, parts=(replace(mesh.parts[0], **changes),))


def at(image, u: float, v: float):
    """Return the colour at a place of the quad, (0, 0) at its bottom left."""
    rows, columns = (
        np.flatnonzero(image[..., 3].any(axis=1)),
        np.flatnonzero(image[..., 3].any(axis=0)),
    )
    y = rows[-1] - v * (rows[-1] - rows[0])
    x = columns[0] + u * (columns[-1] - columns[0])
    return image[round(y), round(x), :3].astype(int)


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ("repeat", [RED, GREEN, RED, GREEN]),
        ("mirror", [RED, GREEN, GREEN, RED]),
        ("clamp", [RED, GREEN, GREEN, GREEN]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("slot", ["base", "emissive"])
def test_what_lies_beyond_the_image_follows_the_wrap_mode(wrap, expected, axis, slot):
    row = [RED] * 16 + [GREEN] * 16
    image = pixels([row] * 4 if axis == 0 else [[color] * 4 for color in row[::-1]])
    sampler = Sampler(**{("wrap_u", "wrap_v")[axis]: wrap})
    uv = CORNERS * [2, 1] if axis == 0 else CORNERS * [1, 2]
    if slot == "base":
        mesh = quad(Material(base_color=WHITE, texture=image, sampler=sampler), uv=uv)
    else:
        glow = {"emissive": (1.0, 1.0, 1.0), "emissive_texture": image}
        mesh = with_look(
            quad(Material(base_color=BLACK, emissive_sampler=sampler, **glow)), emissive_uv=uv
        )
    drawn = lit(mesh, light=even_light())
    places = np.array([0.125, 0.375, 0.625, 0.875])
    colors = [at(drawn, *((p, 0.5) if axis == 0 else (0.5, p))) for p in places]
    assert [color.argmax() for color in colors] == [np.argmax(color) for color in expected]


def test_a_nearest_filter_keeps_the_edges_of_texels():
    image = pixels([[[0, 0, 0], [255, 255, 255]]])
    between = {}
    for nearest in (False, True):
        sampler = Sampler(wrap_u="clamp", wrap_v="clamp", nearest=nearest)
        mesh = quad(Material(base_color=WHITE, texture=image, sampler=sampler), uv=CORNERS)
        drawn = lit(mesh, light=even_light())
        colors = [at(drawn, u, 0.5)[0] for u in np.linspace(0.05, 0.95, 30)]
        between[nearest] = sum(70 < color < 180 for color in colors)
    assert between[True] == 0
    assert between[False] > 3


def test_parts_with_one_image_and_two_samplers_are_drawn_with_their_own():
    image = pixels([[RED] * 16 + [GREEN] * 16])
    uv = CORNERS * [2, 1]
    left, right = (
        quad(
            Material(base_color=WHITE, texture=image, sampler=Sampler(wrap_u=wrap)),
            uv=uv,
            size=0.15,
        )
        for wrap in ("repeat", "clamp")
    )
    left = replace(left, vertices=left.vertices - [0.2, 0, 0])
    right = replace(right, vertices=np.add(right.vertices, [0.2, 0, 0]))
    drawn = lit(joined(left, right), light=even_light())
    row = drawn[80]
    columns = np.flatnonzero(row[:, 3] == 255)
    left_end, right_end = columns[columns < 80], columns[columns > 80]
    # Three quarters of the way the left one repeats red, the right one continues green.
    assert row[left_end[round(0.65 * len(left_end))], :3].argmax() == 0
    assert row[right_end[round(0.65 * len(right_end))], :3].argmax() == 1


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("size", [0.4, 0.01])  # the small one is lit at its vertices
def test_emission_is_added_in_linear_light(textured, size):
    srgb = np.array([90, 60, 120])
    emissive = np.array([0.02, 0.2, 0.3])
    material = Material(
        base_color=(1.0, 1.0, 1.0, 1.0) if textured else (*srgb_to_linear(srgb / 255), 1.0),
        texture=pixels([[srgb] * 8] * 8) if textured else None,
        roughness=1.0,
        emissive=tuple(emissive),
    )
    color = lit(quad(material, uv=CORNERS, size=size), light=even_light())[80, 80, :3]
    expected = shown(0.6 * (srgb_to_linear(srgb / 255) + 0.04) + emissive)
    assert np.abs(color - expected).max() <= 3


@pytest.mark.parametrize("size", [0.4, 0.01])
def test_an_emissive_texture_is_srgb_and_has_coordinates_of_its_own(size):
    """The base texture is upright, and the emissive one is turned by half a turn."""
    dark, light = [40, 40, 40], [150, 150, 150]
    material = Material(
        base_color=WHITE,
        roughness=1.0,
        texture=pixels([[dark] * 8] * 8),
        emissive=(1.0, 0.5, 0.0),
        emissive_texture=pixels([[light] * 8 + [[0, 0, 0]] * 8] * 16),
        emissive_sampler=Sampler(nearest=True),
    )
    mesh = with_look(quad(material, uv=CORNERS, size=size), emissive_uv=1 - CORNERS)
    drawn = lit(mesh, light=even_light())
    base = 0.6 * (srgb_to_linear(np.array(dark) / 255) + 0.04)
    glow = srgb_to_linear(np.array(light) / 255) * [1.0, 0.5, 0.0]
    if size == 0.4:
        assert np.abs(at(drawn, 0.25, 0.5) - shown(base)).max() <= 3
        assert np.abs(at(drawn, 0.75, 0.5) - shown(base + glow)).max() <= 3
    else:
        assert drawn[..., :3].max(axis=(0, 1))[0] > shown(base).max() + 30


def test_strong_emission_is_bright_and_not_clipped():
    colors = [
        lit(quad(Material(base_color=BLACK, emissive=(g, 0.0, 0.0))), light=even_light())[80, 80, 0]
        for g in (0.5, 2.0, 8.0)
    ]
    assert colors[0] < colors[1] < colors[2]


def test_an_emissive_texture_without_coordinates_emits_nothing():
    glow = Material(
        base_color=BLACK, emissive=(1.0, 1.0, 1.0), emissive_texture=pixels([[GREEN] * 2] * 2)
    )
    dark = lit(quad(Material(base_color=BLACK)), light=even_light())
    assert np.array_equal(lit(quad(glow), light=even_light()), dark)


def test_translucent_emission_is_weighted_with_alpha():
    material = Material(
        base_color=(0.0, 0.0, 0.0, 0.5), alpha_mode="BLEND", roughness=1.0, emissive=(0.4, 0.0, 0.0)
    )
    color = lit(quad(material), light=even_light())[80, 80]
    assert abs(int(color[3]) - 128) <= 2
    assert np.abs(color[:3] - shown([0.4 + 0.6 * 0.04, 0.6 * 0.04, 0.6 * 0.04])).max() <= 4


@pytest.mark.parametrize("size", [0.4, 0.01])
def test_an_unlit_surface_shows_its_colour_under_any_light(size):
    texture = pixels([[[200, 120, 40]] * 8] * 8)
    material = Material(base_color=WHITE, texture=texture, unlit=True, emissive=(1.0, 1.0, 1.0))
    mesh = quad(material, uv=CORNERS, size=size)
    for light in (None, even_light()):
        assert np.abs(lit(mesh, light=light)[80, 80, :3].astype(int) - [200, 120, 40]).max() <= 2


def test_vertex_colours_multiply_factor_and_texture():
    factor, texel, vertex = np.array([0.5, 1.0, 0.8]), [200, 100, 250], [128, 255, 60]
    material = Material(base_color=(*factor, 1.0), texture=pixels([[texel] * 4] * 4), roughness=1.0)
    colors = np.tile(np.array([*vertex, 255], np.uint8), (4, 1))
    drawn = lit(with_look(quad(material, uv=CORNERS), colors=colors), light=even_light())
    base = factor * srgb_to_linear(np.array(texel) / 255) * srgb_to_linear(np.array(vertex) / 255)
    assert np.abs(drawn[80, 80, :3] - shown(0.6 * (base + 0.04))).max() <= 3


def test_an_emissive_texture_counts_as_a_texture():
    image = pixels([[RED]])
    assert is_textured(Material(texture=image))
    assert is_textured(Material(emissive=(1.0, 1.0, 1.0), emissive_texture=image))
    assert not is_textured(Material(emissive_texture=image))  # it emits nothing
    assert not is_textured(Material(emissive=(1.0, 1.0, 1.0)))
    assert not is_textured(Material(unlit=True, emissive=(1.0, 1.0, 1.0), emissive_texture=image))
