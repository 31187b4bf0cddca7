"""Decides the splits of a build once its shards are committed, and writes them to the manifests."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically
from pipeline.core.text import counted
from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import Signatures
from pipeline.curation.shape_moments import decode_moments
from pipeline.curation.splits import decide_splits
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.sources.id_list import split_of_record
from pipeline.storage.commit_marker import CommitMarker, CommittedFile
from pipeline.storage.layout import MANIFEST, list_commits, manifest_path, marker_path
from pipeline.storage.manifest import ManifestRow, encode_manifest, parse_manifest
from pipeline.storage.remote import StorePath, read_files, store_path, write_file

log = logging.getLogger(__name__)

WRITERS = 16  # manifests that are uploaded at the same time


@dataclass(frozen=True, kw_only=True)
class _Asset:
    """What the split of an asset depends on."""

    key: str
    own: str
    row: ManifestRow
    is_earlier: bool = False


def assign_splits(plan: Plan) -> None:
    """Decide the splits of assets that have none yet, and write them to the manifests.

    The splits of a shard are decided once all shards before it are committed, so that they depend
    on the plan alone and not on the order in which shards were finished.

    Args:
        plan: The plan of the build.

    Raises:
        UserError: If an earlier build whose splits are to be kept cannot be read.
    """
    manifests = read_finished_manifests(plan)
    if not any(_is_undecided(row) for rows in manifests.values() for row in rows):
        return
    splits = expected_splits(plan, manifests, keep=True)
    changed = {
        shard: [replace(row, split=splits[row.uid]) for row in rows]
        for shard, rows in manifests.items()
        if any(row.split != splits[row.uid] for row in rows)
    }
    with ThreadPoolExecutor(1 if isinstance(plan.out, Path) else WRITERS) as pool:
        list(pool.map(lambda shard: _rewrite(plan.out, shard, changed[shard]), changed))
    apart = sum(not split for split in splits.values())
    if apart:
        log.warning(
            "%s of %s in no split, because copies of them are in the other one or in both.",
            counted(apart, "asset"),
            f"{plan.out} {'is' if apart == 1 else 'are'}",
        )


def read_finished_manifests(plan: Plan) -> dict[str, list[ManifestRow]]:
    """Return the manifests of the first shards of a plan, up to one that is not committed."""
    commits = list_commits(plan.out)
    shards = list(takewhile(lambda shard: MANIFEST in commits.get(shard, ()), plan.shards))
    return dict(zip(shards, _read_manifests(plan.out, shards), strict=True))


def expected_splits(
    plan: Plan, manifests: Mapping[str, Sequence[ManifestRow]], *, keep: bool
) -> dict[str, str]:
    """Return the split that each asset must have, by uid.

    Args:
        plan: The plan of the build.
        manifests: The manifests of its first shards in order.
        keep: Whether splits that the manifests state remain. Otherwise those of rows without
            moments do: their splits were decided when they were written.

    Raises:
        UserError: If an earlier build whose splits are to be kept cannot be read.
    """
    config = plan.info.config
    assets = [*_earlier_assets(config.get("keep_splits_of", ())), *_assets(plan, manifests)]
    by_uid = {asset.row.uid: asset.row.split for asset in assets if asset.is_earlier}
    decided = [
        asset.row.split if asset.is_earlier or keep or asset.row.visible_moments is None else ""
        for asset in assets
    ]
    decided = [
        split or by_uid.get(asset.row.uid, "") for split, asset in zip(decided, assets, strict=True)
    ]
    moments = {
        name: decode_moments([getattr(asset.row, name) for asset in assets])
        for name in ("visible_moments", "face_moments")
    }
    splits = decide_splits(
        [asset.key for asset in assets],
        [asset.own for asset in assets],
        Signatures(
            sha256=[asset.row.sha256 for asset in assets],
            visible=moments["visible_moments"],
            faces=moments["face_moments"],
        ),
        decided,
        follow=config.get("split_column") is None,
        cfg=_dedup_of(config),
    )
    return {
        asset.row.uid: split
        for asset, split in zip(assets, splits, strict=True)
        if not asset.is_earlier
    }


def _dedup_of(config: Mapping[str, object]) -> DedupConfig:
    """Return how similar copies are: as in the ranking, if the plan states it."""
    rank = config.get("rank")
    dedup = rank.get("dedup", {}) if isinstance(rank, dict) else {}
    return DedupConfig(**dedup) if "shape_tolerance" in dedup else DedupConfig()


def _is_undecided(row: ManifestRow) -> bool:
    return row.split == ""


def _assets(plan: Plan, manifests: Mapping[str, Sequence[ManifestRow]]) -> Iterator[_Asset]:
    config = plan.info.config
    val_percent, column = config["val_percent"], config.get("split_column")
    for shard, rows in manifests.items():
        records = {record.uid: record for record in plan.records(shard)}
        for row in rows:
            if (record := records.get(row.uid)) is not None:
                own = split_of_record(record, val_percent=val_percent, column=column)
                yield _Asset(key=record.split_key or record.uid, own=own, row=row)


def _earlier_assets(builds: Sequence[str]) -> Iterator[_Asset]:
    """Yield the assets of earlier builds that have a split."""
    for name in builds:
        earlier = read_plan(store_path(name))
        for asset in _assets(earlier, read_finished_manifests(earlier)):
            if asset.row.split:
                yield replace(asset, is_earlier=True)


def _read_manifests(out: StorePath, shards: Sequence[str]) -> Iterator[list[ManifestRow]]:
    names = [str(manifest_path(Path(), shard)) for shard in shards]
    for shard, content in zip(shards, read_files(out, names), strict=True):
        try:
            yield parse_manifest(manifest_path(out, shard), io.BytesIO(content))
        except ValueError as error:
            raise UserError(str(error)) from error


def _rewrite(out: StorePath, shard: str, rows: Sequence[ManifestRow]) -> None:
    """Replace the manifest of a shard. Its marker comes first: a manifest that is older than its
    marker still has undecided splits, so that the next run writes it again."""
    content = encode_manifest(rows, {resolution for row in rows for resolution in row.tokens})
    path = marker_path(out, shard, MANIFEST)
    file = CommittedFile(
        path=str(manifest_path(Path(), shard)),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    old = CommitMarker.from_json(path.read_text(encoding="utf-8"))
    marker = replace(old, bytes=file.bytes, files=(file,)).to_json()
    if isinstance(path, Path):
        write_atomically(path, marker, durable=True)
    else:
        write_file(path, marker.encode())
    write_file(manifest_path(out, shard), content)
