"""Which sides of each triangle the exterior sees, by exact lines of sight; triangles seen in part are cut up."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.primitives.triangles import pack, triangles_cross
from pipeline.geometry.flood_fill import FloodFill
from pipeline.geometry.line_of_sight import make_scene, visible_sides

FINEST_VOXELS = 0.5  # a cut triangle's edge: the seam of two parts is found this closely
CROSSED_VOXELS = (
    2.0  # a piece that another triangle passes through is sampled at least this densely
)
MIXED = -3  # result of a piece whose parts are written already
MAX_CUTS = 128
MAX_PIECES = (
    300_000  # beyond two a triangle: random triangles through each other would need millions
)
TOO_MANY = 1.1  # times the pieces that are allowed, by what came of a part: not worth a try
COARSEST_VOXELS = 8.0  # samples of an uncut triangle lie no farther apart


@njit(cache=True)
def _crossings(packed, faces, offsets, triangles):
    """Pairs of triangles that share no vertex and pass through each other: (first, second) and its mirror image."""
    pairs = np.empty((1024, 2), np.int32)
    count = 0
    for m in range(len(offsets) - 1):
        members = triangles[offsets[m] : offsets[m + 1]]
        low = np.empty((len(members), 3))
        high = np.empty((len(members), 3))
        for e in range(len(members)):
            row = packed[members[e]]
            for k in range(3):
                a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
                low[e, k], high[e, k] = min(a, b, c), max(a, b, c)
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
                s, t = members[i], members[j]
                shared = False
                for p in range(3):
                    for q in range(3):
                        shared = shared or faces[s, p] == faces[t, q]
                if shared or not triangles_cross(packed[s], packed[t]):
                    continue
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
    """Length and number of a piece's longest edge; edge e runs from corner e to corner (e + 1) % 3."""
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
def _half(piece, second, half):
    """Writes one half of a piece, cut at the middle of its longest edge."""
    _, e = _longest_edge(piece)
    f, g = (e + 1) % 3, (e + 2) % 3
    for k in range(3):
        middle = 0.5 * (piece[e, k] + piece[f, k])
        half[0, k] = middle if second else piece[e, k]
        half[1, k] = piece[f, k] if second else middle
        half[2, k] = piece[g, k]


@njit(cache=True)
def _boxes_meet(piece, box):
    """Whether a piece's box, a little larger than it is, and a triangle's box overlap."""
    for k in range(3):
        a, b, c = piece[0, k], piece[1, k], piece[2, k]
        low, high = min(a, b, c), max(a, b, c)
        margin = 1e-6 * (high - low) + 1e-9
        if low - margin > box[3 + k] or high + margin < box[k]:
            return False
    return True


@njit(cache=True)
def _code_of(piece, scene, t, cross, finest_voxels):
    """The sides a piece of triangle t is seen from, or -1 if it has to be cut to tell."""
    longest = _longest_edge(piece)[0] / scene.h
    if longest > COARSEST_VOXELS:
        return -1
    finest = longest <= finest_voxels
    if longest > max(CROSSED_VOXELS, finest_voxels) and len(cross):
        own = pack(piece.reshape(1, 3, 3))[0]
        for e in range(len(cross)):
            if _boxes_meet(piece, scene.boxes[cross[e, 1]]) and triangles_cross(
                own, scene.packed[cross[e, 1]]
            ):
                return -1
    row = scene.packed[t]
    code = -1
    for s in range(1 if finest else 4):
        wa = 1 / 3 if s == 0 else (0.8 if s == 1 else 0.1)
        wb = 1 / 3 if s == 0 else (0.8 if s == 2 else 0.1)
        wc = 1 - wa - wb
        seen = visible_sides(
            scene,
            wa * piece[0, 0] + wb * piece[1, 0] + wc * piece[2, 0],
            wa * piece[0, 1] + wb * piece[1, 1] + wc * piece[2, 1],
            wa * piece[0, 2] + wb * piece[1, 2] + wc * piece[2, 2],
            row[9], row[10], row[11],
        )  # fmt: skip
        if code >= 0 and seen != code:
            return -1
        code = seen
    return code


