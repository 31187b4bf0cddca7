"""Which sides of each triangle are visible from outside.

Triangles that are visible only in part are cut into pieces.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.primitives.triangles import pack, triangles_cross
from pipeline.geometry.box_tree import triangles_in_box
from pipeline.geometry.flood_fill import FloodFill
from pipeline.geometry.line_of_sight import (
    find_blockers,
    keep_blockers,
    make_scene,
    visible_sides,
    write_sight_box,
)

# Longest edge, in voxels, of a piece that is not cut further: the precision of the seam between a
# visible and a hidden part.
FINEST_VOXELS = 0.5
# Longest edge, in voxels, of a piece that is not cut without being sampled.
COARSEST_VOXELS = 8.0
# Pieces that another triangle passes through are cut down to this size, in voxels.
CROSSED_VOXELS = 2.0
MAX_CUTS = 128  # cuts from a whole triangle to one of its pieces
# Pieces beyond two per triangle. Random triangles that pass through each other would take millions.
MAX_PIECES = 300_000
# A precision is not tried if a part of the triangles suggests more than this times the limit.
MAX_EXPECTED_RATIO = 1.1

# Values beside the codes of `visible_sides` for a piece during the search.
UNDECIDED = -1  # the piece has to be cut
UNKNOWN = -2  # the piece has not been looked at
MIXED = -3  # the piece was cut and its parts are written


@njit(cache=True)
def _find_crossings(packed, faces, tree):
    """List the pairs of triangles that share no vertex and pass through each other.

    Returns int32 [N, 2], each pair in both orders.
    """
    pairs = np.empty((1024, 2), np.int32)
    count = 0
    near = np.empty(1024, np.int32)
    for t in range(len(packed)):
        near, end = triangles_in_box(tree, tree.boxes[t], near, 0)
        for e in range(end):
            s = near[e]
            if s <= t:  # each pair is tested once
                continue
            shared = False
            for p in range(3):
                for q in range(3):
                    shared = shared or faces[s, p] == faces[t, q]
            if shared or not triangles_cross(packed, s, packed, t):
                continue
            # append both orders
            if count + 2 > len(pairs):
                grown = np.empty((2 * len(pairs), 2), np.int32)
                grown[:count] = pairs[:count]
                pairs = grown
            pairs[count, 0], pairs[count, 1] = s, t
            pairs[count + 1, 0], pairs[count + 1, 1] = t, s
            count += 2
    return pairs[:count]


@njit(cache=True)
def _longest_edge(path, depth):
    """Return length and number of the longest edge of piece `path[depth]`.

    Edge e joins the corners e and (e + 1) % 3.
    """
    longest, edge = -1.0, 0
    for e in range(3):
        f = (e + 1) % 3
        length = np.sqrt(
            (path[depth, e, 0] - path[depth, f, 0]) ** 2
            + (path[depth, e, 1] - path[depth, f, 1]) ** 2
            + (path[depth, e, 2] - path[depth, f, 2]) ** 2
        )
        if length > longest:
            longest, edge = length, e
    return longest, edge


@njit(cache=True)
def _write_half(path, depth, second):
    """Write the first or second half of piece `path[depth]` to `path[depth + 1]`.

    A piece is cut at the middle of its longest edge.
    """
    _, e = _longest_edge(path, depth)
    f, g = (e + 1) % 3, (e + 2) % 3
    for k in range(3):
        middle = 0.5 * (path[depth, e, k] + path[depth, f, k])
        path[depth + 1, 0, k] = middle if second else path[depth, e, k]
        path[depth + 1, 1, k] = path[depth, f, k] if second else middle
        path[depth + 1, 2, k] = path[depth, g, k]


@njit(cache=True)
def _is_crossed(path, depth, scene, crossings, first, last, region, own):
    """Return whether a triangle of `crossings[first:last, 1]` passes through piece `path[depth]`.

    `region` [6] is the box of the piece. `own` [1, 16] is overwritten.
    """
    boxes = scene.tree.boxes
    is_packed = False
    for e in range(first, last):
        other = crossings[e, 1]
        # the piece's box, slightly enlarged, must overlap that of the triangle
        apart = False
        for k in range(3):
            margin = 1e-6 * (region[3 + k] - region[k]) + 1e-9
            apart = apart or (
                region[k] - margin > boxes[other, 3 + k] or region[3 + k] + margin < boxes[other, k]
            )
        if apart:
            continue
        if not is_packed:
            own[:] = pack(path[depth : depth + 1])
            is_packed = True
        if triangles_cross(own, 0, scene.packed, other):
            return True
    return False


@njit(cache=True)
def _sides_of_piece(path, depth, scene, t, is_finest, blockers, first, middle, last):
    """Return the code of `visible_sides` for piece `path[depth]` of triangle t, or UNDECIDED.

    Samples at the centre and near the corners must agree. A finest piece has one sample. For the
    last four arguments see `visible_sides`.
    """
    packed = scene.packed
    nx, ny, nz = packed[t, 9], packed[t, 10], packed[t, 11]
    code = UNDECIDED
    for s in range(1 if is_finest else 4):
        wa = 1 / 3 if s == 0 else (0.8 if s == 1 else 0.1)
        wb = 1 / 3 if s == 0 else (0.8 if s == 2 else 0.1)
        wc = 1 - wa - wb
        x = wa * path[depth, 0, 0] + wb * path[depth, 1, 0] + wc * path[depth, 2, 0]
        y = wa * path[depth, 0, 1] + wb * path[depth, 1, 1] + wc * path[depth, 2, 1]
        z = wa * path[depth, 0, 2] + wb * path[depth, 1, 2] + wc * path[depth, 2, 2]
        seen = visible_sides(scene, blockers, first, middle, last, x, y, z, nx, ny, nz)
        if code >= 0 and seen != code:
            return UNDECIDED
        code = seen
    return code


@njit(cache=True)
def _append(pieces, codes, parents, count, path, depth, code, parent):
    """Write `path[depth]` to row `count`.

    Return the arrays, twice as long if they were full, and the new count.
    """
    if count == len(pieces):
        more_pieces = np.empty((2 * count, 3, 3))
        more_codes = np.empty(2 * count, np.uint8)
        more_parents = np.empty(2 * count, np.int32)
        more_pieces[:count], more_codes[:count], more_parents[:count] = pieces, codes, parents
        pieces, codes, parents = more_pieces, more_codes, more_parents
    pieces[count], codes[count], parents[count] = path[depth], code, parent
    return pieces, codes, parents, count + 1


@njit(cache=True)
def _classify_all(scene, crossings, crossing_starts, finest_voxels, most):
    """Cut each triangle depth first into pieces whose samples agree.

    Two halves with the same code are joined again on the way back. The search stops once there are
    more than `most` pieces.

    Returns pieces [P, 3, 3], codes [P], the triangle of each piece [P], and the number of triangles
    that were searched.
    """
    packed, h = scene.packed, scene.h
    pieces = np.empty((2 * len(packed) + 1024, 3, 3))
    codes, parents = np.empty(len(pieces), np.uint8), np.empty(len(pieces), np.int32)
    count = 0
    path = np.empty((MAX_CUTS + 1, 3, 3))  # from the whole triangle to the current piece
    halves = np.empty(MAX_CUTS, np.int64)  # code of the first half of each piece of the path
    # The triangles that can block a line of sight from piece d of the path are
    # blockers[lists[d, 0]:lists[d, 1]] on the side of the normal and blockers[lists[d, 1]:
    # lists[d, 2]] on the other. A piece chooses from those of the piece before it.
    blockers = np.empty(1024, np.int32)
    lists = np.zeros((MAX_CUTS + 1, 3), np.int64)
    sizes = np.empty(MAX_CUTS + 1)  # longest edge of each piece of the path, in voxels
    region, box, own = np.empty(6), np.empty(6), np.empty((1, 16))
    searched = 0
    for t in range(len(packed)):
        if count > most:
            break
        searched += 1
        # the path begins with the whole triangle
        for k in range(3):
            path[0, 0, k] = packed[t, k]
            path[0, 1, k] = packed[t, k] + packed[t, 3 + k]
            path[0, 2, k] = packed[t, k] + packed[t, 6 + k]
        first_crossing, last_crossing = crossing_starts[t], crossing_starts[t + 1]
        depth, result = 0, UNKNOWN
        while True:
            # look at a new piece
            if result == UNKNOWN:
                longest = _longest_edge(path, depth)[0] / h
                is_finest = longest <= finest_voxels
                for k in range(3):
                    a, b, c = path[depth, 0, k], path[depth, 1, k], path[depth, 2, k]
                    region[k], region[3 + k] = min(a, b, c), max(a, b, c)
                end = lists[depth - 1, 2] if depth else 0
                sizes[depth] = longest
                # the exact test is worth its cost once, for the largest pieces that have samples
                exact = longest <= COARSEST_VOXELS and sizes[depth - 1] > COARSEST_VOXELS
                lists[depth, 0] = end
                for side in range(2):
                    sign = 1.0 - 2.0 * side
                    write_sight_box(region, sign, packed, t, h, box)
                    if depth == 0:
                        blockers, end = find_blockers(scene, t, sign, box, blockers, end)
                    else:
                        blockers, end = keep_blockers(
                            scene,
                            box,
                            exact,
                            blockers,
                            lists[depth - 1, side],
                            lists[depth - 1, side + 1],
                            end,
                        )
                    lists[depth, side + 1] = end
                if longest > COARSEST_VOXELS:  # large pieces are cut without a look
                    result = UNDECIDED
                else:
                    # pieces that another triangle passes through are cut without a look, too
                    if longest > max(CROSSED_VOXELS, finest_voxels) and _is_crossed(
                        path, depth, scene, crossings, first_crossing, last_crossing, region, own
                    ):
                        result = UNDECIDED
                    else:
                        result = _sides_of_piece(
                            path,
                            depth,
                            scene,
                            t,
                            is_finest,
                            blockers,
                            lists[depth, 0],
                            lists[depth, 1],
                            lists[depth, 2],
                        )
                # descend into the first half of a piece that has to be cut
                if result == UNDECIDED and depth < MAX_CUTS - 1:
                    halves[depth] = UNKNOWN
                    _write_half(path, depth, False)
                    depth += 1
                    result = UNKNOWN
                    continue
            if depth == 0:
                break
            # return to the piece of which this is a half, and continue with its second half
            depth -= 1
            if halves[depth] == UNKNOWN:
                halves[depth] = result
                _write_half(path, depth, True)
                depth += 1
                result = UNKNOWN
                continue
            # both halves are known: write them if they differ
            if result != halves[depth]:
                for second in range(2):
                    code = result if second else halves[depth]
                    if code >= 0:
                        _write_half(path, depth, second == 1)
                        pieces, codes, parents, count = _append(
                            pieces, codes, parents, count, path, depth + 1, code, t
                        )
                result = MIXED
        # one code for the whole triangle
        if result >= 0:
            pieces, codes, parents, count = _append(
                pieces, codes, parents, count, path, 0, result, t
            )
    return pieces[:count].copy(), codes[:count].copy(), parents[:count].copy(), searched


def classify_triangles(
    packed: NDArray[np.float64], faces: NDArray[np.int32], flood: FloodFill
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int32], float]:
    """Find the sides of each triangle that are visible from outside.

    A triangle whose samples agree stays whole. It is cut where another triangle passes through it
    or where samples disagree, down to FINEST_VOXELS, or coarser if that would give more than
    MAX_PIECES pieces beyond two per triangle.

    Args:
        packed: float64 [T, 16] packed triangles.
        faces: int32 [T, 3] vertex numbers of the same triangles.
        flood: Flood fill of the outside of these triangles.

    Returns:
        pieces: float64 [P, 3, 3] corners of the pieces.
        codes: uint8 [P] HIDDEN, FRONT, BACK or BOTH of `pipeline.geometry.line_of_sight`.
        parents: int32 [P] triangle of which each is a piece.
        seam_voxels: The precision of the cuts, in voxels.
    """
    scene = make_scene(packed, flood)
    pairs = np.unique(_find_crossings(packed, faces, scene.tree), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(packed) + 1))
    finest, most = FINEST_VOXELS, 2 * len(packed) + MAX_PIECES
    areas = np.linalg.norm(np.cross(packed[:, 3:6], packed[:, 6:9]), axis=1)
    while True:
        pieces, codes, parents, searched = _classify_all(scene, pairs, starts, finest, most)
        if len(pieces) <= most or finest >= COARSEST_VOXELS:
            return pieces, codes, parents, finest
        # Seams are lines: twice the size of the pieces halves their number along a seam. The
        # searched share of the area gives an estimate of the number at the next precision.
        seams = len(pieces) * areas.sum() / areas[:searched].sum() - len(packed)
        finest, seams = 2 * finest, seams / 2
        while finest < COARSEST_VOXELS and seams + len(packed) > MAX_EXPECTED_RATIO * most:
            finest, seams = 2 * finest, seams / 2


@njit(cache=True)
def _visible_stretches(scene, vertices, edges, starts, members):
    """Return the stretches [S, 2, 3] of edges beside which at least two faces are visible."""
    h, packed = scene.h, scene.packed
    stretches = np.empty((1024, 2, 3))
    count = 0
    blockers, region, box = np.empty(1024, np.int32), np.empty(6), np.empty(6)
    for e in range(len(edges)):
        # steps of at most two voxels along the edge
        a, b = vertices[edges[e, 0]], vertices[edges[e, 1]]
        along = b - a
        length = np.sqrt((along**2).sum())
        steps = max(1, int(np.ceil(length / (2 * h))))
        extends = False  # whether the last stretch ends where this step begins
        for p in range(steps):
            # count the faces that are visible beside the middle of the step
            middle = a + along * ((p + 0.5) / steps)
            seen = 0
            for f in members[starts[e] : starts[e + 1]]:
                inward = packed[f, 12:15] - a
                inward = inward - along * (np.dot(inward, along) / (length * length))
                height = np.sqrt((inward**2).sum())
                at = middle + inward * min(0.25 * h / height, 0.5)
                nx, ny, nz = packed[f, 9], packed[f, 10], packed[f, 11]
                region[:3], region[3:] = at, at
                write_sight_box(region, 1.0, packed, f, h, box)
                blockers, split = find_blockers(scene, f, 1.0, box, blockers, 0)
                write_sight_box(region, -1.0, packed, f, h, box)
                blockers, last = find_blockers(scene, f, -1.0, box, blockers, split)
                if visible_sides(scene, blockers, 0, split, last, at[0], at[1], at[2], nx, ny, nz):
                    seen += 1
            if seen < 2:
                extends = False
                continue
            # extend the last stretch or begin a new one
            if extends:
                stretches[count - 1, 1] = a + along * ((p + 1) / steps)
                continue
            if count == len(stretches):
                grown = np.empty((2 * len(stretches), 2, 3))
                grown[:count] = stretches
                stretches = grown
            stretches[count, 0] = a + along * (p / steps)
            stretches[count, 1] = a + along * ((p + 1) / steps)
            count += 1
            extends = True
    return stretches[:count].copy()


def visible_edges(
    packed: NDArray[np.float64],
    vertices: NDArray[np.float64],
    edges: NDArray[np.int32],
    starts: NDArray[np.int64],
    members: NDArray[np.int64],
    flood: FloodFill,
) -> NDArray[np.float64]:
    """Return the stretches of edges beside which at least two faces are visible from outside.

    Args:
        packed: float64 [T, 16] packed triangles.
        vertices: float64 [V, 3].
        edges: int32 [E, 2] vertex numbers.
        starts: int64 [E + 1]. The faces of edge e are `members[starts[e]:starts[e + 1]]`.
        members: int64 triangle numbers.
        flood: Flood fill of the outside of these triangles.

    Returns:
        float64 [S, 2, 3] segments.
    """
    return _visible_stretches(make_scene(packed, flood), vertices, edges, starts, members)
