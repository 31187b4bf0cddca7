"""Copies in a catalogue: bucketed search against comparing everything with everything."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import (
    DUPLICATE_BYTES,
    DUPLICATE_GEOMETRY,
    DUPLICATE_LOOKS,
    Signatures,
    find_duplicates,
)

CFG = DedupConfig(area_percent=2.0, tokens_percent=4.0)  # wide enough for many near misses


def random_signatures(count, seed=0, *, like=0.5):
    """Random assets, a share of which is like an earlier one in some of the ways."""
    draw = np.random.default_rng(seed)
    sha = [f"{number:064x}" for number in range(count)]
    area = draw.uniform(0.5, 3, count)
    tokens = draw.integers(500, 4000, count)
    occupancy = np.packbits(draw.random((count, 4096)) < 0.15, axis=1)
    looks = draw.integers(0, 256, (count, 32), np.uint8)
    for b in np.flatnonzero(draw.random(count) < like):
        if b == 0:
            continue
        a = int(draw.integers(b))
        kind = draw.integers(6)
        if kind == 0:
            sha[b] = sha[a]
        if kind in (1, 2):
            area[b] = area[a] * (1 + draw.uniform(-0.03, 0.03) * (kind == 1))
            tokens[b] = tokens[a] + (draw.integers(-30, 31) if kind == 1 else 0)
            occupancy[b] = flipped(occupancy[a], draw.integers(0, 20) if kind == 1 else 0, draw)
        if kind in (3, 4):
            looks[b] = flipped(looks[a], draw.integers(0, 12) if kind == 3 else 0, draw)
    return Signatures(sha256=sha, area=area, tokens=tokens, occupancy=occupancy, looks=looks)


def flipped(row, bits, draw):
    row = row.copy()
    for bit in draw.choice(len(row) * 8, bits, replace=False):
        row[bit // 8] ^= 1 << (bit % 8)
    return row


def same(s, a, b, cfg):
    """Why b is a copy of a, "" if it is none."""
    if s.sha256[a] == s.sha256[b]:
        return DUPLICATE_BYTES
    close = abs(np.log(s.area[a] / s.area[b])) <= np.log1p(cfg.area_percent / 100)
    close &= abs(np.log(s.tokens[a] / s.tokens[b])) <= np.log1p(cfg.tokens_percent / 100)
    bits = [int(np.unpackbits(s.occupancy[n]).sum()) for n in (a, b)]
    differ = int(np.unpackbits(s.occupancy[a] ^ s.occupancy[b]).sum())
    if close and differ * 100 <= cfg.occupancy_percent * min(bits):
        return DUPLICATE_GEOMETRY
    if int(np.unpackbits(s.looks[a] ^ s.looks[b]).sum()) <= cfg.look_bits:
        return DUPLICATE_LOOKS
    return ""


def brute_force(s, cfg):
    result = {}
    for b in range(len(s.sha256)):
        reasons = {
            why: a for a in reversed(range(b)) if a not in result and (why := same(s, a, b, cfg))
        }
        if reasons:
            result[b] = next(
                why
                for why in (DUPLICATE_BYTES, DUPLICATE_GEOMETRY, DUPLICATE_LOOKS)
                if why in reasons
            )
    return result


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60))
def test_the_same_copies_as_comparing_all_with_all(seed, count):
    signatures = random_signatures(count, seed)
    found = find_duplicates(signatures, CFG)
    assert {asset: why for asset, (why, _) in found.items()} == brute_force(signatures, CFG)
    for asset, (_, of) in found.items():
        assert of < asset
        assert of not in found
        assert same(signatures, of, asset, CFG)


def test_what_is_like_a_dropped_one_alone_is_kept():
    """a ~ b ~ c, but not a ~ c: b is dropped, c is not."""
    signatures = random_signatures(3, like=0.0)
    signatures.looks[:] = signatures.looks[0]
    signatures.looks[1, 0] ^= 0b0011_1111  # 6 bits
    signatures.looks[2, 0] ^= 0b0011_1111
    signatures.looks[2, 1] ^= 0b0011_1111
    assert find_duplicates(signatures, CFG) == {1: (DUPLICATE_LOOKS, 0)}


@pytest.mark.parametrize("option", [{"area_percent": 0}, {"tokens_percent": 100}, {"look_bits": 8}])
def test_thresholds_that_the_search_could_not_keep(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        DedupConfig(**option)


def test_a_crowd_of_equals_is_cheap():
    count = 20_000
    signatures = random_signatures(count, like=0.0)
    for column in (signatures.area, signatures.tokens, signatures.occupancy, signatures.looks):
        column[:] = column[0]
    started = time.process_time()
    assert len(find_duplicates(signatures, CFG)) == count - 1
    assert time.process_time() - started < 5
