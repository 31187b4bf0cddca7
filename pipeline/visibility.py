"""Which sides of each triangle the exterior sees, by exact lines of sight; triangles seen in part are cut up."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.exterior import EXTERIOR, Bins, Exterior, state_at
from pipeline.schema import BLOCK, spacing
from pipeline.triangles import pack, segment_hits, triangles_cross

HIDDEN, FRONT, BACK, SHEET = 0, 1, 2, 3  # seen from: nowhere, the normal's side, the other side, both
FINEST_VOXELS = 0.5  # a cut triangle's edge: the seam of two parts is found this closely
COARSEST_VOXELS = 8.0  # samples of an uncut triangle lie no farther apart


@njit(cache=True)
def _sees_exterior(packed, bin_of, offsets, triangles, points, whole, h, x, y, z, nx, ny, nz):
    """Whether some exterior grid point within three voxels on the side of n has a free line of sight to (x, y, z)."""
    x, y, z = x + 1e-3 * h * nx, y + 1e-3 * h * ny, z + 1e-3 * h * nz
    size = len(bin_of)
    for reach in (1.0, 1.6, 2.4):
        i0 = int(np.floor((x + reach * h * nx + 0.5) / h))
        j0 = int(np.floor((y + reach * h * ny + 0.5) / h))
        k0 = int(np.floor((z + reach * h * nz + 0.5) / h))
        for corner in range(8):
            i, j, k = i0 + (corner >> 2), j0 + (corner >> 1 & 1), k0 + (corner & 1)
            if state_at(bin_of, points, whole, i, j, k) != EXTERIOR:
                continue
            qx, qy, qz = i * h - 0.5, j * h - 0.5, k * h - 0.5
            if (qx - x) * nx + (qy - y) * ny + (qz - z) * nz < 0.1 * h:
                continue
            blocked = False
            previous = -1
            # a triangle in the way is within reach of the block at one end of the line or the other
            for end in range(2):
                if end == 0:
                    a, b, c = int((x + 0.5) / h) // BLOCK, int((y + 0.5) / h) // BLOCK, int((z + 0.5) / h) // BLOCK
                else:
                    a, b, c = i // BLOCK, j // BLOCK, k // BLOCK
                if min(a, b, c) < 0 or max(a, b, c) >= size:
                    continue
                m = bin_of[a, b, c]
                if m < 0 or m == previous:
                    continue
                previous = m
                for e in range(offsets[m], offsets[m + 1]):
                    if segment_hits(packed[triangles[e]], x, y, z, qx, qy, qz):
                        blocked = True
                        break
                if blocked:
                    break
            if not blocked:
                return True
    return False


@njit(cache=True)
def sides_seen(packed, bin_of, offsets, triangles, points, whole, h, x, y, z, nx, ny, nz):
    """HIDDEN, FRONT, BACK or SHEET for a point of the surface with unit normal n."""
    code = HIDDEN
    if _sees_exterior(packed, bin_of, offsets, triangles, points, whole, h, x, y, z, nx, ny, nz):
        code |= FRONT
    if _sees_exterior(packed, bin_of, offsets, triangles, points, whole, h, x, y, z, -nx, -ny, -nz):
        code |= BACK
    return code


@njit(cache=True)
def _crossings(packed, faces, use, offsets, triangles):
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
            if not use[members[i]]:
                continue
            for jj in range(ii + 1, len(members)):
                j = order[jj]
                if low[j, 0] > high[i, 0]:
                    break
                if low[j, 1] > high[i, 1] or low[i, 1] > high[j, 1]:
                    continue
                if low[j, 2] > high[i, 2] or low[i, 2] > high[j, 2] or not use[members[j]]:
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
def _classify(packed, t, cross, bin_of, offsets, triangles, points, whole, h, emit, out, codes, count):
    """Walks triangle t cut into pieces that are seen alike: their common code, or -1 and (when asked) the pieces."""
    stack = np.empty((128, 3, 3))
    row = packed[t]
    for k in range(3):
        stack[0, 0, k], stack[0, 1, k], stack[0, 2, k] = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
    depth, common = 1, -2
    while depth > 0:
        depth -= 1
        piece = stack[depth].copy()
        longest, edge = 0.0, 0
        for e in range(3):
            f = (e + 1) % 3
            length = np.sqrt(
                (piece[e, 0] - piece[f, 0]) ** 2 + (piece[e, 1] - piece[f, 1]) ** 2 + (piece[e, 2] - piece[f, 2]) ** 2
            )
            if length > longest:
                longest, edge = length, e
        longest /= h
        split = longest > COARSEST_VOXELS
        if not split and longest > FINEST_VOXELS and len(cross):
            own = pack(piece.reshape(1, 3, 3))[0]
            for e in range(len(cross)):
                if triangles_cross(own, packed[cross[e, 1]]):
                    split = True
                    break
        code = -1
        if not split:
            for s in range(4):
                wa = 1 / 3 if s == 3 else (0.8 if s == 0 else 0.1)
                wb = 1 / 3 if s == 3 else (0.8 if s == 1 else 0.1)
                wc = 1 - wa - wb
                seen = sides_seen(
                    packed, bin_of, offsets, triangles, points, whole, h,
                    wa * piece[0, 0] + wb * piece[1, 0] + wc * piece[2, 0],
                    wa * piece[0, 1] + wb * piece[1, 1] + wc * piece[2, 1],
                    wa * piece[0, 2] + wb * piece[1, 2] + wc * piece[2, 2],
                    row[9], row[10], row[11],
                )  # fmt: skip
                if s == 0 or (s == 3 and longest <= FINEST_VOXELS):
                    code = seen
                elif seen != code and longest > FINEST_VOXELS:
                    split = True
                    break
        if split:
            e, f, g = edge, (edge + 1) % 3, (edge + 2) % 3
            middle = 0.5 * (piece[e] + piece[f])
            stack[depth, 0], stack[depth, 1], stack[depth, 2] = piece[e], middle, piece[g]
            stack[depth + 1, 0], stack[depth + 1, 1], stack[depth + 1, 2] = middle, piece[f], piece[g]
            depth += 2
            continue
        if emit:
            if count >= len(codes):
                return count, out, codes
            out[count], codes[count] = piece, code
            count += 1
        elif common == -2:
            common = code
        elif common != code:
            return -1, out, codes
    return (count if emit else common), out, codes


@njit(cache=True)
def _classify_all(packed, use, cross, cross_starts, bin_of, offsets, triangles, points, whole, h):
    room = 2 * len(packed) + 1024
    out, codes, parents = np.empty((room, 3, 3)), np.empty(room, np.uint8), np.empty(room, np.int32)
    count = 0
    for t in range(len(packed)):
        if not use[t]:
            continue
        mine = cross[cross_starts[t] : cross_starts[t + 1]]
        code, _, _ = _classify(packed, t, mine, bin_of, offsets, triangles, points, whole, h, False, out, codes, 0)
        while True:
            if code >= 0 and count < len(codes):
                row = packed[t]
                for k in range(3):
                    out[count, 0, k], out[count, 1, k], out[count, 2, k] = (
                        row[k],
                        row[k] + row[3 + k],
                        row[k] + row[6 + k],
                    )
                codes[count] = code
                end = count + 1
            else:
                end, _, _ = _classify(
                    packed, t, mine, bin_of, offsets, triangles, points, whole, h, True, out, codes, count
                )
            if end < len(codes):
                break
            more_out, more_codes = np.empty((2 * len(out), 3, 3)), np.empty(2 * len(codes), np.uint8)
            more_parents = np.empty(2 * len(parents), np.int32)
            more_out[:count], more_codes[:count], more_parents[:count] = out[:count], codes[:count], parents[:count]
            out, codes, parents = more_out, more_codes, more_parents
        parents[count:end] = t
        count = end
    return out[:count].copy(), codes[:count].copy(), parents[:count].copy()


def classify_triangles(
    packed: NDArray[np.float64], faces: NDArray[np.int32], use: NDArray[np.bool_], exterior: Exterior
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int32]]:
    """Pieces [P, 3, 3] of the triangles in use, the sides each is seen from [P], and the triangle it is cut from [P].

    A triangle that is seen alike everywhere stays whole. Only where another triangle passes through, or where samples
    disagree, is it cut, down to FINEST_VOXELS.
    """
    bins = exterior.bins
    pairs = np.unique(_crossings(packed, faces, use, bins.offsets, bins.triangles), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(packed) + 1))
    return _classify_all(
        packed, use, pairs, starts, bins.bin_of, bins.offsets, bins.triangles, exterior.points, exterior.blocks,
        spacing(bins.resolution),
    )  # fmt: skip


@njit(cache=True)
def _visible_pieces(packed, vertices, edges, starts, members, bin_of, offsets, triangles, points, whole, h):
    """Of each edge the runs of pieces, at most two voxels long, beside which two faces are seen."""
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
                row = packed[f]
                centroid = row[12:15]
                inward = centroid - a
                inward = inward - along * (np.dot(inward, along) / (length * length))
                height = np.sqrt((inward**2).sum())
                at = middle + inward * min(0.25 * h / height, 0.5)
                if sides_seen(
                    packed, bin_of, offsets, triangles, points, whole, h, at[0], at[1], at[2], row[9], row[10], row[11]
                ):
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
    starts: NDArray[np.int64], members: NDArray[np.int64], exterior: Exterior,
) -> NDArray[np.float64]:  # fmt: skip
    """Segments [S, 2, 3]: the stretches of edges [E, 2] where at least two of the edge's faces can be seen.

    The faces of edge e are members[starts[e]:starts[e + 1]].
    """
    bins: Bins = exterior.bins
    return _visible_pieces(
        packed, vertices, edges, starts, members, bins.bin_of, bins.offsets, bins.triangles, exterior.points,
        exterior.blocks, spacing(bins.resolution),
    )  # fmt: skip
