"""Which sides of each triangle are visible from outside.

Triangles that are visible only in part are cut into pieces.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.primitives.triangles import pack, triangles_cross
from pipeline.geometry.flood_fill import FloodFill
from pipeline.geometry.line_of_sight import make_scene, visible_sides

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
def _find_crossings(packed, faces, offsets, triangles):
    """List the pairs of triangles that share no vertex and pass through each other.

    Returns int32 [N, 2], each pair in both orders. A pair that shares several bins comes several
    times.
    """
    pairs = np.empty((1024, 2), np.int32)
    count = 0
    for m in range(len(offsets) - 1):
        # bounding boxes of the bin's triangles
        members = triangles[offsets[m] : offsets[m + 1]]
        low = np.empty((len(members), 3))
        high = np.empty((len(members), 3))
        for e in range(len(members)):
            row = packed[members[e]]
            for k in range(3):
                a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
                low[e, k], high[e, k] = min(a, b, c), max(a, b, c)
        # sweep along x, compare along y and z
        order = np.argsort(low[:, 0])
        for ii in range(len(members)):
            i = order[ii]
            for jj in range(ii + 1, len(members)):
                j = order[jj]
                if low[j, 0] > high[i, 0]:
                    break
                if low[j, 1] > high[i, 1] or low[i, 1] > high[j, 1]:
                    continue
                if low[j, 2] > high[i, 2] or low[i, 2] > high[j, 2]:
                    continue
                # exact test of the triangles
                s, t = members[i], members[j]
                shared = False
                for p in range(3):
                    for q in range(3):
                        shared = shared or faces[s, p] == faces[t, q]
                if shared or not triangles_cross(packed[s], packed[t]):
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
def _longest_edge(piece):
    """Return length and number of the longest edge. Edge e joins the corners e and (e + 1) % 3."""
    longest, edge = -1.0, 0
    for e in range(3):
        f = (e + 1) % 3
        length = np.sqrt(
            (piece[e, 0] - piece[f, 0]) ** 2
            + (piece[e, 1] - piece[f, 1]) ** 2
            + (piece[e, 2] - piece[f, 2]) ** 2
        )
        if length > longest:
            longest, edge = length, e
    return longest, edge


@njit(cache=True)
def _write_half(piece, second, half):
    """Write the first or second half of a piece, cut at the middle of its longest edge."""
    _, e = _longest_edge(piece)
    f, g = (e + 1) % 3, (e + 2) % 3
    for k in range(3):
        middle = 0.5 * (piece[e, k] + piece[f, k])
        half[0, k] = middle if second else piece[e, k]
        half[1, k] = piece[f, k] if second else middle
        half[2, k] = piece[g, k]


@njit(cache=True)
def _boxes_meet(piece, box):
    """Return whether the slightly enlarged box of a piece [3, 3] overlaps a box [6]."""
    for k in range(3):
        a, b, c = piece[0, k], piece[1, k], piece[2, k]
        low, high = min(a, b, c), max(a, b, c)
        margin = 1e-6 * (high - low) + 1e-9
        if low - margin > box[3 + k] or high + margin < box[k]:
            return False
    return True


@njit(cache=True)
def _sides_of_piece(piece, scene, t, crossings, finest_voxels):
    """Return the code of `visible_sides` for a piece of triangle t, or UNDECIDED."""
    # large pieces are cut without a look
    longest = _longest_edge(piece)[0] / scene.h
    if longest > COARSEST_VOXELS:
        return UNDECIDED
    # and so are pieces that another triangle passes through
    finest = longest <= finest_voxels
    if longest > max(CROSSED_VOXELS, finest_voxels) and len(crossings):
        own = pack(piece.reshape(1, 3, 3))[0]
        for e in range(len(crossings)):
            other = crossings[e, 1]
            if _boxes_meet(piece, scene.boxes[other]) and triangles_cross(own, scene.packed[other]):
                return UNDECIDED
    # samples at the centre and near the corners must agree; a finest piece has one sample
    row = scene.packed[t]
    code = UNDECIDED
    for s in range(1 if finest else 4):
        wa = 1 / 3 if s == 0 else (0.8 if s == 1 else 0.1)
        wb = 1 / 3 if s == 0 else (0.8 if s == 2 else 0.1)
        wc = 1 - wa - wb
        x = wa * piece[0, 0] + wb * piece[1, 0] + wc * piece[2, 0]
        y = wa * piece[0, 1] + wb * piece[1, 1] + wc * piece[2, 1]
        z = wa * piece[0, 2] + wb * piece[1, 2] + wc * piece[2, 2]
        seen = visible_sides(scene, x, y, z, row[9], row[10], row[11])
        if code >= 0 and seen != code:
            return UNDECIDED
        code = seen
    return code


@njit(cache=True)
def _append(pieces, codes, parents, count, piece, code, parent):
    """Write row `count`. Return the arrays, twice as long if they were full, and the new count."""
    if count == len(pieces):
        more_pieces = np.empty((2 * count, 3, 3))
        more_codes = np.empty(2 * count, np.uint8)
        more_parents = np.empty(2 * count, np.int32)
        more_pieces[:count], more_codes[:count], more_parents[:count] = pieces, codes, parents
        pieces, codes, parents = more_pieces, more_codes, more_parents
    pieces[count], codes[count], parents[count] = piece, code, parent
    return pieces, codes, parents, count + 1


@njit(cache=True)
def _classify_all(scene, crossings, crossing_starts, finest_voxels, most):
    """Cut each triangle depth first into pieces whose samples agree.

    Two halves with the same code are joined again on the way back. The search stops once there are
    more than `most` pieces.

    Returns pieces [P, 3, 3], codes [P], the triangle of each piece [P], and the number of triangles
    that were searched.
    """
    packed = scene.packed
    pieces = np.empty((2 * len(packed) + 1024, 3, 3))
    codes, parents = np.empty(len(pieces), np.uint8), np.empty(len(pieces), np.int32)
    count = 0
    path = np.empty((MAX_CUTS, 3, 3))  # from the whole triangle to the current piece
    first = np.empty(MAX_CUTS, np.int64)  # code of the first half of each piece of the path
    half = np.empty((3, 3))
    searched = 0
    for t in range(len(packed)):
        if count > most:
            break
        searched += 1
        # the path begins with the whole triangle
        row = packed[t]
        for k in range(3):
            path[0, 0, k] = row[k]
            path[0, 1, k] = row[k] + row[3 + k]
            path[0, 2, k] = row[k] + row[6 + k]
        own_crossings = crossings[crossing_starts[t] : crossing_starts[t + 1]]
        depth, result = 0, UNKNOWN
        while True:
            # look at a new piece, and descend into its first half if it has to be cut
            if result == UNKNOWN:
                result = _sides_of_piece(path[depth], scene, t, own_crossings, finest_voxels)
                if result == UNDECIDED and depth < MAX_CUTS - 1:
                    first[depth] = UNKNOWN
                    _write_half(path[depth], False, path[depth + 1])
                    depth += 1
                    result = UNKNOWN
                    continue
            if depth == 0:
                break
            # return to the piece of which this is a half, and continue with its second half
            depth -= 1
            if first[depth] == UNKNOWN:
                first[depth] = result
                _write_half(path[depth], True, path[depth + 1])
                depth += 1
                result = UNKNOWN
                continue
            # both halves are known: write them if they differ
            if result != first[depth]:
                for second in range(2):
                    code = result if second else first[depth]
                    if code >= 0:
                        _write_half(path[depth], second == 1, half)
                        pieces, codes, parents, count = _append(
                            pieces, codes, parents, count, half, code, t
                        )
                result = MIXED
        # one code for the whole triangle
        if result >= 0:
            pieces, codes, parents, count = _append(
                pieces, codes, parents, count, path[0], result, t
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
    pairs = np.unique(_find_crossings(packed, faces, scene.offsets, scene.triangles), axis=0)
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
    h = scene.h
    stretches = np.empty((1024, 2, 3))
    count = 0
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
                row = scene.packed[f]
                centroid = row[12:15]
                inward = centroid - a
                inward = inward - along * (np.dot(inward, along) / (length * length))
                height = np.sqrt((inward**2).sum())
                at = middle + inward * min(0.25 * h / height, 0.5)
                if visible_sides(scene, at[0], at[1], at[2], row[9], row[10], row[11]):
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
