"""Commits to object stores: assets and shards are copied between a node and the output's URL.

A local output needs no copies. The functions then work on the output directory itself.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import BuildConfig
from pipeline.core.product import Product
from pipeline.orchestration.asset_results import RESULT, AssetResult, parse_result, read_result
from pipeline.orchestration.commit import CommitJob, commit_locally
from pipeline.storage import layout
from pipeline.storage.commit_marker import read_marker
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, list_children

HEAD_BYTES = 1 << 16  # read first of an asset's archive: the result is its first member


def upload_asset(out: StorePath, here: Path, shard: str, uid: str) -> None:
    """Move the files of one asset from a node to the scratch of the build.

    The asset becomes one tar object whose first member is the result.

    Args:
        out: Output of the build. Nothing happens if it is a local directory.
        here: Directory of this node whose scratch holds the asset's files.
        shard: Name of the shard.
        uid: The asset.
    """
    if isinstance(out, Path):
        return
    folder = layout.scratch_folder(here, shard, uid)
    archive = folder.with_name(f"{uid}.tar")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    # Other formats may put an extended header before the first member.
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in [RESULT, *(name for name in names if name != RESULT)]:
            tar.add(folder / name, name, recursive=False)
    shutil.rmtree(folder)
    (out / layout.SCRATCH / shard / archive.name).upload(archive)


def read_results(
    cfg: BuildConfig, shard: str, uids: Sequence[str], products: Sequence[Product]
) -> dict[str, AssetResult]:
    """Read the results of earlier visits from the scratch of the build.

    Args:
        cfg: Options of this run.
        shard: Name of the shard.
        uids: The assets to look for.
        products: The products that are needed.

    Returns:
        {uid: result} of the visits that `parse_result` accepts.
    """
    results: dict[str, AssetResult | None] = {}
    if isinstance(cfg.out, Path):
        results = {uid: read_result(cfg.out, cfg, shard, uid, products) for uid in uids}
    else:
        for archive in (cfg.out / layout.SCRATCH / shard).iterdir():
            uid = archive.name.removesuffix(".tar")
            if uid in uids:
                results[uid] = parse_result(_read_first_member(archive), cfg, products)
    return {uid: result for uid, result in results.items() if result is not None}


def _read_first_member(archive: RemotePath) -> str:
    """Read the first member of a tar, in one request unless it is long."""
    data = archive.read_bytes(HEAD_BYTES)
    size = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "strict").size
    if tarfile.BLOCKSIZE + size > len(data):
        data = archive.read_bytes(tarfile.BLOCKSIZE + size)
    return data[tarfile.BLOCKSIZE :][:size].decode()


def commit(job: CommitJob) -> dict[str, int]:
    """Commit a shard to a local directory or to an object store.

    For an object store the shard is written into a workspace of this node. Then the products are
    uploaded, and the markers last. An object appears whole or not at all, so a marker is right
    about what it describes, however an earlier upload ended.

    Args:
        job: The commit.

    Returns:
        Numbers of assets in the shard: all, done, rejected and failed.
    """
    cfg, shard, out = job.config, job.shard, job.config.out
    names = (layout.MANIFEST, *job.products)
    if all(layout.marker_path(out, shard, name).exists() for name in names):
        # An earlier attempt finished, but its worker was lost before it could return.
        return read_marker(out, shard, layout.MANIFEST).counts
    if isinstance(out, Path):
        return commit_locally(job)
    with workspace(out, cfg.scratch) as here:
        for path in (layout.manifest_path, layout.stats_path):
            _download_if_there(path(out, shard), path(here, shard))
        _download_if_there(
            layout.marker_path(out, shard, layout.MANIFEST),
            layout.marker_path(here, shard, layout.MANIFEST),
        )
        wanted = {record.uid for record in job.records[: job.wanted]}
        archives = {archive.name for archive in list_children(out / layout.SCRATCH / shard)}
        for uid in sorted(uid for uid in wanted if f"{uid}.tar" in archives):
            _unpack(
                out / layout.SCRATCH / shard / f"{uid}.tar", layout.scratch_folder(here, shard, uid)
            )
        counts = commit_locally(replace(job, config=replace(cfg, out=here)))
        for product in job.products:
            for path in layout.product_paths(product, shard):
                (out / path).upload(here / path)
        for path in (layout.manifest_path, layout.stats_path):
            path(out, shard).upload(path(here, shard))
        for name in names:
            layout.marker_path(out, shard, name).upload(layout.marker_path(here, shard, name))
    (out / layout.SCRATCH / shard).delete()
    return counts


def _download_if_there(path: RemotePath, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.download(local)
    except FileNotFoundError:
        local.unlink(missing_ok=True)


def _unpack(remote: RemotePath, folder: Path) -> None:
    archive = folder.with_name(f"{folder.name}.tar")
    folder.mkdir(parents=True)
    remote.download(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
