"""Decide which assets are in the training and the validation split, so that no copies are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import Signatures, find_copies

Name = tuple[str, str | int]  # of something that copies share: its kind and its value


def decide_splits(
    keys: Sequence[str],
    own: Sequence[str],
    signatures: Signatures,
    decided: Sequence[str],
    *,
    follow: bool,
    cfg: DedupConfig,
) -> list[str]:
    """Decide the splits of assets in the order of a plan.

    Splits that are decided already remain. An asset follows the earlier ones that it is a copy of
    or shares its key with. An asset without any is in its own split. Thus a split depends on
    earlier assets alone, and assets that are added later change no split.

    Args:
        keys: Names of the groups of copies that N assets are known to be in, or their uids.
        own: The splits that the assets have if they are no copies.
        signatures: What copies among the assets are found by.
        decided: The splits that are decided already, "" for the others.
        follow: Whether copies follow earlier assets into a split that is not their own.
        cfg: How similar copies are.

    Returns:
        The splits of all assets. "" if an asset is in neither, because it is a copy of an asset of
        each split, or of one in another split and does not follow it.
    """
    copies = find_copies(signatures, cfg)
    similar: dict[int, list[int]] = {}  # shape group -> other groups that are copies of it
    for a, b in copies.pairs:
        similar.setdefault(a, []).append(b)
        similar.setdefault(b, []).append(a)
    names: list[list[Name]] = [
        [("key", key), ("bytes", same_bytes), ("shape", shape)]
        for key, same_bytes, shape in zip(
            keys, copies.bytes_group.tolist(), copies.shape_group.tolist(), strict=True
        )
    ]
    splits_of_names: dict[Name, set[str]] = {}
    splits = list(decided)

    def register(asset: int) -> None:
        for name in names[asset]:
            splits_of_names.setdefault(name, set()).add(splits[asset])

    for asset in np.flatnonzero([split != "" for split in decided]).tolist():
        register(asset)
    for asset in np.flatnonzero([split == "" for split in decided]).tolist():
        shape = int(copies.shape_group[asset])
        related = [*names[asset], *(("shape", other) for other in similar.get(shape, ()))]
        known = set().union(*(splits_of_names.get(name, ()) for name in related))
        known = known if follow and known else known | {own[asset]}
        if len(known) == 1:
            (splits[asset],) = known
            register(asset)
    return splits
