"""Finds copies in a whole catalogue: the same bytes, the same shape, the same looks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.curation.config import DedupConfig

DUPLICATE_BYTES, DUPLICATE_GEOMETRY, DUPLICATE_LOOKS = (
    "duplicate_bytes",
    "duplicate_geometry",
    "duplicate_looks",
)
ROWS_AT_ONCE = 1 << 15  # pairs compared in one go


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Of N assets, the best first: of two copies the one that comes first is kept."""

    sha256: Sequence[str]
    area: NDArray[np.float64]  # [N]
    tokens: NDArray[np.int64]  # [N]
    occupancy: NDArray[np.uint8]  # [N, 512]
    looks: NDArray[np.uint8]  # [N, 32]


def find_duplicates(signatures: Signatures, cfg: DedupConfig) -> dict[int, tuple[str, int]]:
    """Asset -> (why, of which one) for every copy of a kept asset. A copy of a dropped one alone is kept.

    Assets are judged in their order, by bytes, then shape, then looks.
    """
    bytes_of = _classes(signatures.sha256)
    exact = zip(signatures.occupancy, signatures.area.tolist(), signatures.tokens.tolist())
    shape_of = _classes((row.tobytes(), area, tokens) for row, area, tokens in exact)
    looks_of = _classes(row.tobytes() for row in signatures.looks)
    kinds = [
        (DUPLICATE_BYTES, bytes_of, {}),
        (
            DUPLICATE_GEOMETRY,
            shape_of,
            _neighbours(_near_shapes(signatures, np.unique(shape_of), cfg)),
        ),
        (
            DUPLICATE_LOOKS,
            looks_of,
            _neighbours(_near_looks(signatures.looks, np.unique(looks_of), cfg)),
        ),
    ]
    kept: dict[tuple[str, int], int] = {}  # a class of equals -> the asset of it that is kept
    result: dict[int, tuple[str, int]] = {}
    for asset in range(len(bytes_of)):
        classes = [(why, int(class_of[asset])) for why, class_of, _ in kinds]
        found = (
            (why, kept[why, other])
            for (why, own), (_, _, near) in zip(classes, kinds)
            for other in (own, *near.get(own, ()))
            if (why, other) in kept
        )
        verdict = next(found, None)
        if verdict is None:
            for key in classes:
                kept[key] = asset
        else:
            result[asset] = verdict
    return result


def _classes(rows: Iterable[object]) -> NDArray[np.int64]:
    """For every row the number of the first one that is equal: [N]."""
    first: dict[bytes, int] = {}
    digests = (hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in rows)
    return np.array(
        [first.setdefault(digest, number) for number, digest in enumerate(digests)], np.int64
    )


def _near_shapes(
    signatures: Signatures, chosen: NDArray[np.int64], cfg: DedupConfig
) -> NDArray[np.int64]:
    """[P, 2] pairs of the chosen ones whose area, tokens and occupied cells are about the same."""
    area = np.log(np.maximum(signatures.area[chosen], 1e-12))
    tokens = np.log(np.maximum(signatures.tokens[chosen], 1))
    occupancy = signatures.occupancy[chosen]
    sizes = np.bitwise_count(occupancy).sum(axis=1, dtype=np.int64)
    sketch = _halved(occupancy)
    most_area, most_tokens = np.log1p(cfg.area_percent / 100), np.log1p(cfg.tokens_percent / 100)
    pairs = []
    # Two numbers closer than half a drawer's width share a drawer of one of two chests, set off by half a width.
    for shift_a in (0.0, 0.5):
        for shift_t in (0.0, 0.5):
            drawer_a = np.floor(area / (2 * most_area) + shift_a).astype(np.int64)
            drawer_t = np.floor(tokens / (2 * most_tokens) + shift_t).astype(np.int64)
            for a, b in _pairs(drawer_a * (1 << 20) + drawer_t):
                close = (np.abs(area[a] - area[b]) <= most_area) & (
                    np.abs(tokens[a] - tokens[b]) <= most_tokens
                )
                a, b = a[close], b[close]
                for bits in (sketch, occupancy):
                    differ = np.bitwise_count(bits[a] ^ bits[b]).sum(axis=1, dtype=np.int64)
                    same = differ * 100 <= cfg.occupancy_percent * np.minimum(sizes[a], sizes[b])
                    a, b = a[same], b[same]
                pairs.append(np.stack([chosen[a], chosen[b]], axis=1))
    return _joined(pairs)


def _halved(occupancy: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, 64] of [N, 512]: cells joined by eights. These differ in no more bits than those."""
    parts = [np.zeros((0, 64), np.uint8)]
    for start in range(0, len(occupancy), ROWS_AT_ONCE):
        cells = np.unpackbits(occupancy[start : start + ROWS_AT_ONCE], axis=1).reshape(
            -1, 16, 16, 16
        )
        for axis in (1, 2, 3):
            even, odd = (cells.take(range(first, 16, 2), axis) for first in (0, 1))
            cells = even | odd
        parts.append(np.packbits(cells.reshape(len(cells), -1), axis=1))
    return np.concatenate(parts)


def _near_looks(
    looks: NDArray[np.uint8], chosen: NDArray[np.int64], cfg: DedupConfig
) -> NDArray[np.int64]:
    """[P, 2] pairs of the chosen ones whose hashes differ by at most cfg.look_bits."""
    bits = np.ascontiguousarray(looks[chosen])
    pairs = []
    for band in bits.view(np.uint32).T:  # 7 differing bits leave one of 8 bands as it is
        for a, b in _pairs(band.astype(np.int64)):
            same = np.bitwise_count(bits[a] ^ bits[b]).sum(axis=1, dtype=np.int64) <= cfg.look_bits
            pairs.append(np.stack([chosen[a[same]], chosen[b[same]]], axis=1))
    return _joined(pairs)


def _pairs(keys: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Every pair of positions with one key, in pieces of bounded size."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.searchsorted(ordered, ordered, side="right")
    alive, step = np.arange(len(keys)), 1
    while len(alive):
        alive = alive[alive + step < ends[alive]]
        for start in range(0, len(alive), ROWS_AT_ONCE):
            left = alive[start : start + ROWS_AT_ONCE]
            yield order[left], order[left + step]
        step += 1


def _joined(pairs: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.unique(
        np.concatenate([np.empty((0, 2), np.int64), *(np.sort(pair, axis=1) for pair in pairs)]),
        axis=0,
    )


def _neighbours(pairs: NDArray[np.int64]) -> dict[int, list[int]]:
    """Each one's partners, in ascending order."""
    near: dict[int, list[int]] = {}
    for a, b in pairs.tolist():
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    return {one: sorted(others) for one, others in near.items()}
