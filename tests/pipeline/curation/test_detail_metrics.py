"""Bends, colours, separate objects and ground planes of shapes whose values are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.curation.detail_metrics import (
    GRID,
    bend_length,
    coarse_cells,
    colors_seen,
    ground_share,
    largest_object,
)
from pipeline.sources.shapes import closed_solids


def triangles_of(piece, scale=1.0, offset=(0.0, 0.0, 0.0)):
    return piece.vertices[piece.faces] * scale + np.array(offset)


def box(size, offset=(0.0, 0.0, 0.0)):
    """A box by its full sizes and its centre."""
    corners = triangles_of(closed_solids.box(1, 1, 1))
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    return ((corners - low) / (high - low) - 0.5) * np.array(size) + np.array(offset)


def test_a_box_bends_in_its_edges():
    bend, sharp = bend_length(box((0.2, 0.3, 0.5)))
    assert sharp == pytest.approx(4 * (0.2 + 0.3 + 0.5))
    assert bend == pytest.approx(sharp * np.pi / 4)


@pytest.mark.parametrize("rings", [24, 96])
def test_a_sphere_bends_by_4_pi_r_at_every_subdivision(rings):
    sphere = triangles_of(closed_solids.sphere(0.4, rings, rings))
    bend, sharp = bend_length(sphere)
    assert bend == pytest.approx(4 * np.pi * 0.4, rel=0.02)
    assert sharp == 0


def test_flipped_faces_bend_as_much():
    shape = box((0.2, 0.3, 0.5))
    flipped = shape.copy()
    flipped[::2] = flipped[::2, ::-1]
    np.testing.assert_allclose(bend_length(flipped), bend_length(shape))


def test_a_flat_sheet_and_nothing_do_not_bend():
    square = np.array([[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0], [0, 1, 0]]]) / 2
    assert bend_length(square) == (0.0, 0.0)
    assert bend_length(np.zeros((0, 3, 3))) == (0.0, 0.0)


def picture(*colors):
    """A view whose left half is empty, and whose right half has equal stripes of colours."""
    rgba = np.zeros((60, 60, 4), np.uint8)
    for number, color in enumerate(colors):
        rgba[number * 60 // len(colors) : (number + 1) * 60 // len(colors), 30:] = [*color, 255]
    return SimpleNamespace(rgba=rgba)


def test_equal_areas_of_n_colors_count_as_n():
    red, green, blue = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    assert colors_seen([picture(red)]) == pytest.approx(1)
    assert colors_seen([picture(red, green, blue)]) == pytest.approx(3)
    assert colors_seen([picture(red), picture(green), picture(blue)]) == pytest.approx(3)
    assert colors_seen([picture((201, 30, 31)), picture(red)]) == pytest.approx(1)
    assert colors_seen([]) == 0


def test_coarse_cells_are_those_that_random_points_of_the_surface_hit():
    draw = np.random.default_rng(0)
    triangles = draw.uniform(-0.45, 0.45, (6, 3, 3))
    weights = draw.dirichlet([1, 1, 1], 60_000)
    points = np.concatenate([weights @ corners for corners in triangles])
    hit = np.zeros((GRID,) * 3, bool)
    hit[tuple(((points + 0.5) * GRID).astype(int).T)] = True
    cells = coarse_cells(triangles)
    assert not (cells & ~hit).any() or np.count_nonzero(cells & ~hit) < 0.01 * hit.sum()
    assert np.count_nonzero(hit & ~cells) < 0.12 * hit.sum()  # corners of cells that are grazed


def test_objects_apart_are_counted_and_near_ones_are_one():
    cells = coarse_cells(np.concatenate([box((0.2, 0.2, 0.2)), box((0.2, 0.2, 0.2), (0.36, 0, 0))]))
    assert largest_object(cells) == pytest.approx(0.5, abs=0.05)
    near = np.concatenate([box((0.2, 0.2, 0.2)), box((0.2, 0.2, 0.2), (0.22, 0, 0))])
    assert largest_object(coarse_cells(near)) == 1
    assert largest_object(np.zeros((GRID,) * 3, bool)) == 0


def test_a_ground_plane_is_seen_and_a_table_or_a_tile_is_none():
    ground = box((0.9, 0.01, 0.9), (0, -0.4, 0))
    scene = np.concatenate([ground, box((0.2, 0.5, 0.2), (0, -0.1, 0))])
    assert ground_share(coarse_cells(scene)) > 0.7
    table = np.concatenate(
        [box((0.9, 0.05, 0.9), (0, 0.3, 0))]
        + [box((0.05, 0.7, 0.05), (x, -0.05, z)) for x in (-0.4, 0.4) for z in (-0.4, 0.4)]
    )
    assert ground_share(coarse_cells(table)) == 0
    assert ground_share(coarse_cells(ground)) == 0
    assert ground_share(coarse_cells(box((0.5, 0.9, 0.5)))) == 0
    assert ground_share(np.zeros((GRID,) * 3, bool)) == 0
