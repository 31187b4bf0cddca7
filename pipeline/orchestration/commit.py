"""The commit of one shard: its assets' files in scratch become products, a manifest and markers.

The commit markers are written last. A product counts once its marker exists.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import BuildConfig
from pipeline.core.files import sync, write_atomically
from pipeline.core.product import TRANSFORMS, Product
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks, Record
from pipeline.curation.screening_metrics import load_metrics, write_metrics_table
from pipeline.orchestration.asset_results import AssetResult, read_result
from pipeline.orchestration.asset_stages import load_bricks
from pipeline.orchestration.manifest import new_row, updated_row
from pipeline.orchestration.visit_stats import append_stats
from pipeline.sources.id_list import split_of_record
from pipeline.storage import layout
from pipeline.storage.commit_marker import CommitMarker, describe_files
from pipeline.storage.manifest import STATUSES, ManifestRow, read_manifest, write_manifest
from pipeline.storage.remote import StorePath
from pipeline.storage.render_shard import ViewFolder, write_render_shard
from pipeline.storage.sdf_shard import write_sdf_shard
from pipeline.storage.transforms_shard import MEMBER, write_transforms_shard


@dataclass(frozen=True, kw_only=True)
class CommitJob:
    """The commit of one shard. Every asset has a result in scratch or a final row in the manifest.

    Args:
        config: Options of the build.
        shard: Name of the shard.
        records: All assets of the shard in plan order.
        products: The products to commit.
        wanted: Number of the shard's first assets that are to have the products.
    """

    config: BuildConfig
    shard: str
    records: tuple[Record, ...]
    products: tuple[Product, ...]
    wanted: int


def read_committed_rows(out: StorePath, shard: str) -> dict[str, ManifestRow]:
    """Return {uid: manifest row} of a shard, empty before its first commit."""
    path = layout.manifest_path(out, shard)
    if not path.exists() or not layout.marker_path(out, shard, layout.MANIFEST).exists():
        return {}
    return {row.uid: row for row in read_manifest(path)}


def commit_locally(job: CommitJob) -> dict[str, int]:
    """Write a shard's products, manifest, statistics and markers, and delete its scratch.

    Args:
        job: The commit. The output must be a local directory.

    Returns:
        Numbers of assets in the shard: all, done, rejected and failed.

    Raises:
        RuntimeError: If an asset has no result.
    """
    cfg = job.config
    out = _local(cfg)
    started = time.monotonic()
    old_rows = read_committed_rows(out, job.shard)
    results = _read_results(job, old_rows)
    markers = [_write_product(job, product, results) for product in job.products]
    rows = _merge_rows(job, old_rows, results)
    resolutions = {resolution for row in rows for resolution in row.tokens}
    resolutions |= {product.resolution for product in job.products if product.kind == "sdf"}
    path = layout.manifest_path(out, job.shard)
    write_manifest(path, rows, resolutions)
    append_stats(layout.stats_path(out, job.shard), results.values(), time.monotonic() - started)
    statuses = {status: sum(row.status == status for row in rows) for status in STATUSES}
    counts = {"assets": len(rows), **statuses}
    files = describe_files(out, [path.relative_to(out)])
    manifest_marker = CommitMarker(
        shard=job.shard,
        product=layout.MANIFEST,
        counts=counts,
        bytes=sum(file.bytes for file in files),
        files=files,
    )
    for marker in (manifest_marker, *markers):
        marker_file = layout.marker_path(out, job.shard, marker.product)
        write_atomically(marker_file, marker.to_json(), durable=True)
    shutil.rmtree(out / layout.SCRATCH / job.shard)
    return counts


def _read_results(job: CommitJob, old_rows: dict[str, ManifestRow]) -> dict[str, AssetResult]:
    """Return the results of this run's visits by uid."""
    results: dict[str, AssetResult] = {}
    for record in job.records[: job.wanted]:
        result = read_result(_local(job.config), job.config, job.shard, record.uid, job.products)
        if result is not None:
            results[record.uid] = result
        elif record.uid not in old_rows or not old_rows[record.uid].ended_before_products:
            raise RuntimeError(f"{record.uid} of shard {job.shard} has no result")
    return results


