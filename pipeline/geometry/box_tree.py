"""A bounding box tree of triangles: which of them are near a box."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

LEAF = 4  # triangles of a leaf
MORTON_BITS = 10  # of each axis


class BoxTree(NamedTuple):
    """A complete binary tree over boxes. Node 1 is the root, nodes 2 n and 2 n + 1 are below n."""

    boxes: NDArray[np.float64]  # [T, 6] lowest and highest corner of each triangle
    nodes: NDArray[np.float64]  # [2 * L, 6] the box of all triangles of each node
    order: NDArray[
        np.int32
    ]  # [L * LEAF] triangles of leaf L + n at LEAF * n, -1 where none is left


def build_box_tree(packed: NDArray[np.float64]) -> BoxTree:
    """Build the tree of packed triangles [T, 16].

    The triangles are sorted along a Morton curve through their centres, so that each node holds
    neighbours.
    """
    a = packed[:, :3]
    corners = np.stack([a, a + packed[:, 3:6], a + packed[:, 6:9]])
    boxes = np.concatenate([corners.min(0), corners.max(0)], axis=1)
    # interleave the bits of the three coordinates of each centre
    centers = (boxes[:, :3] + boxes[:, 3:]) / 2
    places = np.clip((centers + 0.5) * 2**MORTON_BITS, 0, 2**MORTON_BITS - 1).astype(np.int64)
    keys = np.zeros(len(packed), np.int64)
    for bit in range(MORTON_BITS):
        for axis in range(3):
            keys |= (places[:, axis] >> bit & 1) << (3 * bit + axis)
    # fill the leaves, and then the levels above them
    leaves = 1
    while leaves * LEAF < len(packed):
        leaves *= 2
    order = np.full(leaves * LEAF, -1, np.int32)
    order[: len(packed)] = np.argsort(keys, kind="stable")
    nodes = np.full((2 * leaves, 6), np.inf)
    nodes[:, 3:] = -np.inf  # an empty node meets no box
    members = np.full((leaves * LEAF, 6), np.inf)
    members[:, 3:] = -np.inf
    members[: len(packed)] = boxes[order[: len(packed)]]
    level, below, width = leaves, members, LEAF
    while level:
        groups = below.reshape(level, width, 6)
        nodes[level : 2 * level, :3] = groups[..., :3].min(axis=1)
        nodes[level : 2 * level, 3:] = groups[..., 3:].max(axis=1)
        below, width = nodes[level : 2 * level], 2
        level //= 2
    return BoxTree(boxes=boxes, nodes=nodes, order=order)


@njit(cache=True, _nrt=False, forceinline=True)
def boxes_meet(boxes, t, box):
    """Return whether row t of boxes [T, 6] overlaps a box [6]."""
    return (
        boxes[t, 0] <= box[3]
        and boxes[t, 3] >= box[0]
        and boxes[t, 1] <= box[4]
        and boxes[t, 4] >= box[1]
        and boxes[t, 2] <= box[5]
        and boxes[t, 5] >= box[2]
    )


@njit(cache=True)
def triangles_in_box(tree, box, found, end):
    """Append to `found` the triangles whose boxes overlap a box.

    Args:
        tree: See `build_box_tree`.
        box: float64 [6] lowest and highest corner.
        found: int32 array whose first `end` entries are kept.
        end: Number of entries in use.

    Returns:
        The array, a longer copy if it was full, and the new number of entries.
    """
    boxes, nodes, order = tree.boxes, tree.nodes, tree.order
    leaves = len(nodes) // 2
    stack = np.empty(64, np.int64)
    stack[0] = 1
    depth = 1
    while depth > 0:
        depth -= 1
        n = stack[depth]
        if not boxes_meet(nodes, n, box):
            continue
        if n < leaves:
            stack[depth], stack[depth + 1] = 2 * n + 1, 2 * n
            depth += 2
            continue
        if end + LEAF > len(found):  # the call would count references at each leaf
            found = with_room(found, end, LEAF)
        for place in range(LEAF * (n - leaves), LEAF * (n - leaves + 1)):
            t = order[place]
            if t >= 0 and boxes_meet(boxes, t, box):
                found[end] = t
                end += 1
    return found, end


@njit(cache=True)
def with_room(array, used, more):
    """Return an array, or a longer copy of it, with room for `more` entries after `used`."""
    if used + more <= len(array):
        return array
    longer = np.empty(2 * len(array) + more, array.dtype)
    longer[:used] = array[:used]
    return longer
