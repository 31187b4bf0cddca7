"""The search for visible pieces of triangles at several precisions."""

import numpy as np
import pytest

from pipeline.core.grid import spacing
from pipeline.core.primitives.triangles import pack, segment_hits
from pipeline.geometry import visibility
from pipeline.geometry.flood_fill import (
    ALL_REACHED,
    NONE_REACHED,
    SOME_REACHED,
    bin_triangles,
    flood_fill,
    is_reached,
    reached_corners,
    reached_in_box,
)
from pipeline.geometry.line_of_sight import (
    ALL_PLACES,
    BACK,
    BOTH,
    ENOUGH,
    FRONT,
    HIDDEN,
    LINES,
    MIN_SIGHT_RATIO,
    _count_sights,
    blocked_lines,
    clear_hints,
    find_blockers,
    keep_blockers,
    make_field,
    make_scene,
    visible_sides,
    write_sight_box,
)

RESOLUTION = 64


@pytest.fixture(scope="module")
def soup():
    """Return packed triangles, faces and flood fill of triangles that pass through each other."""
    random = np.random.default_rng(3)
    centers = random.uniform(-0.3, 0.3, (24, 1, 3))
    packed = pack(centers + random.uniform(-0.18, 0.18, (24, 3, 3)))
    faces = np.arange(72, dtype=np.int32).reshape(24, 3)
    flood = flood_fill(packed, bin_triangles(packed, RESOLUTION), np.ones(24, np.bool_))
    return packed, faces, flood


def classify_from_scratch(soup, level):
    """Return the pieces of all triangles at one precision, of a search of its own."""
    packed, faces, flood = soup
    scene = make_scene(packed, flood)
    pairs = np.unique(visibility._find_crossings(packed, faces, scene.tree), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(packed) + 1))
    precisions = visibility.PRECISIONS[level : level + 1]
    *found, _, searched = visibility._classify_some(
        scene, pairs, starts, precisions, 0, 0, np.iinfo(np.int64).max
    )
    assert searched == len(packed)
    return found


