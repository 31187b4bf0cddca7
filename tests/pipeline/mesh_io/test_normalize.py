"""Normalisation of meshes into the cube."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, Part
from pipeline.mesh_io.config import NormalizeConfig
from pipeline.mesh_io.normalize import normalize

CFG = NormalizeConfig()
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


def triangle(*points) -> Mesh:
    return Mesh(
        vertices=np.array(points, dtype=np.float64), faces=np.array([[0, 1, 2]], dtype=np.int32)
    )


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float64, (3, 3), elements=finite))
def test_the_result_is_centred_with_side_095_and_reversible(points):
    mesh = triangle(*points)
    sides = np.ptp(points, axis=0)
    if sides.max() < 1e-3:
        return
    result = normalize(mesh, CFG)
    low, high = result.vertices.min(axis=0), result.vertices.max(axis=0)
    assert np.abs(result.vertices).max() <= 0.475
    assert (high - low).max() == pytest.approx(0.95, abs=1e-9)
    np.testing.assert_allclose(low, -high, atol=1e-7)
    np.testing.assert_allclose((points - result.center) * result.scale, result.vertices, atol=1e-7)


def test_a_box_has_the_center_and_scale_computed_by_hand():
    result = normalize(triangle([10, 0, 0], [14, 2, 0], [10, 2, 1]), CFG)
    assert result.center == (12.0, 1.0, 0.5)
    assert result.scale == pytest.approx(0.95 / 4)
    np.testing.assert_allclose(result.vertices[1], [0.475, 0.2375, -0.11875])


def test_axes_keep_their_order_and_sign():
    result = normalize(triangle([0, 0, 0], [3, 0, 0], [0, 2, 1]), CFG)
    np.testing.assert_allclose(np.ptp(result.vertices, axis=0), np.array([3, 2, 1]) * 0.95 / 3)
    assert result.vertices[1, 0] > 0 > result.vertices[0, 0]


def test_vertices_without_faces_are_ignored():
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [np.nan, 1e9, np.inf]])
    result = normalize(Mesh(vertices=points, faces=np.array([[0, 1, 2]], dtype=np.int32)), CFG)
    np.testing.assert_allclose(result.vertices[:3], (points[:3] - [0.5, 0.5, 0]) * 0.95)
    assert np.isfinite(result.vertices).all()


def test_parts_and_faces_do_not_change():
    part = Part(vertices=slice(0, 3), faces=slice(0, 1), colors=np.zeros((3, 4), dtype=np.uint8))
    mesh = Mesh(vertices=np.eye(3), faces=np.array([[2, 1, 0]], dtype=np.int32), parts=(part,))
    result = normalize(mesh, CFG)
    assert result.parts == (part,)
    assert result.faces is mesh.faces


def test_center_and_scale_refer_to_the_loaded_frame():
    loaded = triangle([5, 5, 5], [9, 5, 5], [5, 6, 7])
    center = np.array([1.0, 2.0, 3.0])
    scale = 0.5
    given_ = replace(
        loaded, vertices=(loaded.vertices - center) * scale, center=tuple(center), scale=scale
    )
    result = normalize(given_, CFG)
    np.testing.assert_allclose(
        (loaded.vertices - result.center) * result.scale, result.vertices, atol=1e-12
    )
    assert result.center == pytest.approx((7.0, 5.5, 6.0))


@pytest.mark.parametrize(
    "points",
    [[[1, 2, 3]] * 3, [[0, 0, 0], [1, 0, 0], [np.nan] * 3], [[0, 0, 0], [1, 0, 0], [np.inf, 0, 0]]],
    ids=["a point", "nan", "infinite"],
)
def test_a_point_or_an_infinite_box_is_rejected(points):
    with pytest.raises(Reject) as caught:
        normalize(triangle(*points), CFG)
    assert caught.value.reason == "flat_or_infinite"


@pytest.mark.parametrize("size", [1e308, 1e-310])
def test_an_extent_whose_scale_overflows_is_rejected(size):
    with pytest.raises(Reject) as caught:
        normalize(triangle([-size, 0, 0], [size, 0, 0], [0, size, 0]), CFG)
    assert caught.value.reason == "flat_or_infinite"


def test_a_mesh_without_faces_is_rejected():
    with pytest.raises(Reject) as caught:
        normalize(Mesh(vertices=np.eye(3), faces=np.zeros((0, 3), dtype=np.int32)), CFG)
    assert caught.value.reason == "no_faces"


@pytest.mark.parametrize("value", [0.0, -1.0, 0.51, float("nan")])
def test_half_extent_must_fit_the_cube(value):
    with pytest.raises(ValueError, match=r"half_extent must be in \(0, 0.5\]"):
        NormalizeConfig(half_extent=value)