def _merge_rows(
    job: CommitJob, old_rows: dict[str, ManifestRow], results: dict[str, AssetResult]
) -> list[ManifestRow]:
    """Return the rows of the shard: those of earlier commits, updated or new from the results."""
    rows = []
    for number, record in enumerate(job.records):
        old, result = old_rows.get(record.uid), results.get(record.uid)
        if old is not None:
            rows.append(old if result is None else updated_row(old, result))
        else:
            assert result is not None
            split = split_of_record(
                record, val_percent=job.config.val_percent, column=job.config.split_column
            )
            row = new_row(record, result, shard=job.shard, row=number, split=split)
            rows.append(row)
    return rows


def _write_product(
    job: CommitJob, product: Product, results: dict[str, AssetResult]
) -> CommitMarker:
    """Write a product of all assets that have it. Return its marker, which is not written yet."""
    cfg, out, name = job.config, _local(job.config), str(product)
    uids = [
        record.uid
        for record in job.records
        if record.uid in results and name in results[record.uid].products
    ]
    made = [results[uid].products[name] for uid in uids]
    folders = [layout.scratch_folder(out, job.shard, uid) / name for uid in uids]
    paths = layout.product_paths(product, job.shard)
    partial = out / layout.SCRATCH / job.shard / f"{product}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    counts = {"assets": len(uids)}
    devices = renderers = None
    if product.kind == "sdf":
        bricks = _read_bricks(uids, folders, product.resolution)
        counts["tokens"] = write_sdf_shard(
            partial / paths[0].name, product.resolution, bricks, cfg.product_hash(product)
        )
        devices = tuple(sorted({counted.get("device", "cpu") for counted in made}))
    elif product.kind == "screen":
        metrics = [(uid, load_metrics(folder)) for uid, folder in zip(uids, folders, strict=True)]
        write_metrics_table(partial / paths[0].name, metrics)
    else:
        if product.kind == TRANSFORMS:
            contents = [(folder / MEMBER).read_bytes() for folder in folders]
            write_transforms_shard(partial / paths[0].name, list(zip(uids, contents, strict=True)))
        else:
            extension = product.extension(cfg.render.format)
            entries = [
                (uid, ViewFolder(folder, uid, cfg.render.views, extension))
                for uid, folder in zip(uids, folders, strict=True)
            ]
            write_render_shard(partial / paths[0].name, entries, extension)
        counts["views"] = len(uids) * cfg.render.views
        renderers = tuple(sorted({counted["renderer"] for counted in made}))

    # A marker of an earlier commit must not outlive the files that it describes.
    layout.marker_path(out, job.shard, product).unlink(missing_ok=True)
    for path in paths:
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():  # of a commit that was killed before it wrote the marker
            shutil.rmtree(target)
        sync(partial / path.name)
        (partial / path.name).replace(target)
    files = describe_files(out, paths)
    return CommitMarker(
        shard=job.shard,
        product=name,
        counts=counts,
        bytes=sum(file.bytes for file in files),
        files=files,
        format_version=FORMAT_VERSION,
        config=cfg.of_product(product),
        config_hash=cfg.product_hash(product),
        devices=devices,
        renderers=renderers,
    )


def _read_bricks(
    uids: Sequence[str], folders: Sequence[Path], resolution: int
) -> Iterator[tuple[str, Bricks]]:
    for uid, folder in zip(uids, folders, strict=True):
        yield uid, load_bricks(folder, resolution)


def _local(cfg: BuildConfig) -> Path:
    assert isinstance(cfg.out, Path), "a commit works in a local directory; see transfer.py"
    return cfg.out
