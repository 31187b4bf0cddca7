"""The catalogue of a ranked build: the metrics of every screened asset, and which ones are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.files import replacing
from pipeline.core.hashing import sha256_of
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Record
from pipeline.curation.config import RankConfig
from pipeline.curation.rank import funnel_rows, rank
from pipeline.storage.layout import CATALOGUE, SCREENING
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, arrow_source

REASONS_SHOWN = 5  # in the error if no asset is kept
RECORD_COLUMNS = ["uid", "source", "url", "licence", "sha256", "format", "metadata"]
GROUP = "copy_group"  # decides the split, so that copies share it
ROWS_PER_READ = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The kept assets of a ranked build as a source, the best first.

    Records have the sha256 of the bytes that were screened.

    Args:
        path: The catalogue's parquet file.
    """

    path: StorePath
    name = "catalogue"

    def snapshot(self) -> str:
        """Return the sha256 of the file."""
        if isinstance(self.path, RemotePath):
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        return sha256_of(self.path)

    def records(self) -> Iterator[Record]:
        """Yield the kept assets, the best first."""
        file = pq.ParquetFile(arrow_source(self.path))
        columns = [*RECORD_COLUMNS, "keep"]
        if GROUP in file.schema_arrow.names:  # older catalogues do not have it
            columns.append(GROUP)
        for batch in file.iter_batches(ROWS_PER_READ, columns=columns):
            for row in batch.to_pylist():
                group = row.pop(GROUP, row["uid"])
                if row.pop("keep"):
                    yield Record(**row, split_key="" if group == row["uid"] else group)


def write_catalogue(
    out: StorePath,
    screened: pa.Table,
    cfg: RankConfig,
    *,
    options: dict[str, Any],
    scratch: Path | None = None,
) -> Catalogue:
    """Rank screened assets and write the catalogue. The same input gives the same bytes.

    Args:
        out: Output directory of the build.
        screened: One row per screened asset, as `rank` takes it.
        cfg: Thresholds and numbers of assets to keep.
        options: All options of the build as JSON. The funnel quotes the thresholds among them.
        scratch: Where a node works if `out` is a URL. None takes its temporary directory.

    Raises:
        UserError: If no asset is kept.
    """
    table = rank(screened, cfg)
    funnel = funnel_rows(table, options)
    if not table["keep"].to_numpy(zero_copy_only=False).any():
        reasons = ", ".join(f"{row['assets']} {row['reason']}" for row in funnel[:REASONS_SHOWN])
        raise UserError(
            f"no asset of {out / SCREENING} is kept ({reasons}); "
            "change --rank options, or --filter options, which need another --out"
        )
    about = {"format_version": str(FORMAT_VERSION), "funnel": json.dumps(funnel)}
    with workspace(out, scratch) as here:
        with replacing(here / CATALOGUE) as partial:
            pq.write_table(table.replace_schema_metadata(about), partial, compression="zstd")
        if isinstance(out, RemotePath):
            (out / CATALOGUE).upload(here / CATALOGUE)
    return Catalogue(path=out / CATALOGUE)


def read_columns(out: StorePath, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read columns of the catalogue of a build, of which older catalogues may lack some.

    Args:
        out: Output directory of the build.
        columns: Names of the columns.

    Returns:
        {uid: {column: value}}, empty if the build has no catalogue.
    """
    path = out / CATALOGUE
    if not path.exists():
        return {}
    with pq.ParquetFile(arrow_source(path)) as file:
        existing = file.schema_arrow.names
        names = ["uid", *(name for name in columns if name in existing and name != "uid")]
        return {row["uid"]: row for row in file.read(names).to_pylist()}


def read_funnel(path: StorePath) -> list[dict[str, Any]]:
    """Read why assets are not kept.

    Args:
        path: The catalogue.

    Returns:
        One {"stage", "reason", "thresholds", "assets"} per reason, the most frequent first.
        "thresholds" are the options that decide about the reason, with their values.
    """
    metadata = pq.read_schema(arrow_source(path)).metadata or {}
    return json.loads(metadata.get(b"funnel", b"[]"))
