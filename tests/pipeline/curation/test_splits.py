"""Splits: no copies are apart, and assets that are added later change none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.hashing import split_of
from pipeline.curation.dedup import Signatures
from pipeline.curation.splits import decide_splits
from tests.pipeline.curation.test_dedup import (
    CFG,
    motions_between,
    random_signatures,
    signatures,
)

HALF = 50  # percent of validation, so that random copies are often apart


def decide(s, decided=None, keys=None, own=None, follow=True):
    count = len(s.sha256)
    keys = keys or [f"asset-{number}" for number in range(count)]
    own = own or [split_of(key, HALF) for key in keys]
    return decide_splits(keys, own, s, decided or [""] * count, follow=follow, cfg=CFG)


def are_copies(s, a, b):
    return s.sha256[a] == s.sha256[b] or bool(motions_between(s, a, b))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_no_copies_are_apart_and_unique_assets_go_by_their_own_key(seed, count):
    s = random_signatures(count, seed)
    splits = decide(s)
    for b in range(count):
        earlier = [a for a in range(b) if are_copies(s, a, b)]
        known = {splits[a] for a in earlier if splits[a]}
        expected = known or {split_of(f"asset-{b}", HALF)}
        assert splits[b] == (expected.pop() if len(expected) == 1 else "")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 20))
def test_later_assets_change_no_split(seed, count):
    s = random_signatures(count, seed)
    first = count // 2
    prefix = Signatures(sha256=s.sha256[:first], visible=s.visible[:first], faces=s.faces[:first])
    splits = decide(s)
    assert decide(prefix) == splits[:first]
    assert decide(s, decided=[*splits[:first], *[""] * (count - first)]) == splits


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("by", ["bytes", "visible", "faces", "key"])
def test_a_later_copy_follows_what_is_decided(split, by):
    draw = np.random.default_rng(0)
    visible, faces = (draw.uniform(0.1, 0.9, (2, 34)) for _ in range(2))
    sha256, keys = ["a" * 64, "b" * 64], ["one", "two"]
    if by == "bytes":
        sha256 = sha256[:1] * 2
    elif by == "key":
        keys = keys[:1] * 2
    else:
        moments = visible if by == "visible" else faces
        moments[1] = moments[0]
    s = signatures(visible, faces, sha256)
    assert decide(s, ["", split], keys) == [split, split]
    assert decide(s, [split, ""], keys) == [split, split]


def test_a_copy_of_a_train_and_a_val_asset_is_in_neither_and_decides_nothing():
    draw = np.random.default_rng(0)
    visible, faces = (draw.uniform(0.1, 0.9, (4, 34)) for _ in range(2))
    visible[2], faces[2] = visible[0], faces[1]
    visible[3] = visible[1]
    s = signatures(visible, faces)
    assert decide(s, ["train", "val", "", ""]) == ["train", "val", "", "val"]


def test_a_copy_that_does_not_follow_is_in_its_own_split_or_in_none():
    visible = np.random.default_rng(0).uniform(0.1, 0.9, (4, 34))
    visible[1:3] = visible[0]
    own = ["train", "val", "train", "val"]
    splits = decide(signatures(visible), own=own, follow=False)
    assert splits == ["train", "", "train", "val"]


def test_assets_without_a_surface_are_no_copies():
    keys = [f"k{number}" for number in range(40)]
    nothing = signatures(np.zeros((40, 34)))
    assert decide(nothing, keys=keys) == [split_of(key, HALF) for key in keys]
