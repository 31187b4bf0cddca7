"""Duplicates in a catalogue: the search by bins against a comparison of all pairs."""

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


def random_signatures(count, seed=0, *, similar_share=0.5):
    """Random assets. A share of them is similar to an earlier one in some respect."""
    draw = np.random.default_rng(seed)
    sha = [f"{number:064x}" for number in range(count)]
    area = draw.uniform(0.5, 3, count)
    tokens = draw.integers(500, 4000, count)
    occupancy = np.packbits(draw.random((count, 4096)) < 0.15, axis=1)
    looks = draw.integers(0, 256, (count, 32), np.uint8)
    for b in np.flatnonzero(draw.random(count) < similar_share):
        if b == 0:
            continue
        a = int(draw.integers(b))
        kind = draw.integers(6)
        if kind == 0:
            sha[b] = sha[a]
        if kind in (1, 2):
            area[b] = area[a] * (1 + draw.uniform(-0.03, 0.03) * (kind == 1))
            tokens[b] = tokens[a] + (draw.integers(-30, 31) if kind == 1 else 0)
            occupancy[b] = with_flipped_bits(
                occupancy[a], draw.integers(0, 20) if kind == 1 else 0, draw
            )
        if kind in (3, 4):
            looks[b] = with_flipped_bits(looks[a], draw.integers(0, 12) if kind == 3 else 0, draw)
    return Signatures(sha256=sha, area=area, tokens=tokens, occupancy=occupancy, looks=looks)


def with_flipped_bits(row, bits, draw):
    row = row.copy()
    for bit in draw.choice(len(row) * 8, bits, replace=False):
        row[bit // 8] ^= 1 << (bit % 8)
    return row


def duplicate_reason(s, a, b, cfg):
    """Return why b is a duplicate of a, "" if it is not one."""
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
            why: a
            for a in reversed(range(b))
            if a not in result and (why := duplicate_reason(s, a, b, cfg))
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
def test_the_duplicates_are_those_of_comparing_all_pairs(seed, count):
    signatures = random_signatures(count, seed)
    found = find_duplicates(signatures, CFG)
    assert {asset: why for asset, (why, _) in found.items()} == brute_force(signatures, CFG)
    for asset, (_, of) in found.items():
        assert of < asset
        assert of not in found
        assert duplicate_reason(signatures, of, asset, CFG)


def test_an_asset_similar_only_to_a_dropped_one_is_kept():
    """a is similar to b and b to c, but not a to c: b is dropped and c is kept."""
    signatures = random_signatures(3, similar_share=0.0)
    signatures.looks[:] = signatures.looks[0]
    signatures.looks[1, 0] ^= 0b0011_1111  # 6 bits
    signatures.looks[2, 0] ^= 0b0011_1111
    signatures.looks[2, 1] ^= 0b0011_1111
    assert find_duplicates(signatures, CFG) == {1: (DUPLICATE_LOOKS, 0)}


@pytest.mark.parametrize("option", [{"area_percent": 0}, {"tokens_percent": 100}, {"look_bits": 8}])
def test_thresholds_beyond_the_search_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        DedupConfig(**option)


def test_many_equal_assets_are_fast():
    count = 20_000
    signatures = random_signatures(count, similar_share=0.0)
    for column in (signatures.area, signatures.tokens, signatures.occupancy, signatures.looks):
        column[:] = column[0]
    started = time.process_time()
    assert len(find_duplicates(signatures, CFG)) == count - 1
    assert time.process_time() - started < 5
