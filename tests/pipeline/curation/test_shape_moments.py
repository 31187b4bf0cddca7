"""Surface moments against sampled surfaces, and under motions, subdivision and repetition."""

import numpy as np
import pytest

from pipeline.curation.shape_moments import (
    EXPONENTS,
    MOTIONS,
    Motion,
    invariants,
    move_moments,
    surface_moments,
)


def random_triangles(count, seed=0):
    return np.random.default_rng(seed).uniform(-0.475, 0.475, (count, 3, 3))


def test_moments_are_the_means_over_the_surface():
    """Of 100,000 random points of the surface, whose means have an error of about 0.002."""
    triangles = random_triangles(7)
    draw = np.random.default_rng(1)
    area = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
    )
    chosen = triangles[draw.choice(7, 100_000, p=area / area.sum())]
    weights = draw.dirichlet([1, 1, 1], len(chosen))  # uniform over a triangle
    points = 2 * np.einsum("nk,nkd->nd", weights, chosen)
    expected = [np.mean(np.prod(points**exponents, axis=1)) for exponents in EXPONENTS]
    np.testing.assert_allclose(surface_moments(triangles), expected, atol=6e-3)


def test_moments_of_one_triangle_are_exact():
    """The mean of x^4 over the triangle (0, 0), (1, 0), (0, 1) is 2 * 4! / 6! = 1/15."""
    triangle = np.array([[[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]]])  # coordinates are doubled
    moments = dict(zip(EXPONENTS, surface_moments(triangle)))
    assert moments[4, 0, 0] == pytest.approx(1 / 15, abs=1e-12)
    assert moments[1, 0, 0] == pytest.approx(1 / 3, abs=1e-12)
    assert moments[2, 2, 0] == pytest.approx(2 * 4 / 720, abs=1e-12)


def test_subdivision_order_orientation_and_repetition_do_not_matter():
    triangles = random_triangles(20)
    middle = triangles.mean(axis=1, keepdims=True)
    parts = [
        np.concatenate([triangles[:, [a, b]], middle], axis=1) for a, b in ((0, 1), (1, 2), (2, 0))
    ]
    changed = np.concatenate(parts)[::-1, ::-1]
    expected = surface_moments(triangles)
    np.testing.assert_allclose(surface_moments(changed), expected, atol=1e-12)
    twice = np.concatenate([triangles, triangles])
    np.testing.assert_allclose(surface_moments(twice), expected, atol=1e-12)


def test_a_surface_without_area_has_zeros():
    assert not surface_moments(np.zeros((3, 3, 3))).any()
    assert not surface_moments(np.zeros((0, 3, 3))).any()


@pytest.mark.parametrize("motion", MOTIONS, ids=str)
def test_moving_the_moments_moves_the_surface(motion):
    triangles = random_triangles(9)
    moments = surface_moments(triangles)
    moved = surface_moments(motion.apply(triangles))
    np.testing.assert_allclose(move_moments(moments, motion), moved, atol=1e-12)
    np.testing.assert_allclose(move_moments(moved, motion.inverse), moments, atol=1e-12)
    np.testing.assert_allclose(invariants(moved[None]), invariants(moments[None]), atol=1e-12)


def test_a_quarter_turn_takes_the_front_to_the_right():
    """Counterclockwise seen from above: +z is the front and +x is on its right."""
    np.testing.assert_array_equal(
        Motion(False, 1).apply(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])), [[1, 0, 0], [0, 1, 0]]
    )
    assert [motion.kind for motion in MOTIONS[:5]] == [
        *("same_shape", "turned_90", "turned_180", "turned_270", "mirrored")
    ]
