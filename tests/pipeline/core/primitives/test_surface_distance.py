"""Surface distances: brute force, and spheres with known distances."""

import numpy as np
import pytest
import torch

from model.inference.extract_mesh import extract_mesh
from pipeline.core.primitives.surface_distance import (
    SampledSurface,
    TriangleTree,
    compare_surfaces,
    sample_surface,
)
from pipeline.core.primitives.voxel_iou import intersection_over_union
from tests.train.analytic_builds import bricks_of, ellipsoid


def sphere(radius, R=64):
    bricks = bricks_of(ellipsoid((0, 0, 0), (radius,) * 3), R)
    return extract_mesh(bricks.cells, bricks.values, R)


def brute_force(points, vertices, faces):
    """Return the distances to the nearest triangle, with least squares for the interiors.

    Triangles may have no area.
    """
    best = np.full(len(points), np.inf)
    for face in faces:
        a, b, c = vertices[face]
        for s, e in ((a, b), (b, c), (c, a)):
            length = ((e - s) ** 2).sum()
            t = np.clip(
                ((points - s) @ (e - s)) / length if length else np.zeros(len(points)), 0, 1
            )
            best = np.minimum(best, np.linalg.norm(points - s - t[:, None] * (e - s), axis=1))
        basis = np.stack([b - a, c - a], 1)
        if np.linalg.matrix_rank(basis) == 2:
            uv = np.linalg.lstsq(basis, (points - a).T, rcond=None)[0]
            inside = (uv >= 0).all(0) & (uv.sum(0) <= 1)
            gap = np.linalg.norm(points - a - (basis @ uv).T, axis=1)
            best = np.where(inside, np.minimum(best, gap), best)
    return best


@pytest.mark.parametrize("count", [1, 3, 4, 5, 61])
def test_closest_is_exact_on_random_triangles(count):
    rng = np.random.default_rng(count)
    vertices, faces = (
        rng.normal(size=(40, 3)),
        rng.integers(0, 40, (count, 3)),
    )  # some faces have no area
    points = rng.normal(size=(1500, 3)) * 2
    distance, triangle, normals = TriangleTree(vertices, faces).closest(points)
    np.testing.assert_allclose(
        distance, brute_force(points, vertices, faces), rtol=1e-9, atol=1e-12
    )
    for n in range(0, 1500, 97):  # the triangle has this distance
        np.testing.assert_allclose(
            brute_force(points[n : n + 1], vertices, faces[triangle[n : n + 1]]), distance[n]
        )
    a, b, c = vertices[faces[triangle]].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    length = np.linalg.norm(cross, axis=1, keepdims=True)
    np.testing.assert_allclose(normals, cross / np.where(length > 0, length, 1), atol=1e-9)


def test_concentric_spheres():
    inner, outer = sphere(0.3), sphere(0.31)
    found = compare_surfaces(*inner, *outer, samples=20_000)
    assert found.accuracy == pytest.approx(
        0.02, rel=0.02
    )  # twice the difference of radii: the frame is [-1, 1]^3
    assert found.completeness == pytest.approx(0.02, rel=0.02)
    assert found.chamfer == pytest.approx(0.02, rel=0.02)
    assert found.f1 == {0.01: 0.0, 0.005: 0.0, 0.001: 0.0}
    assert found.normal_consistency > 0.995


def test_a_surface_has_distance_zero_from_itself():
    found = compare_surfaces(*sphere(0.3), *sphere(0.3), samples=5_000)
    assert found.chamfer < 1e-9
    assert found.f1 == {0.01: 1.0, 0.005: 1.0, 0.001: 1.0}
    assert found.normal_consistency == pytest.approx(1.0)


def test_f1_counts_both_ways():
    """A second sphere far away in the reconstruction reduces only the precision."""
    vertices, faces = sphere(0.2)
    both = (
        np.concatenate([vertices, vertices + 5.0]),
        np.concatenate([faces, faces + len(vertices)]),
    )
    found = compare_surfaces(*both, vertices, faces, samples=40_000)
    assert found.completeness < 1e-9 < 1.0 < found.accuracy
    assert found.f1[0.005] == pytest.approx(2 * 0.5 * 1 / 1.5, abs=0.01)


def test_samples_are_uniform_by_area():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 0, 3]], float)
    faces = np.array([[0, 1, 2], [3, 4, 5]])  # areas 0.5 and 4.5
    points, normals, _ = sample_surface(vertices, faces, 20_000, seed=0)
    first = points[:, 0] <= 1
    assert first.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_allclose(points[first].mean(0), [1 / 3, 1 / 3, 0], atol=0.02)
    np.testing.assert_allclose(normals[first], [[0, 0, 1]] * first.sum())


def test_an_empty_reconstruction_is_infinitely_far():
    empty = np.zeros((0, 3)), np.zeros((0, 3), int)
    found = compare_surfaces(*empty, *sphere(0.3), samples=10)
    assert found.chamfer == float("inf")
    assert found.f1[0.005] == found.normal_consistency == 0
    with pytest.raises(ValueError, match="to_faces must not be empty"):
        compare_surfaces(*sphere(0.3), *empty)
    with pytest.raises(ValueError, match="faces must not be empty"):
        SampledSurface(*empty)
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        SampledSurface(*sphere(0.3), samples=0)


def test_a_reference_can_be_compared_several_times():
    reference = SampledSurface(*sphere(0.31), samples=20_000, seed=1)
    for radius in (0.3, 0.305):
        once = compare_surfaces(*sphere(radius), *sphere(0.31), samples=20_000)
        assert SampledSurface(*sphere(radius), samples=20_000).compare(reference) == once


def test_iou_of_spheres_is_the_ratio_of_their_volumes():
    small, large = (ellipsoid((0, 0, 0), (r, r, r)) for r in (0.24, 0.3))
    axis = torch.linspace(-0.5, 0.5, 48, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).numpy()
    a, b = (torch.from_numpy(field(points) < 0).reshape(-1, 512) for field in (small, large))
    none = torch.zeros_like(a)
    assert intersection_over_union(a, b).dtype == torch.float64
    assert intersection_over_union(a, b).item() == pytest.approx((0.24 / 0.3) ** 3, rel=0.03)
    assert intersection_over_union(a, b) == intersection_over_union(b, a)
    assert intersection_over_union(a, b) == intersection_over_union(a.numpy(), b.numpy())
    assert intersection_over_union(none, none) == 1
    assert intersection_over_union(none, a) == 0