@njit(cache=True)
def _classify_all(scene, cross, cross_starts, finest_voxels, most):
    """Bisects each triangle depth first; halves that turn out alike are joined again on the way back.

    Gives up, returning what it has, once there are more than `most` pieces. Last of all returns how many triangles
    it took.
    """
    packed = scene.packed
    out = np.empty((2 * len(packed) + 1024, 3, 3))
    codes, parents = np.empty(len(out), np.uint8), np.empty(len(out), np.int32)
    count = 0
    frames = np.empty((MAX_CUTS, 3, 3))  # the path from the whole triangle to the current piece
    first = np.empty(MAX_CUTS, np.int64)  # code of a piece's first half, -2 before it is known
    half = np.empty((3, 3))
    taken = 0
    for t in range(len(packed)):
        if count > most:
            break
        taken += 1
        row = packed[t]
        for k in range(3):
            frames[0, 0, k], frames[0, 1, k], frames[0, 2, k] = (
                row[k],
                row[k] + row[3 + k],
                row[k] + row[6 + k],
            )
        mine = cross[cross_starts[t] : cross_starts[t + 1]]
        depth, result = 0, -2
        while True:
            if result == -2:  # a new piece
                result = _code_of(frames[depth], scene, t, mine, finest_voxels)
                if result == -1 and depth < MAX_CUTS - 1:
                    first[depth] = -2
                    _half(frames[depth], False, frames[depth + 1])
                    depth += 1
                    result = -2
                    continue
            if depth == 0:
                break
            depth -= 1  # hand the result to the piece it is a half of
            if first[depth] == -2:
                first[depth] = result
                _half(frames[depth], True, frames[depth + 1])
                depth += 1
                result = -2
                continue
            if result != first[depth]:
                for second in range(2):
                    code = result if second else first[depth]
                    if code >= 0:
                        _half(frames[depth], second == 1, half)
                        if count == len(out):
                            more_out = np.empty((2 * count, 3, 3))
                            more_codes, more_parents = (
                                np.empty(2 * count, np.uint8),
                                np.empty(2 * count, np.int32),
                            )
                            more_out[:count], more_codes[:count], more_parents[:count] = (
                                out,
                                codes,
                                parents,
                            )
                            out, codes, parents = more_out, more_codes, more_parents
                        out[count], codes[count], parents[count] = half, code, t
                        count += 1
                result = MIXED
        if result >= 0:
            if count == len(out):
                more_out = np.empty((2 * count, 3, 3))
                more_codes, more_parents = (
                    np.empty(2 * count, np.uint8),
                    np.empty(2 * count, np.int32),
                )
                more_out[:count], more_codes[:count], more_parents[:count] = out, codes, parents
                out, codes, parents = more_out, more_codes, more_parents
            out[count], codes[count], parents[count] = frames[0], result, t
            count += 1
    return out[:count].copy(), codes[:count].copy(), parents[:count].copy(), taken


def classify_triangles(
    packed: NDArray[np.float64], faces: NDArray[np.int32], flood: FloodFill
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int32], float]:
    """Pieces [P, 3, 3] of the triangles, the sides each is seen from [P], the triangle it is cut from [P],
    and the voxels to which it was cut.

    A triangle that is seen alike everywhere stays whole. Only where another triangle passes through, or where samples
    disagree, is it cut, down to FINEST_VOXELS, or coarser where that would take more than MAX_PIECES pieces.
    """
    scene = make_scene(packed, flood)
    pairs = np.unique(_crossings(packed, faces, scene.offsets, scene.triangles), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(packed) + 1))
    finest, most = FINEST_VOXELS, 2 * len(packed) + MAX_PIECES
    areas = np.linalg.norm(np.cross(packed[:, 3:6], packed[:, 6:9]), axis=1)
    while True:
        pieces, codes, parents, taken = _classify_all(scene, pairs, starts, finest, most)
        if len(pieces) <= most or finest >= COARSEST_VOXELS:
            return pieces, codes, parents, finest
        # Seams are lines: at best half as many pieces along them at twice the voxels.
        seams = len(pieces) * areas.sum() / areas[:taken].sum() - len(packed)
        finest, seams = 2 * finest, seams / 2
        while finest < COARSEST_VOXELS and seams + len(packed) > TOO_MANY * most:
            finest, seams = 2 * finest, seams / 2


@njit(cache=True)
def _visible_pieces(scene, vertices, edges, starts, members):
    """Of each edge the runs of pieces, at most two voxels long, beside which two faces are seen."""
    h = scene.h
    out = np.empty((1024, 2, 3))
    count = 0
    for e in range(len(edges)):
        a, b = vertices[edges[e, 0]], vertices[edges[e, 1]]
        along = b - a
        length = np.sqrt((along**2).sum())
        pieces = max(1, int(np.ceil(length / (2 * h))))
        open_run = False
        for p in range(pieces):
            middle = a + along * ((p + 0.5) / pieces)
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
                open_run = False
                continue
            if open_run:
                out[count - 1, 1] = a + along * ((p + 1) / pieces)
                continue
            if count == len(out):
                grown = np.empty((2 * len(out), 2, 3))
                grown[:count] = out
                out = grown
            out[count, 0], out[count, 1] = a + along * (p / pieces), a + along * ((p + 1) / pieces)
            count += 1
            open_run = True
    return out[:count].copy()


def visible_edges(
    packed: NDArray[np.float64], vertices: NDArray[np.float64], edges: NDArray[np.int32],
    starts: NDArray[np.int64], members: NDArray[np.int64], flood: FloodFill,
) -> NDArray[np.float64]:  # fmt: skip
    """Segments [S, 2, 3]: the stretches of edges [E, 2] where at least two of the edge's faces can be seen.

    The faces of edge e are members[starts[e]:starts[e + 1]].
    """
    return _visible_pieces(make_scene(packed, flood), vertices, edges, starts, members)
