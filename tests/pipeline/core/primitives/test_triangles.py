"""The reference of point-triangle distances, compared with brute force and with the search tree."""

import numpy as np

from pipeline.core.primitives.surface_distance import TriangleTree
from pipeline.core.primitives.triangles import distance2, pack
from pipeline.core.schema import Mesh
from tests.pipeline import known_shapes as geo


def test_distances_are_those_of_brute_force_and_of_the_search_tree():
    random = np.random.default_rng(0)
    vertices = random.uniform(-0.5, 0.5, (60, 3))
    faces = np.arange(60, dtype=np.int32).reshape(-1, 3)
    points = random.uniform(-0.7, 0.7, (300, 3))
    packed = pack(vertices[faces])
    distance = np.sqrt([min(distance2(row, *point) for row in packed) for point in points])
    expected = geo.brute_distance(points, Mesh(vertices=vertices, faces=faces))
    np.testing.assert_allclose(distance, expected, rtol=1e-9, atol=1e-12)
    by_tree, _, _ = TriangleTree(vertices, faces).closest(points)
    np.testing.assert_allclose(by_tree, expected, rtol=1e-9, atol=1e-12)
