"""Find duplicates in a whole catalogue: the same bytes, the same shape, the same appearance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.curation.config import DedupConfig

DUPLICATE_BYTES = "duplicate_bytes"
DUPLICATE_GEOMETRY = "duplicate_geometry"
DUPLICATE_LOOKS = "duplicate_looks"
BATCH_ROWS = 1 << 15  # pairs, or rows, that are compared at once


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """What duplicates are found by, of N assets from the best to the worst."""

    sha256: Sequence[str]  # of the source files
    area: NDArray[np.float64]  # [N] visible surface area
    tokens: NDArray[np.int64]  # [N] SDF cells
    occupancy: NDArray[np.uint8]  # [N, 512] packed bits of a 16^3 grid
    looks: NDArray[np.uint8]  # [N, 32] packed bits of four perceptual hashes


def find_duplicates(signatures: Signatures, cfg: DedupConfig) -> dict[int, tuple[str, int]]:
    """Find the assets that duplicate a kept asset.

    The assets are judged in their order, so the best one of a group of duplicates is kept. An asset
    that is similar only to a dropped one is kept. Assets are compared by bytes, then by shape, then
    by appearance.

    Args:
        signatures: The signatures of N assets, the best first.
        cfg: How similar duplicates are.

    Returns:
        {asset: (reason, original)} for each duplicate. Both numbers are positions in `signatures`.
        The reason is DUPLICATE_BYTES, DUPLICATE_GEOMETRY or DUPLICATE_LOOKS.
    """
    # Group equal assets first, so that thousands of equal ones cost one comparison per group.
    shapes = zip(signatures.occupancy, signatures.area.tolist(), signatures.tokens.tolist())
    bytes_group = _group_equal(signatures.sha256)
    shape_group = _group_equal((row.tobytes(), area, tokens) for row, area, tokens in shapes)
    looks_group = _group_equal(row.tobytes() for row in signatures.looks)
    shape_pairs = _similar_shapes(signatures, np.unique(shape_group), cfg)
    looks_pairs = _similar_looks(signatures.looks, np.unique(looks_group), cfg)
    criteria = [
        (DUPLICATE_BYTES, bytes_group, {}),
        (DUPLICATE_GEOMETRY, shape_group, _neighbours(shape_pairs)),
        (DUPLICATE_LOOKS, looks_group, _neighbours(looks_pairs)),
    ]
    # Keep an asset if no equal or similar group has a kept asset.
    kept: dict[tuple[str, int], int] = {}  # (reason, group) -> the kept asset of the group
    duplicates: dict[int, tuple[str, int]] = {}
    for asset in range(len(bytes_group)):
        own_groups = [(reason, int(group_of[asset])) for reason, group_of, _ in criteria]
        matches = (
            (reason, kept[reason, group])
            for (reason, own_group), (_, _, similar) in zip(own_groups, criteria)
            for group in (own_group, *similar.get(own_group, ()))
            if (reason, group) in kept
        )
        match = next(matches, None)
        if match is None:
            for key in own_groups:
                kept[key] = asset
        else:
            duplicates[asset] = match
    return duplicates


def _group_equal(rows: Iterable[object]) -> NDArray[np.int64]:
    """Return for each row the position of the first row that is equal: [N]."""
    first: dict[bytes, int] = {}
    digests = (hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in rows)
    return np.array(
        [first.setdefault(digest, number) for number, digest in enumerate(digests)], np.int64
    )


def _similar_shapes(
    signatures: Signatures, candidates: NDArray[np.int64], cfg: DedupConfig
) -> NDArray[np.int64]:
    """Return the pairs [P, 2] of candidates with similar area, tokens and occupied cells."""
    area = np.log(np.maximum(signatures.area[candidates], 1e-12))
    tokens = np.log(np.maximum(signatures.tokens[candidates], 1))
    occupancy = signatures.occupancy[candidates]
    occupied = np.bitwise_count(occupancy).sum(axis=1, dtype=np.int64)
    coarse = _coarsen(occupancy)
    max_area_step = np.log1p(cfg.area_percent / 100)
    max_tokens_step = np.log1p(cfg.tokens_percent / 100)
    pairs = []
    # Area and tokens are hashed into bins twice as wide as the largest difference. Two values that
    # are close enough share a bin of at least one of two bin grids offset by half a bin.
    for area_offset in (0.0, 0.5):
        for tokens_offset in (0.0, 0.5):
            area_bin = np.floor(area / (2 * max_area_step) + area_offset).astype(np.int64)
            tokens_bin = np.floor(tokens / (2 * max_tokens_step) + tokens_offset).astype(np.int64)
            for a, b in _pairs_with_equal_keys(area_bin * (1 << 20) + tokens_bin):
                is_close = (np.abs(area[a] - area[b]) <= max_area_step) & (
                    np.abs(tokens[a] - tokens[b]) <= max_tokens_step
                )
                a, b = a[is_close], b[is_close]
                # The coarse grid is compared first, because it is 8 times smaller.
                for bits in (coarse, occupancy):
                    differing = np.bitwise_count(bits[a] ^ bits[b]).sum(axis=1, dtype=np.int64)
                    allowed = cfg.occupancy_percent * np.minimum(occupied[a], occupied[b])
                    is_close = differing * 100 <= allowed
                    a, b = a[is_close], b[is_close]
                pairs.append(np.stack([candidates[a], candidates[b]], axis=1))
    return _unique_pairs(pairs)


def _coarsen(occupancy: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Join groups of 2^3 cells: [N, 512] of 16^3 cells becomes [N, 64] of 8^3 cells.

    Two coarse grids never differ in more bits than the fine ones.
    """
    batches = [np.zeros((0, 64), np.uint8)]
    for start in range(0, len(occupancy), BATCH_ROWS):
        bits = np.unpackbits(occupancy[start : start + BATCH_ROWS], axis=1)
        cells = bits.reshape(-1, 16, 16, 16)
        for axis in (1, 2, 3):
            even = cells.take(range(0, 16, 2), axis)
            odd = cells.take(range(1, 16, 2), axis)
            cells = even | odd
        batches.append(np.packbits(cells.reshape(len(cells), -1), axis=1))
    return np.concatenate(batches)


