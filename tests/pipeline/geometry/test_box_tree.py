"""The box tree of triangles, against a comparison with every triangle."""

import numpy as np
import pytest

from pipeline.core.primitives.triangles import pack
from pipeline.geometry.box_tree import LEAF, build_box_tree, triangles_in_box


def random_triangles(random, count, size):
    """Return packed triangles of about `size`, some of them in a far corner of the cube."""
    centers = random.uniform(-0.45, 0.45, (count, 1, 3))
    centers[: count // 3] = 0.4
    return pack(centers + random.uniform(-size, size, (count, 3, 3)))


def in_box(packed, box):
    """Return the triangles whose bounding boxes overlap a box, touching ones included."""
    corners = packed[:, None, :3] + np.stack(
        [np.zeros((len(packed), 3)), packed[:, 3:6], packed[:, 6:9]], axis=1
    )
    low, high = corners.min(axis=1), corners.max(axis=1)
    return np.flatnonzero(((low <= box[3:]) & (high >= box[:3])).all(axis=1))


@pytest.mark.parametrize("count", [1, LEAF, LEAF + 1, 2 * LEAF, 500])
@pytest.mark.parametrize("size", [1e-3, 0.05])
def test_queries_find_the_triangles_that_a_full_comparison_finds(count, size):
    random = np.random.default_rng(count)
    packed = random_triangles(random, count, size)
    tree = build_box_tree(packed)
    boxes = [
        np.concatenate([low, low + random.uniform(0, 0.4, 3)])
        for low in random.uniform(-0.6, 0.5, (40, 3))
    ]
    boxes += [tree.boxes[0], np.array([-1.0, -1, -1, 1, 1, 1]), np.array([0.7, 0, 0, 0.8, 1, 1])]
    total = 0
    for box in boxes:
        found, end = triangles_in_box(tree, box, np.empty(1, np.int32), 0)
        expected = in_box(packed, box)
        assert sorted(found[:end].tolist()) == expected.tolist()
        total += len(expected)
    assert total > count  # the box of all of them, and at least one triangle by its own


def test_a_query_keeps_the_entries_before_it():
    packed = random_triangles(np.random.default_rng(0), 50, 0.05)
    tree = build_box_tree(packed)
    found, end = triangles_in_box(
        tree, np.array([-1.0, -1, -1, 1, 1, 1]), np.array([7, 8, 9], np.int32), 2
    )
    assert found[:2].tolist() == [7, 8]
    assert sorted(found[2:end].tolist()) == list(range(50))


def test_every_node_is_the_box_of_the_two_below_it():
    packed = random_triangles(np.random.default_rng(1), 37, 0.05)
    tree = build_box_tree(packed)
    leaves = len(tree.nodes) // 2
    assert sorted(tree.order[tree.order >= 0].tolist()) == list(range(37))
    for node in range(1, leaves):
        below = tree.nodes[2 * node : 2 * node + 2]
        assert tree.nodes[node, :3].tolist() == below[:, :3].min(axis=0).tolist()
        assert tree.nodes[node, 3:].tolist() == below[:, 3:].max(axis=0).tolist()
    assert tree.nodes[1].tolist() == [
        *tree.boxes[:, :3].min(axis=0).tolist(),
        *tree.boxes[:, 3:].max(axis=0).tolist(),
    ]
