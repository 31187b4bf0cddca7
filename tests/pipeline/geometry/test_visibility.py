"""The search for visible pieces of triangles at several precisions."""

import numpy as np
import pytest

from pipeline.core.grid import spacing
from pipeline.core.primitives.triangles import pack
from pipeline.geometry import visibility
from pipeline.geometry.flood_fill import bin_triangles, flood_fill
from pipeline.geometry.line_of_sight import (
    LINES,
    clear_hints,
    find_blockers,
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


def test_hints_alter_no_result(soup):
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
            normal = packed[t, 9:12]
            clear_hints(cleared)
            sides = [
                visible_sides(field, blockers, 0, middle, last, *at, *normal, hints)
                for hints in (kept, cleared)
            ]
            assert sides[0] == sides[1]
            seen.add(sides[0])
    assert len(seen) >= 2
