"""The manifest: one row for every asset seen, and what became of it; stats hold what differs from run to run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.hashing import split_of
from pipeline.core.product import Product, is_product_name, resolution_of_column, tokens_column
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Record
from pipeline.storage.remote import StorePath, arrow_source

PACK_SECONDS = "pack_seconds"
STATUSES = ("done", "rejected", "failed")
HEAD = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "source", "url", "licence", "sha256", "format")),
        *((name, pa.string()) for name in ("status", "stage", "reason", "numbers")),
        *((name, pa.int64()) for name in ("faces", "vertices", "components")),
        *((name, pa.float64()) for name in ("area", "volume")),
        ("sign_path", pa.string()),
    ]
)
TAIL = pa.schema(
    [
        ("center", pa.list_(pa.float64(), 3)),
        ("scale", pa.float64()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("split", pa.string()),
    ]
)
STATS = pa.schema(
    [
        ("uid", pa.string()),
        ("products", pa.list_(pa.string())),  # what this visit to the asset made
        ("seconds", pa.float64()),
        ("peak_rss_bytes", pa.int64()),
        ("host", pa.string()),
        ("attempts", pa.int32()),
        ("stage_seconds", pa.string()),  # json: stage -> seconds
    ]
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one visit to an asset came to."""

    uid: str
    status: str  # done | rejected | failed
    stage: str  # where it ended, "" when done
    reason: str
    row: dict[str, Any] = field(default_factory=dict)  # sha256, faces, ..., scale
    numbers: dict[str, Any] = field(default_factory=dict)
    products: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # finished ones and their counts
    seconds: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    host: str = ""
    attempts: int = 1
    transient: bool = False  # failed for a reason that may be gone another time


def manifest_schema(resolutions: Iterable[int]) -> pa.Schema:
    """The columns, with one tokens_<R> for every resolution, in increasing order."""
    tokens = [pa.field(tokens_column(resolution), pa.int64()) for resolution in sorted(resolutions)]
    return pa.schema([*HEAD, *tokens, *TAIL], metadata={"format_version": str(FORMAT_VERSION)})


def manifest_row(
    record: Record, result: Result, *, shard: str, row: int, val_percent: int
) -> dict[str, Any]:
    """One row of the manifest from an asset's first visit."""
    tokens = {
        tokens_column(Product.parse(name).resolution): counts["tokens"]
        for name, counts in result.products.items()
        if "tokens" in counts
    }
    names = ("faces", "vertices", "components", "area", "volume", "sign_path", "center", "scale")
    return {
        "uid": record.uid,
        "source": record.source,
        "url": record.url,
        "licence": record.licence,
        "sha256": result.row.get("sha256", record.sha256),
        "format": record.format,
        "status": result.status,
        "stage": result.stage,
        "reason": result.reason,
        "numbers": json.dumps(result.numbers, sort_keys=True),
        **{name: result.row.get(name) for name in names},
        **tokens,
        "shard": shard,
        "row": row,
        "split": split_of(record.uid, val_percent),
    }


def with_products(old: dict[str, Any], result: Result) -> dict[str, Any]:
    """The row after a later visit made more products: as if one visit had made them all."""
    tokens = {
        tokens_column(Product.parse(name).resolution): counts["tokens"]
        for name, counts in result.products.items()
        if "tokens" in counts
    }
    numbers = {**json.loads(old["numbers"]), **result.numbers}
    row = {**old, **tokens, "numbers": json.dumps(numbers, sort_keys=True)}
    later = old["status"] == "done" or (
        result.status != "done"
        and is_product_name(result.stage)
        and Product.parse(result.stage) < Product.parse(old["stage"])
    )
    if later:
        row |= {"status": result.status, "stage": result.stage, "reason": result.reason}
    return row


def write_manifest(path: Path, rows: Sequence[dict[str, Any]], resolutions: Iterable[int]) -> None:
    """One shard's manifest, in place of an older one. The same rows give the same bytes."""
    _replace_table(path, pa.Table.from_pylist(list(rows), manifest_schema(resolutions)))


def read_manifest(path: StorePath) -> list[dict[str, Any]]:
    """The rows of one shard. ValueError if it is not a manifest of this format version."""
    try:
        table = pq.read_table(arrow_source(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a readable manifest: {error}") from error
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got {version}: rebuild it"
        )
    found = map(resolution_of_column, table.column_names)
    resolutions = [resolution for resolution in found if resolution is not None]
    want = manifest_schema(resolutions)
    if not table.schema.equals(want):
        raise ValueError(f"{path} must have the columns {want.names}, has {table.column_names}")
    return table.to_pylist()


def append_stats(path: Path, results: Iterable[Result], pack_seconds: float = 0.0) -> None:
    """Add one row for every visit to an asset, and the seconds that went into the shard itself to the table's notes."""
    rows = [
        {
            "uid": result.uid,
            "products": sorted(result.products, key=Product.parse),
            "seconds": result.wall_s,
            "peak_rss_bytes": result.peak_rss_bytes,
            "host": result.host,
            "attempts": result.attempts,
            "stage_seconds": json.dumps(result.seconds),
        }
        for result in results
    ]
    old, before = [], 0.0
    if path.exists():
        table = pq.read_table(path)
        old, before = (
            table.to_pylist(),
            float((table.schema.metadata or {}).get(PACK_SECONDS.encode(), b"0")),
        )
    notes = {PACK_SECONDS: str(round(before + pack_seconds, 3))}
    _replace_table(path, pa.Table.from_pylist(old + rows, STATS.with_metadata(notes)))


def funnel(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    """(status, stage, reason, assets), done first, then by how many."""
    counts = Counter((row["status"], row["stage"], row["reason"]) for row in rows)
    return sorted(
        ((*key, n) for key, n in counts.items()),
        key=lambda item: (item[0] != "done", -item[3], item[:3]),
    )


def _replace_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
