"""Triangulation: areas by the shoelace formula, orientation, and what is left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Geometry
from pipeline.mesh_io.triangulate import triangulate

U_SHAPE = [(0, 0), (3, 0), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)]
SQUARE = [(0, 0), (4, 0), (4, 4), (0, 4)]
HOLE = [(1, 1), (1, 2), (2, 2), (2, 1)]
PENTAGRAM = [(np.cos(4 * np.pi * k / 5), np.sin(4 * np.pi * k / 5)) for k in range(5)]


def polygon(*contours, plane=None) -> Geometry:
    """A geometry of one polygon. `plane` [2, 3] maps the plane to space."""
    plane = np.array([[1, 0, 0], [0, 1, 0]]) if plane is None else plane
    points = np.concatenate([np.asarray(contour, dtype=np.float64) for contour in contours])
    starts = np.cumsum([0] + [len(contour) for contour in contours])
    return Geometry(
        positions=points @ plane,
        corners=np.arange(len(points)),
        contours=starts,
        polygons=np.array([0, len(contours)]),
    )


def codes(warnings: WarningLog) -> dict[str, int]:
    return {warning.code: warning.count for warning in warnings.items()}


def normals_of(geometry: Geometry, warnings: WarningLog) -> np.ndarray:
    """Area vectors [F, 3] of the triangles."""
    triangles, owner = triangulate(geometry, warnings)
    assert (owner == 0).all()
    a, b, c = (geometry.positions[geometry.corners[triangles[:, k]]] for k in range(3))
    return np.cross(b - a, c - a) / 2


@pytest.mark.parametrize(
    ("contours", "area"),
    [
        ([U_SHAPE], 7.0),
        ([U_SHAPE[::-1]], -7.0),
        ([SQUARE], 16.0),
        ([SQUARE, HOLE], 15.0),
        ([SQUARE, HOLE[::-1]], 15.0),
        ([SQUARE[::-1], HOLE], -15.0),
        ([SQUARE, HOLE, [(3, 3), (3, 3.5), (3.5, 3)]], 14.875),
        ([[(0, 0), (4, 0), (1, 1), (0, 4)]], 4.0),  # a concave quad
        ([[(1, 1), (0, 4), (0, 0), (4, 0)]], 4.0),  # the same from its reflex corner
        ([[(4, 0), (1, 1), (0, 4), (0, 0)]], 4.0),
        ([[(0, 0), (1, 0), (2, 0), (2, 2), (0, 2)]], 4.0),  # a straight corner
    ],
)
def test_area_and_orientation_are_those_of_the_polygon(contours, area):
    warnings = WarningLog()
    normals = normals_of(polygon(*contours), warnings)
    assert np.abs(normals[:, 2]).sum() == pytest.approx(abs(area))
    assert normals[:, 2].sum() == pytest.approx(area)
    assert codes(warnings) == {}


@given(st.randoms(use_true_random=False), st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_star_shaped_polygons_in_any_plane(random, size):
    angles = np.sort([random.uniform(0, 2 * np.pi) for _ in range(size)])
    if np.diff(np.append(angles, angles[0] + 2 * np.pi)).max() > np.pi - 0.1:
        return  # the centre would lie outside
    radii = [random.uniform(0.2, 2.0) for _ in range(size)]
    outline = [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
    shoelace = sum(
        x0 * y1 - x1 * y0
        for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True)
    )
    seed = random.randrange(1 << 30)
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    warnings = WarningLog()
    normals = normals_of(polygon(outline, plane=axes[:2]), warnings)
    assert np.linalg.norm(normals, axis=1).sum() == pytest.approx(shoelace / 2, rel=1e-6)
    expected = np.cross(axes[0], axes[1]) * shoelace / 2
    np.testing.assert_allclose(normals.sum(axis=0), expected, atol=1e-9)
    assert codes(warnings) == {}


def test_an_outline_that_crosses_itself_is_reported():
    warnings = WarningLog()
    normals_of(polygon([(0, 0), (2, 2), (2, 0), (0, 2)]), warnings)
    normals_of(polygon(PENTAGRAM), warnings)
    assert codes(warnings)["polygon_not_simple"] >= 1


@pytest.mark.parametrize(
    "corners",
    [
        # Far from planar: in the plane of its area vector, the last corner lies on an edge.
        [(-5, 0, 5), (5, 0, 5), (5, 0, -5), (-5, 0, -5), (0, 5, -5)],
        [(0, 0, 0), (2, 2, 0), (2, 0, 0), (0, 3, 0)],  # crosses itself
    ],
)
def test_a_polygon_that_cannot_be_divided_keeps_its_edges(corners):
    """Otherwise a gap opens between it and its neighbours."""
    size = len(corners)
    geometry = Geometry(
        positions=np.array(corners, dtype=np.float64),
        corners=np.arange(size),
        contours=np.array([0, size]),
    )
    warnings = WarningLog()
    triangles, _ = triangulate(geometry, warnings)
    assert len(triangles) == size - 2
    edges = [(int(a), int(b)) for t in triangles for a, b in zip(t, np.roll(t, -1), strict=True)]
    boundary = {edge for edge in edges if edge[::-1] not in edges}
    assert boundary == {(k, (k + 1) % size) for k in range(size)}
    assert codes(warnings) == {"polygon_not_simple": 1}


def test_unusable_polygons_cost_only_themselves():
    geometry = Geometry(
        positions=np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]),
        corners=np.array([0, 1, 2, 3, 0, 1, 0, 1, 9, 0, -1, 2, 0, 2, 3]),
        contours=np.array([0, 4, 6, 9, 12, 15]),
    )
    warnings = WarningLog()
    triangles, owner = triangulate(geometry, warnings)
    assert owner.tolist() == [0, 0, 4]
    assert geometry.corners[triangles].tolist() == [[0, 1, 2], [0, 2, 3], [0, 2, 3]]
    assert codes(warnings) == {"degenerate_polygon": 1, "index_out_of_range": 2}


def test_many_polygons_of_mixed_sizes_stay_in_order():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 7, 200)
    angles = [np.sort(rng.uniform(0, 2 * np.pi, size)) for size in sizes]
    points = [
        np.stack([np.cos(a), np.sin(a), np.full(len(a), k)], axis=1) for k, a in enumerate(angles)
    ]
    geometry = Geometry(
        positions=np.concatenate(points),
        corners=np.arange(sizes.sum()),
        contours=np.concatenate([[0], np.cumsum(sizes)]),
    )
    triangles, owner = triangulate(geometry, WarningLog())
    np.testing.assert_array_equal(owner, np.repeat(np.arange(200), sizes - 2))
    np.testing.assert_array_equal(geometry.positions[triangles[:, 0], 2], owner)


@pytest.mark.parametrize("plane", [None, np.array([[1, 0, 0.25], [0, 1, -0.5]])])
def test_a_figure_8_whose_halves_cancel_is_reported(plane):
    """Its area vector is zero, so it was taken for a polygon without area."""
    warnings = WarningLog()
    normals_of(polygon([(0, 0), (1, 1), (1, 0), (0, 1)], plane=plane), warnings)
    assert codes(warnings) == {"polygon_not_simple": 1}


@pytest.mark.parametrize(
    ("outline", "is_reported"),
    [
        ([(0, 0), (0, 0), (1, 1)], True),
        ([(0, 0), (1, 1), (0, 0), (1, 1)], True),
        ([(2, 2)] * 5, True),
        ([(0, 0), (1, 1), (2, 2)], False),  # three corners on a line
        ([(0, 0), (1, 0), (1, 1), (0, 0)], False),  # the first corner is repeated
    ],
)
def test_a_polygon_with_fewer_than_three_distinct_corners_is_reported(outline, is_reported):
    """Only the number of corners was looked at."""
    warnings = WarningLog()
    triangles, _ = triangulate(polygon(outline), warnings)
    assert codes(warnings) == ({"degenerate_polygon": 1} if is_reported else {})
    assert (len(triangles) == 0) == is_reported
