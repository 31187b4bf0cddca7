"""Commits one shard: its assets' files in scratch become products, a manifest, and markers, written last."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import BuildConfig
from pipeline.core.files import sync
from pipeline.core.product import Product, is_product_name, resolution_of_column
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks, Record
from pipeline.curation.screening_metrics import load_metrics, write_metrics_table
from pipeline.orchestration.asset_stages import NOTES, AssetJob, Notes, load_bricks
from pipeline.orchestration.isolated_process import Exit
from pipeline.orchestration.manifest import (
    Result,
    append_stats,
    manifest_row,
    read_manifest,
    with_products,
    write_manifest,
)
from pipeline.storage.remote import AnyStorePath, StorePath, list_files
from pipeline.storage.render_shard import ViewFolder, index_path, write_render_shard
from pipeline.storage.sdf_shard import write_sdf_shard

RESULT = "result.json"
MANIFEST = "manifest"  # the marker that goes with the manifest, which later products replace


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """One shard whose assets have all landed in scratch, or ended in an earlier visit."""

    config: BuildConfig
    shard: str
    records: tuple[Record, ...]
    products: tuple[Product, ...]  # to be made now
    wanted: int  # of the first so many records


def product_paths(product: Product, shard: str) -> list[Path]:
    """Where a product of a shard lies, relative to the output directory."""
    if product.kind == "sdf":
        return [Path("sdf", product.variant, f"{shard}.zarr")]
    if product.kind == "screen":
        return [Path("screen", product.variant, f"{shard}.parquet")]
    tar = Path("renders", product.variant, f"{shard}.tar")
    return [tar, index_path(tar)]


def marker_path(out: AnyStorePath, shard: str, product: Product | str) -> AnyStorePath:
    return out / "shards" / shard / f"{product}.json"


def manifest_path(out: AnyStorePath, shard: str) -> AnyStorePath:
    return out / "manifest" / f"{shard}.parquet"


def stats_path(out: AnyStorePath, shard: str) -> AnyStorePath:
    return out / "stats" / f"{shard}.parquet"


def scratch_folder(out: Path, shard: str, uid: str) -> Path:
    return out / ".scratch" / shard / uid


def land(job: AssetJob, end: Exit, attempts: int) -> Result:
    """Turn what a child left, however it ended, into a result, and put both in their final place in scratch."""
    notes = Notes.load(job.folder)
    status, stage, reason, numbers = notes.status, notes.stage, notes.reason, notes.numbers
    if end.reason and status != "rejected":
        status, reason = "failed", end.reason
        if end.reason == "error":
            reason = f"error_{end.detail.split(':')[0].rpartition('.')[2].lower() or 'unknown'}"
            numbers = {**numbers, "error": end.detail}
    # Where the build lies must not show in its bytes.
    numbers = json.loads(json.dumps(numbers).replace(str(job.folder), "scratch"))
    result = Result(
        uid=job.record.uid,
        status=status,
        stage=stage,
        reason=reason,
        row=notes.row,
        numbers=numbers,
        products=notes.products,
        seconds=notes.seconds,
        wall_s=end.seconds,
        peak_rss_bytes=end.peak_rss_bytes,
        host=socket.gethostname(),
        attempts=attempts,
        transient=status == "failed" and notes.transient,
    )
    shutil.rmtree(job.folder / "input", ignore_errors=True)
    (job.folder / NOTES).unlink(missing_ok=True)
    hashes = {str(product): job.config.product_hash(product) for product in job.products}
    (job.folder / RESULT).write_text(json.dumps({"hashes": hashes, "result": asdict(result)}))
    final = job.folder.with_name(job.record.uid)
    shutil.rmtree(final, ignore_errors=True)
    job.folder.replace(final)
    return result


def landed(cfg: BuildConfig, shard: str, uid: str, products: Sequence[Product]) -> Result | None:
    """What an earlier visit left in local scratch, if it tried these very products."""
    path = scratch_folder(_local(cfg), shard, uid) / RESULT
    return result_of(path.read_text(), cfg, products) if path.exists() else None


def result_of(text: str, cfg: BuildConfig, products: Sequence[Product]) -> Result | None:
    """The result that RESULT holds, if its visit tried these very products.

    And others of the same run, which are committed by now; not what another run wanted, whose traces would stay.
    """
    content = json.loads(text)
    tried = content["hashes"]
    names = {str(product) for product in products}
    hashes = {str(product): cfg.product_hash(product) for product in cfg.products}
    if not names <= set(tried) <= set(hashes):
        return None
    if any(tried[name] != hashes[name] for name in tried):
        return None
    return Result(**content["result"])


def finished(cfg: BuildConfig, shard: str) -> dict[str, dict[str, Any]]:
    """uid -> manifest row of a shard that has one; none before its first commit."""
    path = manifest_path(cfg.out, shard)
    if not path.exists() or not marker_path(cfg.out, shard, MANIFEST).exists():
        return {}
    return {row["uid"]: row for row in read_manifest(path)}


def committed(out: StorePath) -> dict[str, set[str]]:
    """The products of every shard that have a marker, "manifest" among them."""
    found: dict[str, set[str]] = {}
    for name in list_files(out / "shards"):
        shard, _, product = name.partition("/")
        if product.endswith(".json") and not product.startswith("."):
            found.setdefault(shard, set()).add(product.removesuffix(".json"))
    return found


def ended_for_good(row: dict[str, Any]) -> bool:
    """Whether an asset was turned away before any product, so that no further one can be made of it."""
    return row["status"] != "done" and not is_product_name(row["stage"])


def pack(job: PackJob) -> dict[str, int]:
    """Write the shard's products, manifest, stats and markers; remove its scratch. Returns the manifest's counts.

    The output must be a local directory.
    """
    cfg, out, shard, started = job.config, _local(job.config), job.shard, time.monotonic()
    old = finished(cfg, shard)
    results: dict[str, Result] = {}
    for record in job.records[: job.wanted]:
        result = landed(cfg, shard, record.uid, job.products)
        if result is not None:
            results[record.uid] = result
        elif not (record.uid in old and ended_for_good(old[record.uid])):
            raise RuntimeError(f"{record.uid} of shard {shard} has no result")
    markers = {str(product): _make_product(job, product, results) for product in job.products}

    rows = []
    for number, record in enumerate(job.records):
        result = results.get(record.uid)
        if record.uid in old:
            row = old[record.uid]
            rows.append(row if result is None else with_products(row, result))
        else:
            assert result is not None
            rows.append(
                manifest_row(record, result, shard=shard, row=number, val_percent=cfg.val_percent)
            )
    columns = {resolution_of_column(name) for row in rows for name in row}
    resolutions = {resolution for resolution in columns if resolution is not None}
    resolutions |= {product.resolution for product in job.products if product.kind == "sdf"}
    path = manifest_path(out, shard)
    write_manifest(path, rows, resolutions)
    append_stats(stats_path(out, shard), results.values(), time.monotonic() - started)
    statuses = {
        status: sum(row["status"] == status for row in rows)
        for status in ("done", "rejected", "failed")
    }
    counts = {"assets": len(rows), **statuses}
    markers[MANIFEST] = {"counts": counts, **_described(out, [path.relative_to(out)])}
    for product in (MANIFEST, *map(str, job.products)):
        _write_marker(
            marker_path(out, shard, product),
            {"shard": shard, "product": product, **markers[product]},
        )
    shutil.rmtree(out / ".scratch" / shard)
    return counts


def tree_sha256(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file; of a directory, the sha256 over its sorted "path\\0sha256" lines."""
    if path.is_file():
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    total, lines = 0, []
    for child in sorted(path.rglob("*"), key=lambda child: child.relative_to(path).as_posix()):
        if child.is_file():
            size, digest = tree_sha256(child)
            total += size
            lines.append(f"{child.relative_to(path).as_posix()}\0{digest}\n")
    return total, hashlib.sha256("".join(lines).encode()).hexdigest()


