"""Assets and shards on their way between a node and the output, where that is a URL."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import BuildConfig
from pipeline.core.product import Product
from pipeline.orchestration.commit import (
    MANIFEST,
    RESULT,
    PackJob,
    landed,
    manifest_path,
    marker_path,
    pack,
    product_paths,
    result_of,
    scratch_folder,
    stats_path,
)
from pipeline.orchestration.manifest import Result
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, list_children

HEAD_BYTES = 1 << 16  # of a landed asset: its result comes first, and is rarely longer


def hand_in(out: StorePath, here: Path, shard: str, uid: str) -> None:
    """Put an asset that has landed in a workspace where the task that packs finds it: one object, its result first."""
    if isinstance(out, Path):
        return
    folder = scratch_folder(here, shard, uid)
    packed = folder.with_name(f"{uid}.tar")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    with tarfile.open(
        packed, "w", format=tarfile.GNU_FORMAT
    ) as tar:  # no header before that of the result
        for name in [RESULT, *(name for name in names if name != RESULT)]:
            tar.add(folder / name, name, recursive=False)
    shutil.rmtree(folder)
    (out / ".scratch" / shard / packed.name).upload(packed)


def landed_results(
    cfg: BuildConfig, shard: str, uids: Sequence[str], products: Sequence[Product]
) -> dict[str, Result]:
    """What earlier visits left in scratch, of those that tried these very products."""
    out, found = cfg.out, {}
    if isinstance(out, Path):
        found = {uid: landed(cfg, shard, uid, products) for uid in uids}
    else:
        for place in (out / ".scratch" / shard).iterdir():
            uid = place.name.removesuffix(".tar")
            if uid in uids:
                found[uid] = result_of(_head(place), cfg, products)
    return {uid: result for uid, result in found.items() if result is not None}


def _head(place: RemotePath) -> str:
    """The first member of a tar."""
    data = place.read_bytes(HEAD_BYTES)
    size = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "strict").size
    if tarfile.BLOCKSIZE + size > len(data):
        data = place.read_bytes(tarfile.BLOCKSIZE + size)
    return data[tarfile.BLOCKSIZE :][:size].decode()


def commit(job: PackJob) -> dict[str, int]:
    """`pack`; where the output is a URL, in a workspace, from which first the products are put there, last the markers.

    An object appears whole or not at all, so that a marker vouches for what is there however the upload ended before.
    """
    cfg, shard, out = job.config, job.shard, job.config.out
    markers = [marker_path(out, shard, product) for product in (MANIFEST, *job.products)]
    if all(
        marker.exists() for marker in markers
    ):  # of an attempt that was lost before it could say so
        return json.loads(markers[0].read_text())["counts"]
    if isinstance(out, Path):
        return pack(job)
    with workspace(out, cfg.scratch) as here:
        for name in (manifest_path, stats_path):
            _fetch(name(out, shard), name(here, shard))
        _fetch(markers[0], marker_path(here, shard, MANIFEST))
        for uid in sorted(
            {record.uid for record in job.records[: job.wanted]} & _handed_in(out, shard)
        ):
            _unpack(out / ".scratch" / shard / f"{uid}.tar", scratch_folder(here, shard, uid))
        counts = pack(replace(job, config=replace(cfg, out=here)))
        for product in job.products:
            for path in product_paths(product, shard):
                (out / path).upload(here / path)
        for name in (manifest_path, stats_path):
            name(out, shard).upload(name(here, shard))
        for product in (MANIFEST, *job.products):
            marker_path(out, shard, product).upload(marker_path(here, shard, product))
    (out / ".scratch" / shard).delete()
    return counts


def _handed_in(out: RemotePath, shard: str) -> set[str]:
    return {place.name.removesuffix(".tar") for place in list_children(out / ".scratch" / shard)}


def _fetch(place: StorePath, local: Path) -> None:
    """A file that may not be there yet."""
    assert isinstance(place, RemotePath)
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.download(local)
    except FileNotFoundError:
        local.unlink(missing_ok=True)


def _unpack(place: RemotePath, folder: Path) -> None:
    packed = folder.with_name(f"{folder.name}.tar")
    folder.mkdir(parents=True)
    place.download(packed)
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    packed.unlink()
