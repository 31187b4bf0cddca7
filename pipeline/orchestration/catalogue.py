"""The catalogue of a ranked build: what screening found about every asset, and which ones are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import sha256_of, to_json
from pipeline.core.product import Product, is_product_name
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Record
from pipeline.curation.rank import funnel_rows, rank
from pipeline.curation.screening_metrics import read_metrics_table
from pipeline.orchestration.commit import manifest_path, product_paths
from pipeline.orchestration.plan import Plan
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, arrow_source, list_children

CATALOGUE = "catalogue.parquet"
NAMES = ("uid", "status", "stage", "reason", "sha256", "faces", "numbers")  # of the manifest


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The kept assets of a catalogue, the best first, with the sha256 of the bytes that were looked at."""

    path: StorePath
    name = "catalogue"

    def snapshot(self) -> str:
        if isinstance(self.path, RemotePath):
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        return sha256_of(self.path)

    def records(self) -> Iterator[Record]:
        names = ["uid", "source", "url", "licence", "sha256", "format", "metadata", "keep"]
        for batch in pq.ParquetFile(arrow_source(self.path)).iter_batches(1 << 16, columns=names):
            yield from (Record(**row) for row in batch.to_pylist() if row.pop("keep"))


def write_catalogue(cfg: BuildConfig, screening: Plan) -> Catalogue:
    """Ranks what `screening` found and writes cfg.out's catalogue: the same bytes from the same screening and options.

    UserError if nothing is kept.
    """
    table = rank(_screened(screening), cfg.rank)
    if not table["keep"].to_numpy(zero_copy_only=False).any():
        reasons = ", ".join(f"{row['assets']} {row['reason']}" for row in _funnel(table, cfg)[:5])
        raise UserError(
            f"no asset of {cfg.out / 'screen'} is kept ({reasons}); "
            "change --rank options, or --filter options, which need another --out"
        )
    about = {"format_version": str(FORMAT_VERSION), "funnel": json.dumps(_funnel(table, cfg))}
    with workspace(cfg.out, cfg.scratch) as here:
        partial = here / f".{CATALOGUE}.partial"
        pq.write_table(table.replace_schema_metadata(about), partial, compression="zstd")
        if isinstance(cfg.out, RemotePath):
            (cfg.out / CATALOGUE).upload(partial)
        else:
            partial.replace(cfg.out / CATALOGUE)
    return Catalogue(path=cfg.out / CATALOGUE)


def read_funnel(path: StorePath) -> list[dict]:
    """Why assets are not in a catalogue: stage, reason, thresholds by name, assets."""
    metadata = pq.read_schema(arrow_source(path)).metadata or {}
    return json.loads(metadata.get(b"funnel", b"[]"))


def _funnel(table: pa.Table, cfg: BuildConfig) -> list[dict]:
    return funnel_rows(table, {**cfg.shared(), "rank": to_json(cfg.shared()["rank"])})


def _screened(plan: Plan) -> pa.Table:
    """A row for every asset of the plan: its record, what became of it, and what was measured."""
    out, size = plan.out, plan.info["config"]["shard_size"]
    shards = plan.shards
    names = [
        place.name.removesuffix(".json") for place in list_children(out / "shards" / shards[0])
    ]
    products = [Product.parse(name) for name in names if is_product_name(name)]
    screenings = [product for product in products if product.kind == "screen"]
    if len(screenings) != 1:
        raise RunError(f"{out} is not a finished screening")
    (product,) = screenings
    parts = []
    for number, shard in enumerate(shards):
        found = pq.read_table(arrow_source(manifest_path(out, shard)), columns=list(NAMES))
        said = [json.loads(text).get("load_warnings", ()) for text in found["numbers"].to_pylist()]
        missing = [sum(line.startswith("missing side file") for line in lines) for lines in said]
        found = found.drop_columns(["numbers"]).append_column(
            "missing_files", pa.array(missing, pa.int64())
        )
        records = plan.table.slice(number * size, size).drop_columns(["shard", "row", "sha256"])
        measured = read_metrics_table(
            out / product_paths(product, shard)[0]
        ).replace_schema_metadata(None)
        joined = records.join(found, "uid").join(measured, "uid")
        parts.append(joined.sort_by("uid"))
    return pa.concat_tables(parts)
