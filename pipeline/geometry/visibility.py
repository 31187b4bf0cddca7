"""Which sides of each triangle are visible from outside.

Triangles that are visible only in part are cut into pieces.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.primitives.triangles import triangles_cross, write_packed
from pipeline.geometry.box_tree import triangles_in_box, with_room
from pipeline.geometry.flood_fill import (
    ALL_REACHED,
    NONE_REACHED,
    SOME_REACHED,
    FloodFill,
)
from pipeline.geometry.line_of_sight import (
    BACK,
    FRONT,
    HIDDEN,
    LINES,
    clear_hints,
    find_blockers,
    keep_blockers,
    make_field,
    make_scene,
    side_state,
    visible_sides,
    write_high_box,
    write_sight_box,
)

# Longest edge, in voxels, of a piece that is not cut further: the precision of the seam between a
# visible and a hidden part.
FINEST_VOXELS = 0.5
# Longest edge, in voxels, of a piece that is not cut without being sampled.
COARSEST_VOXELS = 8.0
# Pieces that another triangle passes through are cut down to this size, in voxels.
CROSSED_VOXELS = 2.0
# A list of blockers is chosen anew when a piece is half as long as the one that chose it, and a
# quarter as long if more than this share of the longer list was kept.
KEPT_SHARE = 0.75
# The exact test of blockers ends for a triangle if it has kept more than so many and has excluded
# less than this share of them.
MIN_EXACT_TESTS = 256
EXCLUDED_SHARE = 0.25
MAX_CUTS = 128  # cuts from a whole triangle to one of its pieces
# Pieces beyond two per triangle. Random triangles that pass through each other would take millions.
MAX_PIECES = 300_000
# A precision is not tried if a part of the triangles suggests more than this times the limit.
MAX_EXPECTED_RATIO = 1.1

# The precisions that are searched at once, in voxels, finest first.
PRECISIONS = FINEST_VOXELS * 2.0 ** np.arange(round(np.log2(COARSEST_VOXELS / FINEST_VOXELS)) + 1)

# Values beside the codes of `visible_sides` for a piece during the search.
UNDECIDED = -1  # the piece has to be cut
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


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False)
def _is_crossed(path, depth, packed, boxes, crossings, first, last, region, own):
    """Return whether a triangle of `crossings[first:last, 1]` passes through piece `path[depth]`.

    `packed` [T, 16] and `boxes` [T, 6] are those of all triangles, and `region` [6] is the box of
    the piece. `own` [1, 16] is overwritten.
    """
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
            write_packed(path, depth, own, 0)
            is_packed = True
        if triangles_cross(own, 0, packed, other):
            return True
    return False


@njit(cache=True, _nrt=False, forceinline=True)
def _sides_of_piece(path, depth, field, t, samples, blockers, lists, open_sides, hints):
    """Look at piece `path[depth]` of triangle t from its centre and from near its corners.

    The search stops at the first of 1 to 4 samples that differs from the centre. `lists` are
    `first`, `middle` and `last` of `visible_sides`, which explains the other arguments.

    Returns the code of the centre, and the code of all samples or UNDECIDED.
    """
    packed = field[0]
    normal = packed[t, 9], packed[t, 10], packed[t, 11]
    first, middle, last = lists
    centre = UNDECIDED
    for s in range(samples):
        wa = 1 / 3 if s == 0 else (0.8 if s == 1 else 0.1)
        wb = 1 / 3 if s == 0 else (0.8 if s == 2 else 0.1)
        wc = 1 - wa - wb
        x = wa * path[depth, 0, 0] + wb * path[depth, 1, 0] + wc * path[depth, 2, 0]
        y = wa * path[depth, 0, 1] + wb * path[depth, 1, 1] + wc * path[depth, 2, 1]
        z = wa * path[depth, 0, 2] + wb * path[depth, 1, 2] + wc * path[depth, 2, 2]
        point = x, y, z
        seen = visible_sides(field, blockers, first, middle, last, open_sides, point, normal, hints)
        if s == 0:
            centre = seen
        elif seen != centre:
            return centre, UNDECIDED
    return centre, centre


@njit(cache=True, _nrt=False, forceinline=True)
def _known_sides(front, back):
    """Return the visible sides of a piece if they are known without samples, else UNDECIDED.

    The states `front` and `back` are NONE_REACHED if no line of sight on the side ends outside,
    ALL_REACHED if each sample has more than ENOUGH free lines there, and SOME_REACHED if samples
    have to tell. Returns also the sides on which a line can end outside.
    """
    known, open_sides = True, HIDDEN
    for side in range(2):
        state = back if side else front
        if state != NONE_REACHED:
            open_sides |= BACK if side else FRONT
            known = known and state == ALL_REACHED
    return (open_sides if known else UNDECIDED), open_sides


@njit(cache=True)
def _start_lists(scene, t, region, box, longest, blockers, lists, states):
    """Write the states of triangle t to `states[0]`, and its blockers if its pieces need them.

    A triangle that is small enough for samples needs no list until it is cut. `region` is the box
    of the triangle, `longest` its longest edge in voxels, and `box` is overwritten. Returns
    `blockers` or a longer array.
    """
    for side in range(2):
        write_sight_box(region, 1.0 - 2.0 * side, scene.packed, t, scene.h, box)
        is_open = side_state(scene, box) != NONE_REACHED
        states[0, side] = SOME_REACHED if is_open else NONE_REACHED
    lists[0] = -1
    if longest > COARSEST_VOXELS:
        blockers = _list_blockers(scene, t, region, box, blockers, lists, states)
    return blockers


@njit(cache=True)
def _list_blockers(scene, t, region, box, blockers, lists, states):
    """List the triangles that can block a line from triangle t on the sides that are not hidden.

    Writes to `lists[0]` and `states[0]`. For the arguments and the result see `_start_lists`.
    """
    used = 0
    lists[0, 0] = 0
    for side in range(2):
        if states[0, side] != NONE_REACHED:
            sign = 1.0 - 2.0 * side
            write_sight_box(region, sign, scene.packed, t, scene.h, box)
            blockers, used = find_blockers(scene, t, sign, box, blockers, used)
            if used == lists[0, side]:
                write_high_box(region, sign, scene.packed, t, scene.h, box)
                if side_state(scene, box) == ALL_REACHED:
                    states[0, side] = ALL_REACHED
        lists[0, side + 1] = used
    return blockers


@njit(cache=True)
def _twice_as_long(pieces, codes, parents, levels):
    """Return copies of the arrays of pieces with room for as many pieces again."""
    count = len(pieces)
    more_pieces = np.empty((2 * count, 3, 3))
    more_codes, more_levels = np.empty(2 * count, np.uint8), np.empty(2 * count, np.uint8)
    more_parents = np.empty(2 * count, np.int32)
    more_pieces[:count], more_codes[:count], more_parents[:count] = pieces, codes, parents
    more_levels[:count] = levels
    return more_pieces, more_codes, more_parents, more_levels


@njit(cache=True, _nrt=False)
def _write_piece(pieces, codes, parents, levels, row, path, depth, code, parent, mask):
    """Write `path[depth]`, its code, its triangle and its precisions to a row of the arrays."""
    for corner in range(3):
        for k in range(3):
            pieces[row, corner, k] = path[depth, corner, k]
    codes[row], parents[row], levels[row] = code, parent, mask


@njit(cache=True)
def _classify_some(scene, crossings, crossing_starts, precisions, lowest, first_triangle, most):
    """Cut triangles depth first into pieces whose samples agree, at several precisions at once.

    At each of `precisions[lowest:]`, a piece is cut until its samples agree or its longest edge is
    not longer than the precision. Two halves with the same code are joined again on the way back.
    All precisions share one walk through the pieces, because the samples of a piece do not depend
    on the precision. The search begins with triangle `first_triangle` and stops once there are more
    than `most` pieces of precision `lowest`.

    Returns pieces [P, 3, 3], codes [P], the triangle of each piece [P], the precisions to which
    each belongs as a bit mask [P], and the triangle at which the search stopped.
    """
    packed, outlines, h, field = scene.packed, scene.outlines, scene.h, make_field(scene)
    boxes = scene.tree.boxes
    pieces = np.empty((2 * (len(packed) - first_triangle) + 1024, 3, 3))
    codes, levels = np.empty(len(pieces), np.uint8), np.empty(len(pieces), np.uint8)
    parents = np.empty(len(pieces), np.int32)
    count, own_count = 0, 0
    path = np.empty((MAX_CUTS + 1, 3, 3))  # from the whole triangle to the current piece
    # Per piece of the path and precision: its code, and that of its first half. Piece d is cut at
    # the precisions from `lowest` to `cut_end[d]`, and its second half is current if `second[d]`.
    results = np.empty((MAX_CUTS + 1, len(precisions)), np.int64)
    halves = np.empty((MAX_CUTS + 1, len(precisions)), np.int64)
    cut_end = np.empty(MAX_CUTS + 1, np.int64)
    second = np.zeros(MAX_CUTS + 1, np.bool_)
    # The triangles that can block a line of sight from piece d of the path are
    # blockers[lists[d, 0]:lists[d, 1]] on the side of the normal and blockers[lists[d, 1]:
    # lists[d, 2]] on the other. A piece chooses from those of the piece before it.
    blockers = np.empty(1024, np.int32)
    lists = np.zeros((MAX_CUTS + 1, 3), np.int64)
    states = np.empty((MAX_CUTS + 1, 2), np.int64)  # of both sides, see `_known_sides`
    filtered = np.empty(MAX_CUTS + 1)  # longest edge, in voxels, of the piece that chose the list
    hints = np.empty((2, LINES + 1), np.int32)
    masks = np.empty(4, np.uint8)  # precisions at which a piece has each of the four codes
    region, box, own = np.empty(6), np.empty(6), np.empty((1, 16))
    t = first_triangle
    while t < len(packed) and own_count <= most:
        # the path begins with the whole triangle
        for k in range(3):
            path[0, 0, k] = packed[t, k]
            path[0, 1, k] = packed[t, k] + packed[t, 3 + k]
            path[0, 2, k] = packed[t, k] + packed[t, 6 + k]
        clear_hints(hints)
        all_kept, all_excluded = 0, 0  # triangles near pieces of t by the exact test
        depth, is_new = 0, True
        while True:
            # look at a new piece
            if is_new:
                longest = _longest_edge(path, depth)[0] / h
                levels_end = cut_end[depth - 1] if depth else len(precisions)
                end = lowest
                while end < levels_end and longest > precisions[end]:
                    end += 1
                cut_end[depth] = end
                for k in range(3):
                    a, b, c = path[depth, 0, k], path[depth, 1, k], path[depth, 2, k]
                    region[k], region[3 + k] = min(a, b, c), max(a, b, c)
                # List the blockers, and find the sides on which lines can end outside. The box of
                # all lines changes little from one small piece to the next. A piece more than half
                # as long as the one for which this was done takes it from there.
                if depth == 0:
                    filtered[0] = longest
                    blockers = _start_lists(scene, t, region, box, longest, blockers, lists, states)
                elif end > lowest and (
                    2 * longest <= filtered[depth - 1]
                    or longest <= COARSEST_VOXELS < filtered[depth - 1]
                ):
                    # The exact test is worth its cost once, for the largest pieces with samples,
                    # and only if it excludes triangles.
                    exact = longest <= COARSEST_VOXELS < filtered[
                        depth - 1
                    ] and all_excluded > EXCLUDED_SHARE * (all_kept - MIN_EXACT_TESTS)
                    filtered[depth] = longest
                    used = lists[depth - 1, 2]
                    lists[depth, 0] = used
                    for side in range(2):
                        sign = 1.0 - 2.0 * side
                        write_sight_box(region, sign, packed, t, h, box)
                        state = states[depth - 1, side]
                        if state == SOME_REACHED and side_state(scene, box) == NONE_REACHED:
                            state = NONE_REACHED
                        if state == SOME_REACHED:
                            start, stop = lists[depth - 1, side], lists[depth - 1, side + 1]
                            # the call counts references
                            if used + stop - start > len(blockers):
                                blockers = with_room(blockers, used, stop - start)
                            chosen = used
                            used, excluded = keep_blockers(
                                packed, outlines, box, exact, blockers, start, stop, used
                            )
                            if exact:
                                all_kept += used - chosen
                                all_excluded += excluded
                            if used == lists[depth, side]:
                                write_high_box(region, sign, packed, t, h, box)
                                if side_state(scene, box) == ALL_REACHED:
                                    state = ALL_REACHED
                        lists[depth, side + 1] = used
                        states[depth, side] = state
                    # a list that hardly became shorter is kept for longer
                    before = lists[depth - 1, 2] - lists[depth - 1, 0]
                    if longest <= COARSEST_VOXELS and used - lists[depth, 0] > KEPT_SHARE * before:
                        filtered[depth] = 0.5 * longest
                else:
                    filtered[depth] = filtered[depth - 1]
                    for k in range(3):
                        lists[depth, k] = lists[depth - 1, k]
                    states[depth, 0], states[depth, 1] = states[depth - 1, 0], states[depth - 1, 1]
                # large pieces are cut without a look, and so are those that others pass through
                samples = 4 if end > lowest else 1
                if longest > COARSEST_VOXELS:
                    samples = 0
                elif end > lowest and longest > CROSSED_VOXELS:
                    first_crossing, last_crossing = crossing_starts[t], crossing_starts[t + 1]
                    if _is_crossed(
                        path,
                        depth,
                        packed,
                        boxes,
                        crossings,
                        first_crossing,
                        last_crossing,
                        region,
                        own,
                    ):
                        samples = 1 if end < levels_end else 0
                known, open_sides = _known_sides(states[depth, 0], states[depth, 1])
                centre, agreed = known, known
                if known == UNDECIDED and samples > 0:
                    places = lists[depth, 0], lists[depth, 1], lists[depth, 2]
                    centre, agreed = _sides_of_piece(
                        path, depth, field, t, samples, blockers, places, open_sides, hints
                    )
                    if samples == 1 and end > lowest:
                        agreed = UNDECIDED
                for level in range(lowest, levels_end):
                    results[depth, level] = agreed if level < end else centre
                # descend into the first half of a piece that has to be cut
                if end > lowest and agreed == UNDECIDED and depth < MAX_CUTS - 1:
                    if lists[depth, 0] < 0:
                        blockers = _list_blockers(scene, t, region, box, blockers, lists, states)
                    second[depth] = False
                    _write_half(path, depth, False)
                    depth += 1
                    continue
                is_new = False
            if depth == 0:
                break
            # return to the piece of which this is a half, and continue with its second half
            depth -= 1
            end = cut_end[depth]
            if not second[depth]:
                for level in range(lowest, end):
                    halves[depth, level] = results[depth + 1, level]
                second[depth] = True
                _write_half(path, depth, True)
                depth += 1
                is_new = True
                continue
            # both halves are known: write them at the precisions at which they differ
            if count + 2 * len(masks) > len(pieces):
                pieces, codes, parents, levels = _twice_as_long(pieces, codes, parents, levels)
            for which in range(2):
                masks[:] = 0
                for level in range(lowest, end):
                    code = results[depth + 1, level] if which else halves[depth, level]
                    if results[depth + 1, level] != halves[depth, level] and code >= 0:
                        masks[code] |= 1 << level
                for code in range(4):
                    if masks[code]:
                        _write_half(path, depth, which == 1)
                        mask = masks[code]
                        _write_piece(
                            pieces, codes, parents, levels, count, path, depth + 1, code, t, mask
                        )
                        count += 1
                        own_count += masks[code] >> lowest & 1
            for level in range(lowest, end):
                is_same = results[depth + 1, level] == halves[depth, level]
                results[depth, level] = halves[depth, level] if is_same else MIXED
        # one code for the whole triangle
        masks[:] = 0
        for level in range(lowest, len(precisions)):
            if results[0, level] >= 0:
                masks[results[0, level]] |= 1 << level
        if count + len(masks) > len(pieces):
            pieces, codes, parents, levels = _twice_as_long(pieces, codes, parents, levels)
        for code in range(4):
            if masks[code]:
                mask = masks[code]
                _write_piece(pieces, codes, parents, levels, count, path, 0, code, t, mask)
                count += 1
                own_count += masks[code] >> lowest & 1
        t += 1
    return pieces[:count].copy(), codes[:count].copy(), parents[:count].copy(), levels[:count], t


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
    most = 2 * len(packed) + MAX_PIECES
    areas = np.linalg.norm(np.cross(packed[:, 3:6], packed[:, 6:9]), axis=1)
    # pieces of `level` and of all coarser precisions, of the triangles before `searched`
    pieces, codes = np.empty((0, 3, 3)), np.empty(0, np.uint8)
    parents, levels = np.empty(0, np.int32), np.empty(0, np.uint8)
    level, last_level, searched = 0, len(PRECISIONS) - 1, 0
    while True:
        own = np.flatnonzero(levels >> level & 1)
        limit = most if level < last_level else np.iinfo(np.int64).max
        if len(own) <= limit and searched < len(packed):
            more_pieces, more_codes, more_parents, more_levels, searched = _classify_some(
                scene, pairs, starts, PRECISIONS, level, searched, limit - len(own)
            )
            pieces = np.concatenate([pieces, more_pieces])
            codes = np.concatenate([codes, more_codes])
            parents = np.concatenate([parents, more_parents])
            levels = np.concatenate([levels, more_levels])
            own = np.flatnonzero(levels >> level & 1)
        if len(own) <= limit:
            return pieces[own], codes[own], parents[own], float(PRECISIONS[level])
        # Seams are lines: twice the size of the pieces halves their number along a seam. The
        # share of the area up to the triangle that exceeds the limit gives an estimate of the
        # number at the next precision.
        end = parents[own[most]] + 1
        seams = np.searchsorted(parents[own], end) * areas.sum() / areas[:end].sum() - len(packed)
        level, seams = level + 1, seams / 2
        while level < last_level and seams + len(packed) > MAX_EXPECTED_RATIO * most:
            level, seams = level + 1, seams / 2
        # pieces of finer precisions alone are not needed any more
        needed = levels >> level > 0
        pieces, codes, parents = pieces[needed], codes[needed], parents[needed]
        levels = levels[needed]


@njit(cache=True)
def _visible_stretches(scene, vertices, edges, starts, members):
    """Return the stretches [S, 2, 3] of edges beside which at least two faces are visible."""
    h, packed, field = scene.h, scene.packed, make_field(scene)
    stretches = np.empty((1024, 2, 3))
    count = 0
    blockers, region, box = np.empty(0, np.int32), np.empty(6), np.empty(6)
    hints = np.empty((2, LINES + 1), np.int32)
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
                open_sides = HIDDEN
                write_sight_box(region, 1.0, packed, f, h, box)
                if side_state(scene, box) != NONE_REACHED:
                    open_sides |= FRONT
                write_sight_box(region, -1.0, packed, f, h, box)
                if side_state(scene, box) != NONE_REACHED:
                    open_sides |= BACK
                clear_hints(hints)
                point, normal = (at[0], at[1], at[2]), (nx, ny, nz)
                if visible_sides(field, blockers, -1, -1, -1, open_sides, point, normal, hints):
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