def _similar_looks(
    looks: NDArray[np.uint8], candidates: NDArray[np.int64], cfg: DedupConfig
) -> NDArray[np.int64]:
    """Return the pairs [P, 2] of candidates whose hashes differ in at most cfg.look_bits bits."""
    bits = np.ascontiguousarray(looks[candidates])
    pairs = []
    # Up to 7 differing bits leave at least one of 8 words of 32 bits equal.
    for word in bits.view(np.uint32).T:
        for a, b in _pairs_with_equal_keys(word.astype(np.int64)):
            differing = np.bitwise_count(bits[a] ^ bits[b]).sum(axis=1, dtype=np.int64)
            is_close = differing <= cfg.look_bits
            pairs.append(np.stack([candidates[a[is_close]], candidates[b[is_close]]], axis=1))
    return _unique_pairs(pairs)


def _pairs_with_equal_keys(
    keys: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield all pairs of positions with equal keys, in batches of at most BATCH_ROWS pairs."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.searchsorted(ordered, ordered, side="right")
    # Pair each position with the one `step` places later, as long as that has the same key.
    remaining = np.arange(len(keys))
    step = 1
    while len(remaining):
        remaining = remaining[remaining + step < ends[remaining]]
        for start in range(0, len(remaining), BATCH_ROWS):
            first = remaining[start : start + BATCH_ROWS]
            yield order[first], order[first + step]
        step += 1


def _unique_pairs(pairs: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Join arrays of pairs to one [P, 2] without repetitions, the smaller number first."""
    ordered = (np.sort(pair, axis=1) for pair in pairs)
    return np.unique(np.concatenate([np.empty((0, 2), np.int64), *ordered]), axis=0)


def _neighbours(pairs: NDArray[np.int64]) -> dict[int, list[int]]:
    """Return for each number the numbers it is paired with, in ascending order."""
    neighbours: dict[int, list[int]] = {}
    for a, b in pairs.tolist():
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    return {number: sorted(others) for number, others in neighbours.items()}
