"""Lists of the finished assets of a build: for `--ids` of another build, and for attribution."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.files import replacing
from pipeline.core.schema import Record
from pipeline.curation.catalogue import read_columns
from pipeline.curation.licences import licence_of
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.sources.id_list import FORMATS, listed_columns
from pipeline.storage.layout import MANIFEST, list_commits, manifest_path
from pipeline.storage.manifest import ManifestRow, read_manifest
from pipeline.storage.remote import StorePath, write_file

ATTRIBUTION_COLUMNS = ("uid", "author", "title", "licence", "url")
ATTRIBUTION = "attribution.csv"
SPLITS = ("train", "val")
ATTRIBUTION_FILES = (ATTRIBUTION, *(f"attribution-{split}.csv" for split in SPLITS))
GITHUB = "https://github.com/"


def finished_assets(plan: Plan) -> Iterator[tuple[Record, ManifestRow]]:
    """Yield the records and manifest rows of the finished assets in committed shards."""
    commits = list_commits(plan.out)
    for shard in plan.shards:
        if MANIFEST in commits.get(shard, ()):
            rows = {row.uid: row for row in read_manifest(manifest_path(plan.out, shard))}
            for record in plan.records(shard):
                row = rows.get(record.uid)
                if row is not None and row.status == "done":
                    yield record, row


def list_rows(out: StorePath, split: str = "all") -> list[dict[str, Any]]:
    """Return a row for each finished asset of a build.

    Args:
        out: Output directory of the build.
        split: "train", "val" or "all".

    Returns:
        {column: value} with uid, sha256, file_identifier (the asset's URL or path), source,
        licence and split, in a ranked build also score and rank, and the further columns of the
        list that the build was made from.

    Raises:
        UserError: If `out` is not a build, or no asset of the split is finished.
    """
    plan = read_plan(out)
    scores = read_columns(out, ["score", "rank"])
    rows = [
        {
            **row.listed,
            "uid": record.uid,
            "sha256": row.sha256,
            "file_identifier": record.url,
            "source": record.source,
            "licence": record.licence,
            "split": row.split,
            **scores.get(record.uid, {}),
        }
        for record, row in finished_assets(plan)
        if split in ("all", row.split)
    ]
    if not rows:
        if split == "all":
            raise UserError(f"{out} has no finished asset; let the build finish a shard")
        raise UserError(f"{out} has no finished asset of the split {split}; use --split all")
    return rows


def write_list(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows of `list_rows` as csv, json or parquet, by the extension of the path.

    Raises:
        UserError: If the extension is another one.
    """
    extension = path.suffix.lower().lstrip(".")
    if extension not in FORMATS:
        raise UserError(f"--output must be a csv, json or parquet file, got {path}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = ["uid", "sha256", "file_identifier", *(n for n in names if n not in _FIRST)]
    with replacing(path) as partial:
        if extension == "parquet":
            columns = {name: [row.get(name) for row in rows] for name in names}
            pq.write_table(pa.table(columns), partial, compression="zstd")
        elif extension == "json":
            content = [{name: row.get(name) for name in names} for row in rows]
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        else:
            partial.write_bytes(_to_csv(names, rows))


# Names of the columns of a list that state who made an asset, without case, the first one first.
LISTED_NAMES = {
    "author": ("author", "creator", "artist"),
    "title": ("title", "name"),
    "licence": ("licence", "license"),
    "page": ("page", "source_url", "homepage"),
}
_FIRST = ("uid", "sha256", "file_identifier")


def _to_csv(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        writer.writerow(
            json.dumps(value) if isinstance(value, (list, dict)) else value for value in values
        )
    return text.getvalue().encode()


def attribution_row(record: Record) -> dict[str, str]:
    """Return who made an asset by ATTRIBUTION_COLUMNS, as far as its source or its list states it.

    The source counts first, then the columns of the list (see LISTED_NAMES), then the address: its
    last part is the title, and the owner of a repository is the author.
    """
    metadata = json.loads(record.metadata or "{}")
    columns = {str(name).lower(): value for name, value in listed_columns(record.metadata).items()}
    listed = {
        name: next((str(columns[word]) for word in words if columns.get(word)), "")
        for name, words in LISTED_NAMES.items()
    }
    page = metadata.get("page") or listed["page"] or record.url
    author = metadata.get("author") or listed["author"]
    if not author and page.startswith(GITHUB):
        author = page.removeprefix(GITHUB).split("/")[0]
    licence = record.licence
    if licence == "unknown" and listed["licence"]:
        licence = licence_of(listed["licence"])
    return {
        "uid": record.uid,
        "author": str(author),
        "title": metadata.get("name") or listed["title"] or page.rstrip("/").rpartition("/")[2],
        "licence": licence,
        "url": page,
    }


def write_attribution(out: StorePath) -> None:
    """Write attribution.csv of a build, and attribution-train.csv and attribution-val.csv.

    They have one row per finished asset, in the order of the plan.

    Args:
        out: Output directory of the build.
    """
    assets = [
        (attribution_row(record), row.split) for record, row in finished_assets(read_plan(out))
    ]
    for split, name in zip(("", *SPLITS), ATTRIBUTION_FILES):
        rows = [row for row, own in assets if split in ("", own)]
        write_file(out / name, _to_csv(ATTRIBUTION_COLUMNS, rows))
