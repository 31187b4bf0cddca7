"""Copies in a catalogue: the search by bins against a comparison of all pairs."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import (
    DUPLICATE_BYTES,
    DUPLICATE_GEOMETRY,
    Duplicate,
    Signatures,
    find_copies,
    find_duplicates,
)
from pipeline.curation.shape_moments import MOTIONS, Motion, move_moments, surface_moments

CFG = DedupConfig(shape_tolerance=1e-3)


def triangles(seed):
    return np.random.default_rng(seed).uniform(-0.475, 0.475, (5, 3, 3))


def signatures(visible, faces=None, sha256=None):
    visible = np.array(visible, np.float32)
    return Signatures(
        sha256=sha256 or [f"{number:064x}" for number in range(len(visible))],
        visible=visible,
        faces=visible if faces is None else np.array(faces, np.float32),
    )


def random_signatures(count, seed=0):
    """Random shapes. About half of them are moved or changed versions of an earlier one."""
    draw = np.random.default_rng(seed)
    visible = np.array([surface_moments(triangles([seed, n])) for n in range(count)]).reshape(
        -1, 34
    )
    faces = visible.copy()
    sha256 = [f"{number:064x}" for number in range(count)]
    for b in range(1, count):
        a, kind = int(draw.integers(b)), draw.integers(8)
        motion = MOTIONS[draw.integers(8)]
        noise = draw.uniform(-1, 1, 34) * CFG.shape_tolerance * draw.choice([0, 0.5, 1.05])
        if kind == 0:
            sha256[b] = sha256[a]
        if kind in (1, 2):  # other hidden faces
            visible[b] = move_moments(visible[a], motion) + noise
        if kind in (2, 3):
            faces[b] = move_moments(faces[a], motion) + noise
    return signatures(visible, faces, sha256)


def motions_between(s, a, b):
    """Return every motion that takes a to b within the tolerance."""
    return [
        motion
        for motion in MOTIONS
        if any(
            np.abs(move_moments(m[a].astype(np.float64), motion) - m[b]).max()
            <= CFG.shape_tolerance
            for m in (s.visible, s.faces)
        )
    ]


def brute_force(s, order):
    """Return {asset: reason} by comparing each asset with every kept one."""
    kept, result = [], {}
    for b in order:
        if any(s.sha256[a] == s.sha256[b] for a in kept):
            result[b] = DUPLICATE_BYTES
        elif any(motions_between(s, a, b) for a in kept):
            result[b] = DUPLICATE_GEOMETRY
        else:
            kept.append(b)
    return result


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 20))
def test_the_duplicates_are_those_of_comparing_all_pairs(seed, count):
    s = random_signatures(count, seed)
    order = np.random.default_rng(seed).permutation(count).tolist()
    found = find_duplicates(find_copies(s, CFG), order)
    assert {asset: item.reason for asset, item in found.items()} == brute_force(s, order)
    for asset, item in found.items():
        assert item.original not in found
        assert order.index(item.original) < order.index(asset)
        if item.reason == DUPLICATE_GEOMETRY:
            kinds = {motion.kind for motion in motions_between(s, item.original, asset)}
            assert item.kind in kinds


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_components_are_those_of_all_pairs(seed, count):
    s = random_signatures(count, seed)
    label = list(range(count))
    for a in range(count):
        for b in range(a + 1, count):
            if s.sha256[a] == s.sha256[b] or motions_between(s, a, b):
                label = [label[a] if other == label[b] else other for other in label]
    found = find_copies(s, CFG).components()
    assert [[x == y for y in found] for x in found] == [[x == y for y in label] for x in label]


@pytest.mark.parametrize("motion", MOTIONS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_kind_names_how_the_copy_was_moved(motion, reverse):
    """The original is the asset that comes first, whatever its row."""
    shape = triangles(0)
    moments = [surface_moments(shape), surface_moments(motion.apply(shape))]
    copies = find_copies(signatures(moments[::-1] if reverse else moments), CFG)
    original, copy = (1, 0) if reverse else (0, 1)
    assert find_duplicates(copies, [original, copy]) == {
        copy: Duplicate(reason=DUPLICATE_GEOMETRY, kind=motion.kind, original=original)
    }


def test_a_symmetric_shape_is_the_same_and_not_turned():
    square = np.array([[[-0.4, 0.1, -0.4], [0.4, 0.1, -0.4], [0.4, 0.1, 0.4]]])
    shape = np.concatenate([Motion(False, turns).apply(square) for turns in range(4)])
    moments = surface_moments(shape)
    (found,) = find_duplicates(
        find_copies(signatures([moments, moments + 1e-6]), CFG), [0, 1]
    ).values()
    assert found.kind == "same_shape"


def test_an_asset_that_is_a_copy_only_of_a_dropped_one_is_kept_in_one_component():
    """a is a copy of b and b of c, but not a of c: b is dropped, c is kept, all are one group."""
    moments = surface_moments(triangles(0))
    copies = find_copies(signatures([moments, moments + 8e-4, moments + 16e-4]), CFG)
    assert {asset: item.original for asset, item in find_duplicates(copies, [0, 1, 2]).items()} == {
        1: 0
    }
    assert len(set(copies.components())) == 1


def test_assets_without_hash_or_surface_are_copies_of_none():
    zeros = np.zeros((3, 34))
    copies = find_copies(signatures(zeros, sha256=[None, None, "a"]), CFG)
    assert find_duplicates(copies, [0, 1, 2]) == {}
    assert len(set(copies.components())) == 3


@pytest.mark.parametrize("tolerance", [0, 0.02, float("nan")])
def test_tolerances_beyond_the_search_are_refused(tolerance):
    with pytest.raises(ValueError, match="shape_tolerance"):
        DedupConfig(shape_tolerance=tolerance)


def test_many_equal_assets_are_fast():
    count = 20_000
    moments = np.tile(surface_moments(triangles(0)), (count, 1))
    started = time.process_time()
    copies = find_copies(signatures(moments), CFG)
    assert len(find_duplicates(copies, range(count))) == count - 1
    assert time.process_time() - started < 5
