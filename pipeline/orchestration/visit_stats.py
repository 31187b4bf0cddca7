"""What the work on a shard's assets cost: a table with one row for every visit.

The numbers differ from run to run, so they are kept apart from the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import replacing
from pipeline.core.product import Product
from pipeline.orchestration.asset_results import AssetResult

COMMIT_SECONDS = "pack_seconds"  # key in the table's metadata
STATS = pa.schema(
    [
        ("uid", pa.string()),
        ("products", pa.list_(pa.string())),  # the products that the visit made
        ("seconds", pa.float64()),
        ("peak_rss_bytes", pa.int64()),
        ("host", pa.string()),
        ("attempts", pa.int32()),
        ("stage_seconds", pa.string()),  # JSON: {stage or product: seconds}
    ]
)


def append_stats(path: Path, results: Iterable[AssetResult], commit_seconds: float = 0.0) -> None:
    """Add one row for every visit to the table of a shard.

    Args:
        path: The table. It is created if it does not exist.
        results: How the visits ended.
        commit_seconds: Seconds that the commit of the shard took. They are added to those of
            earlier commits in the table's metadata.
    """
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
    old_rows = []
    if path.exists():
        table = pq.read_table(path)
        old_rows = table.to_pylist()
        commit_seconds += read_commit_seconds(table)
    schema = STATS.with_metadata({COMMIT_SECONDS: str(round(commit_seconds, 3))})
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(old_rows + rows, schema), partial, compression="zstd")


def read_commit_seconds(table: pa.Table) -> float:
    """Return the seconds that the commits of a shard took, from the metadata of its table."""
    return float((table.schema.metadata or {}).get(COMMIT_SECONDS.encode(), b"0"))