def test_a_limit_of_pieces_gives_the_pieces_of_a_coarser_precision(soup, monkeypatch):
    sizes = [len(classify_from_scratch(soup, level)[0]) for level in range(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 4 * sizes[-1]
    reached = set()
    for limit in (sizes[0], sizes[0] - 1, sizes[1], sizes[2], sizes[3], 60, 0):
        monkeypatch.setattr(visibility, "MAX_PIECES", limit - 2 * len(soup[0]))
        *found, seam = visibility.classify_triangles(*soup)
        level = visibility.PRECISIONS.tolist().index(seam)
        for got, expected in zip(found, classify_from_scratch(soup, level), strict=True):
            np.testing.assert_array_equal(got, expected)
        reached.add(level)
    assert {0, 4} < reached
    assert len(reached) >= 3


def test_the_coarsest_precision_leaves_no_triangle_out(soup, monkeypatch):
    monkeypatch.setattr(visibility, "MAX_PIECES", -2 * len(soup[0]))
    _, _, parents, seam = visibility.classify_triangles(*soup)
    assert seam == visibility.COARSEST_VOXELS
    assert set(parents.tolist()) == set(range(len(soup[0])))


def test_neither_hints_nor_the_search_in_the_tree_alter_a_result(soup):
    packed, _, flood = soup
    scene, h = make_scene(packed, flood), spacing(RESOLUTION)
    field = make_field(scene)
    random = np.random.default_rng(0)
    kept, cleared = np.empty((2, LINES + 1), np.int32), np.empty((2, LINES + 1), np.int32)
    seen = set()
    for t in range(len(packed)):
        clear_hints(kept)
        for u, v in random.dirichlet([1, 1, 1], 12)[:, :2]:
            at = packed[t, :3] + u * packed[t, 3:6] + v * packed[t, 6:9]
            region, box = np.concatenate([at, at]), np.empty(6)
            write_sight_box(region, 1.0, packed, t, h, box)
            blockers, middle = find_blockers(scene, t, 1.0, box, np.empty(8, np.int32), 0)
            write_sight_box(region, -1.0, packed, t, h, box)
            blockers, last = find_blockers(scene, t, -1.0, box, blockers, middle)
            normal = tuple(packed[t, 9:12])
            clear_hints(cleared)
            sides = [
                visible_sides(field, blockers, *places, BOTH, tuple(at), normal, hints)
                for hints in (kept, cleared)
                for places in ((0, middle, last), (-1, -1, -1))
            ]
            assert len(set(sides)) == 1
            seen.add(sides[0])
    assert len(seen) >= 2


def test_a_shorter_list_keeps_every_triangle_that_enters_the_box(soup):
    packed, _, flood = soup
    outlines, random = make_scene(packed, flood).outlines, np.random.default_rng(6)
    weights = random.dirichlet([1, 1, 1], 2000)
    points = packed[:, None, :3] + weights[:, 1:] @ packed[:, 3:9].reshape(-1, 2, 3)
    entered = left_out = 0
    for exact in (False, True):
        for _ in range(100):
            low = random.uniform(-0.4, 0.3, 3)
            box = np.concatenate([low, low + random.uniform(0.05, 0.2, 3)])
            blockers = np.concatenate([np.arange(len(packed)), -np.ones(len(packed))])
            blockers = blockers.astype(np.int32)
            end, excluded = keep_blockers(
                packed, outlines, box, exact, blockers, 0, len(packed), len(packed)
            )
            kept = set(blockers[len(packed) : end].tolist())
            inside = ((points >= box[:3]) & (points <= box[3:])).all(axis=2).any(axis=1)
            assert kept >= set(np.flatnonzero(inside).tolist())
            entered, left_out = entered + inside.sum(), left_out + excluded
    assert entered > 50
    assert left_out > 10


def lines_on_a_lattice(random):
    """Return a packed triangle, a point and the ends [3, LINES] of lines, all on few coordinates.

    Lines often touch an edge or a corner, lie in the plane or end on it.
    """
    while True:
        corners = random.integers(-2, 3, (1, 3, 3)) / 8
        if np.linalg.norm(np.cross(corners[0, 1] - corners[0, 0], corners[0, 2] - corners[0, 0])):
            break
    scale = 1 + random.integers(0, 2) * random.random() / 3
    start, ends = random.integers(-3, 4, 3) / 8, random.integers(-3, 4, (3, LINES)) / 8
    return pack(corners * scale), start * scale, ends * scale


def test_lines_of_a_point_are_blocked_together_as_one_by_one():
    random = np.random.default_rng(5)
    ends = np.full((2, 3, LINES), np.nan)
    blocked = 0
    for _ in range(1500):
        packed, start, ends[1] = lines_on_a_lattice(random)
        lines = int(random.integers(0, 1 << LINES))
        expected = sum(
            1 << p
            for p in range(LINES)
            if lines >> p & 1 and segment_hits(packed, 0, *start, *ends[1, :, p])
        )
        assert blocked_lines(packed, 0, tuple(start), ends, 1, lines) == expected
        blocked += expected.bit_count()
    assert blocked > 500


def fully_counted_sides(field, point, normal):
    """Decide which sides of a point are visible by counting every line of sight."""
    hints = np.empty((2, LINES + 1), np.int32)
    clear_hints(hints)
    blockers, sample = np.empty(0, np.int32), (*point, *normal)
    counts = [
        _count_sights(field, blockers, -1, -1, sample, side, (ALL_PLACES, 0, 0), LINES + 1, hints)[
            2
        ]
        for side in (0, 1)
    ]
    return sum(
        side
        for side, own, other in zip((FRONT, BACK), counts, counts[::-1])
        if own > 0 and own >= MIN_SIGHT_RATIO * other
    ), counts


def test_sides_are_those_of_counting_all_lines(soup):
    packed, _, flood = soup
    field, random = make_field(make_scene(packed, flood)), np.random.default_rng(4)
    hints = np.empty((2, LINES + 1), np.int32)
    fewer_than_enough, seen = 0, set()
    for t in range(len(packed)):
        clear_hints(hints)
        normal = tuple(packed[t, 9:12])
        for u, v in random.dirichlet([1, 1, 1], 60)[:, :2]:
            point = tuple(packed[t, :3] + u * packed[t, 3:6] + v * packed[t, 6:9])
            expected, counts = fully_counted_sides(field, point, normal)
            got = visible_sides(
                field, np.empty(0, np.int32), *(-1,) * 3, BOTH, point, normal, hints
            )
            assert got == expected
            if 0 < min(counts) < ENOUGH:
                fewer_than_enough += 1
                seen.add(expected)
    assert fewer_than_enough >= 10  # the ratio of the sides decides
    assert seen >= {FRONT, BACK, BOTH}


@pytest.fixture(scope="module")
def flags():
    """Return `bin_of`, `outside` and `whole_cells` of cells that are reached at random."""
    random = np.random.default_rng(1)
    bin_of = random.permutation(64).reshape(4, 4, 4).astype(np.int32)
    bin_of[bin_of >= 40] = -1  # cells without a bin
    words = random.integers(0, 2**64, (40, 8), np.uint64)
    words[:12], words[12:24] = 0, 2**64 - 1  # none and all of a cell
    return bin_of, words, random.random((4, 4, 4)) < 0.5


def reached_points(flags, low, high):
    """Return which grid points from `low` to `high` are reached, in order."""
    return [
        is_reached(*flags, x, y, z, True)
        for x in range(low[0], high[0] + 1)
        for y in range(low[1], high[1] + 1)
        for z in range(low[2], high[2] + 1)
    ]


def test_the_corners_of_a_voxel_are_those_that_the_flood_reached(flags):
    seen = set()
    for low in np.random.default_rng(2).integers(-2, 33, (500, 3)):
        reached = reached_points(flags, low, low + 1)
        expected = sum(1 << corner for corner in range(8) if reached[corner])
        assert reached_corners(*flags, *low) == expected
        seen.add(sum(reached))
    assert seen == set(range(9))


def test_a_box_counts_the_grid_points_that_the_flood_reached(flags):
    random, h = np.random.default_rng(3), spacing(32)
    seen = {NONE_REACHED: 0, SOME_REACHED: 0, ALL_REACHED: 0}
    for _ in range(400):
        low = random.integers(-2, 33, 3)
        high = low + random.integers(0, 6, 3)
        reached = reached_points(flags, low, high)
        expected = ALL_REACHED if all(reached) else SOME_REACHED if any(reached) else NONE_REACHED
        box = np.concatenate([(low - 0.4) * h - 0.5, (high + 0.4) * h - 0.5])
        assert reached_in_box(*flags, box) == expected
        seen[expected] += 1
    assert min(seen.values()) > 10


def test_pieces_that_are_known_without_samples_have_the_sides_that_samples_show():
    # a closed box with a smaller one inside, and a loose sheet above them
    corners = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    quads = np.array(
        [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    )
    sides = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    sheet = np.array([[[-0.4, 0.4, -0.4], [0.4, 0.4, -0.4], [0.0, 0.45, 0.4]]])
    packed = pack(np.concatenate([0.25 * corners[sides], 0.1 * corners[sides], sheet]))
    faces = np.arange(3 * len(packed), dtype=np.int32).reshape(-1, 3)
    flood = flood_fill(packed, bin_triangles(packed, RESOLUTION), np.ones(len(packed), np.bool_))
    pieces, codes, parents, _ = visibility.classify_triangles(packed, faces, flood)
    assert codes.tolist() == len(sides) * [FRONT] + len(sides) * [HIDDEN] + [BOTH]
    field, hints = make_field(make_scene(packed, flood)), np.empty((2, LINES + 1), np.int32)
    random, blockers = np.random.default_rng(0), np.empty(0, np.int32)
    for piece, code, t in zip(pieces, codes, parents, strict=True):
        for weights in random.dirichlet([1, 1, 1], 8):
            clear_hints(hints)
            at, normal = tuple(weights @ piece), tuple(packed[t, 9:12])
            assert visible_sides(field, blockers, -1, -1, -1, BOTH, at, normal, hints) == code