def _make_product(job: PackJob, product: Product, results: dict[str, Result]) -> dict[str, Any]:
    """Write a product of all assets that have it; returns its marker."""
    cfg, out = job.config, _local(job.config)
    uids = [
        record.uid
        for record in job.records
        if str(product) in getattr(results.get(record.uid), "products", {})
    ]
    paths = product_paths(product, job.shard)
    partial = out / ".scratch" / job.shard / f"{product}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts: dict[str, Any] = {"assets": len(uids)}
    extra: dict[str, Any] = {}
    if product.kind == "sdf":
        resolution = product.resolution
        bricks = _bricks(cfg, job.shard, product, uids)
        counts["tokens"] = write_sdf_shard(
            partial / paths[0].name, resolution, bricks, cfg.product_hash(product)
        )
        extra["devices"] = sorted(
            {results[uid].products[str(product)].get("device", "cpu") for uid in uids}
        )
    elif product.kind == "screen":
        rows = [
            (uid, load_metrics(scratch_folder(out, job.shard, uid) / str(product))) for uid in uids
        ]
        write_metrics_table(partial / paths[0].name, rows)
    else:
        entries = []
        for uid in uids:
            folder = scratch_folder(out, job.shard, uid) / str(product)
            entries.append((uid, ViewFolder(folder, uid, cfg.render.views, cfg.render.format)))
        write_render_shard(partial / paths[0].name, entries, cfg.render.format)
        counts["views"] = len(uids) * cfg.render.views
        extra["renderers"] = sorted(
            {results[uid].products[str(product)]["renderer"] for uid in uids}
        )
    marker_path(out, job.shard, product).unlink(
        missing_ok=True
    )  # it would outlive what it vouches for
    for path in paths:
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():  # of a pack that was killed before its marker
            shutil.rmtree(target)
        sync(partial / path.name)
        (partial / path.name).replace(target)
    return {
        "format_version": FORMAT_VERSION,
        "config": cfg.of_product(product),
        "config_hash": cfg.product_hash(product),
        "counts": counts,
        **extra,
        **_described(out, paths),
    }


def _bricks(
    cfg: BuildConfig, shard: str, product: Product, uids: Sequence[str]
) -> Iterator[tuple[str, Bricks]]:
    for uid in uids:
        yield (
            uid,
            load_bricks(scratch_folder(_local(cfg), shard, uid) / str(product), product.resolution),
        )


def _local(cfg: BuildConfig) -> Path:
    assert isinstance(cfg.out, Path), "a task works in a directory; see transfer.py"
    return cfg.out


def _described(out: Path, paths: Sequence[Path]) -> dict[str, Any]:
    files = []
    for path in paths:
        size, digest = tree_sha256(out / path)
        files.append({"path": path.as_posix(), "bytes": size, "sha256": digest})
    return {"bytes": sum(file["bytes"] for file in files), "files": files}


def _write_marker(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    sync(partial)
    partial.replace(path)
