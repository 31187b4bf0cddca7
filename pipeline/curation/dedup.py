"""Find copies in a whole catalogue: the same bytes, or the same shape up to turns and mirroring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.curation.config import DedupConfig
from pipeline.curation.shape_moments import MOTIONS, Motion, invariants, move_moments

DUPLICATE_BYTES = "duplicate_bytes"
DUPLICATE_GEOMETRY = "duplicate_geometry"
SAME_FILE = "same_file"  # kind of a copy with the same bytes; other kinds are those of Motion
BATCH_ROWS = 1 << 15  # pairs that are compared at once
Pairs = dict[tuple[int, int], Motion]  # (a, b) with a < b -> the motion that takes a to b


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """What copies are found by, of N assets from the best to the worst.

    Two shapes are equal if the moments of their visible surfaces or those of all their faces are.
    A copy with other hidden faces differs in the latter, and a copy at the limit of what counts as
    visible in the former.
    """

    sha256: Sequence[str | None]  # of the source files
    visible: NDArray[np.float32]  # [N, 34] `surface_moments` of the visible surface
    faces: NDArray[np.float32]  # [N, 34] `surface_moments` of all faces


def signatures_of_looks(
    sha256: Sequence[str | None],
    visible: NDArray[np.float32],
    faces: NDArray[np.float32],
    cap_share: NDArray[np.float64],
) -> Signatures:
    """Return signatures by which equal assets also look equal.

    A cap that closes an opening hides what lies behind it from the topology, but not in a render:
    an open window and one with a pane have the same solid. Assets with caps are therefore compared
    by all their faces alone.

    Args:
        sha256: Hashes of the source files of N assets.
        visible: [N, 34] `surface_moments` of the visible surfaces.
        faces: [N, 34] `surface_moments` of all faces.
        cap_share: [N] area of the caps, relative to the visible area.
    """
    return Signatures(
        sha256=sha256, visible=np.where(cap_share[:, None] > 0, 0, visible), faces=faces
    )


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Why an asset is not kept beside another.

    Args:
        reason: DUPLICATE_BYTES or DUPLICATE_GEOMETRY.
        kind: "same_file", "same_shape", "turned_90", "turned_180", "turned_270" or "mirrored". A
            turned copy is the original after a turn by so many degrees about the up axis,
            counterclockwise seen from above. A mirrored copy may be turned, too.
        original: Position of the kept asset.
    """

    reason: str
    kind: str
    original: int


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which of N assets are copies of each other.

    Args:
        bytes_group: Position of the first asset with the same bytes, [N].
        shape_group: Position of the first asset with exactly the same moments, [N].
        pairs: Pairs of shape groups that are copies of each other.
    """

    bytes_group: NDArray[np.int64]
    shape_group: NDArray[np.int64]
    pairs: Pairs

    def components(self) -> NDArray[np.int64]:
        """Return the number of each asset's connected component, [N].

        Two assets are in one component if a chain of copies leads from one to the other.
        """
        count = len(self.bytes_group)
        ends = np.array(list(self.pairs), np.int64).reshape(-1, 2)
        rows = np.concatenate([np.arange(count), np.arange(count), ends[:, 0]])
        columns = np.concatenate([self.bytes_group, self.shape_group, ends[:, 1]])
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
        return connected_components(graph.tocsr(), directed=False)[1].astype(np.int64)


def find_copies(signatures: Signatures, cfg: DedupConfig) -> Copies:
    """Find all pairs of copies without comparing all pairs.

    Args:
        signatures: The signatures of N assets.
        cfg: How similar copies are.
    """
    # Group equal assets first, so that thousands of equal ones cost one comparison per group. An
    # asset without a hash or without a surface equals none.
    both = np.concatenate([signatures.visible, signatures.faces], axis=1)
    shape_group = _group_equal(row.tobytes() if row.any() else None for row in both)
    candidates = np.unique(shape_group)
    pairs: Pairs = {}
    for moments in (signatures.visible, signatures.faces):
        for pair, motion in _similar_shapes(moments, candidates, cfg.shape_tolerance):
            # Of two motions that fit a symmetric shape, the one earlier in MOTIONS is named.
            if pair not in pairs or MOTIONS.index(motion) < MOTIONS.index(pairs[pair]):
                pairs[pair] = motion
    return Copies(bytes_group=_group_equal(signatures.sha256), shape_group=shape_group, pairs=pairs)


def find_duplicates(copies: Copies, order: Iterable[int]) -> dict[int, Duplicate]:
    """Find the assets that are copies of a kept asset.

    The assets are judged in the given order, so the best one of a group of copies is kept. An asset
    that is a copy only of a dropped one is kept. Assets are compared by bytes, then by shape.

    Args:
        copies: The copies among N assets.
        order: Positions of the assets to judge, the best first. Others make none a duplicate.

    Returns:
        {position: why the asset is dropped} for each duplicate.
    """
    neighbours: dict[int, list[tuple[int, Motion]]] = {}
    for (a, b), motion in sorted(copies.pairs.items()):
        neighbours.setdefault(b, []).append((a, motion))
        neighbours.setdefault(a, []).append((b, motion.inverse))
    kept_bytes: dict[int, int] = {}  # group -> the kept asset of the group
    kept_shapes: dict[int, int] = {}
    duplicates: dict[int, Duplicate] = {}
    for asset in order:
        same_bytes = int(copies.bytes_group[asset])
        shape = int(copies.shape_group[asset])
        match = None
        if same_bytes in kept_bytes:
            match = Duplicate(
                reason=DUPLICATE_BYTES, kind=SAME_FILE, original=kept_bytes[same_bytes]
            )
        else:
            for other, motion in ((shape, MOTIONS[0]), *neighbours.get(shape, ())):
                if other in kept_shapes:
                    match = Duplicate(
                        reason=DUPLICATE_GEOMETRY, kind=motion.kind, original=kept_shapes[other]
                    )
                    break
        if match is None:
            kept_bytes[same_bytes] = kept_shapes[shape] = asset
        else:
            duplicates[asset] = match
    return duplicates


def _group_equal(rows: Iterable[bytes | str | None]) -> NDArray[np.int64]:
    """Return for each row the position of the first row that is equal: [N]. None equals none."""
    first: dict[bytes, int] = {}
    groups = []
    for number, row in enumerate(rows):
        if row is None:
            groups.append(number)
            continue
        content = row.encode() if isinstance(row, str) else row
        groups.append(first.setdefault(hashlib.blake2b(content, digest_size=16).digest(), number))
    return np.array(groups, np.int64)


def _similar_shapes(
    moments: NDArray[np.float32], candidates: NDArray[np.int64], tolerance: float
) -> Iterator[tuple[tuple[int, int], Motion]]:
    """Yield the pairs of candidates with equal moments after a motion, and that motion.

    No two moments of a pair differ by more than the tolerance. A pair may be yielded several times.
    """
    candidates = candidates[moments[candidates].any(axis=1)]  # no surface, no copies
    values = moments[candidates].astype(np.float64)
    numbers = invariants(values)
    # The two invariants are hashed into bins twice as wide as the largest difference. Two values
    # that are close enough share a bin of at least one of two bin grids offset by half a bin.
    widest = np.array([tolerance, 2 * tolerance])  # the second invariant is a sum of two moments
    for first_offset in (0.0, 0.5):
        for second_offset in (0.0, 0.5):
            bins = np.floor(numbers / (2 * widest) + (first_offset, second_offset))
            _, keys = np.unique(bins, axis=0, return_inverse=True)
            for a, b in _pairs_with_equal_keys(keys.ravel()):
                a, b = np.minimum(a, b), np.maximum(a, b)
                is_close = (np.abs(numbers[a] - numbers[b]) <= widest).all(axis=1)
                a, b = a[is_close], b[is_close]
                for motion in MOTIONS:
                    moved = move_moments(values[a], motion)
                    fits = (np.abs(moved - values[b]) <= tolerance).all(axis=1)
                    ends = zip(candidates[a[fits]].tolist(), candidates[b[fits]].tolist())
                    yield from ((pair, motion) for pair in ends)
                    a, b = a[~fits], b[~fits]


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
