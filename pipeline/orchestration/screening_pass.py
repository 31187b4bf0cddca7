"""Reads the finished screening pass of a ranked build and ranks its assets."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError
from pipeline.core.hashing import to_json
from pipeline.core.product import Product, is_product_name
from pipeline.curation.catalogue import Catalogue, write_catalogue
from pipeline.curation.rank import LISTED
from pipeline.curation.screening_metrics import read_metrics_table
from pipeline.orchestration.plan import Plan
from pipeline.sources.id_list import listed_columns
from pipeline.storage.layout import manifest_path, product_paths
from pipeline.storage.remote import arrow_source, list_children

MANIFEST_COLUMNS = ["uid", "status", "stage", "reason", "sha256", "faces", "numbers"]
# The warning of missing side files, and how it began in builds by reader 1, with one line a file.
MISSING_FILES = re.compile(r"side_file_missing(?: x(\d+))?(?::|$)")
TRUTH = {"true": 1, "false": 0}
MISSING_FILE_OF_READER_1 = "missing side file"


def rank_screened(cfg: BuildConfig, screening: Plan) -> Catalogue:
    """Rank the assets of a finished screening pass and write the build's catalogue.

    Args:
        cfg: Options of the build.
        screening: Plan of the screening pass.

    Raises:
        RunError: If the screening pass is not finished.
        UserError: If no asset is kept.
    """
    options = cfg.shared()
    options = {**options, "rank": to_json(options["rank"])}
    screened = read_screened(screening)
    return write_catalogue(cfg.out, screened, cfg.rank, options=options, scratch=cfg.scratch)


def read_screened(plan: Plan) -> pa.Table:
    """Read what a screening pass found.

    Args:
        plan: Plan of the screening pass.

    Returns:
        One row per asset of the plan: its record, its verdict, the number of side files that were
        missing, and the metrics of assets that are done.

    Raises:
        RunError: If the screening pass is not finished.
    """
    out = plan.out
    product = _screening_product(plan)
    tables = []
    for number, shard in enumerate(plan.shards):
        manifest = pq.read_table(arrow_source(manifest_path(out, shard)), columns=MANIFEST_COLUMNS)
        missing_files = [_count_missing_files(text) for text in manifest["numbers"].to_pylist()]
        verdicts = manifest.drop_columns(["numbers"])
        verdicts = verdicts.append_column("missing_files", pa.array(missing_files, pa.int64()))
        size = plan.info.shard_size
        records = plan.table.slice(number * size, size)
        records = records.drop_columns(["shard", "row", "sha256", "split_key"])
        metrics = read_metrics_table(out / product_paths(product, shard)[0])
        metrics = metrics.replace_schema_metadata(None)
        tables.append(records.join(verdicts, "uid").join(metrics, "uid").sort_by("uid"))
    return _with_listed_columns(pa.concat_tables(tables))


def _with_listed_columns(table: pa.Table) -> pa.Table:
    """Append the columns that the assets carry from a list, numbers as float64, others as text.

    Some published lists write truth values as the words true and false. They count as numbers.
    """
    rows = [listed_columns(text) for text in table["metadata"].to_pylist()]
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        if all(value is None or str(value).lower() in TRUTH for value in values):
            values = [value if value is None else TRUTH[str(value).lower()] for value in values]
        if all(value is None or isinstance(value, (int, float)) for value in values):
            column = pa.array([None if v is None else float(v) for v in values], pa.float64())
        else:
            texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
            column = pa.array(texts, pa.string())
        table = table.append_column(LISTED + name, column)
    return table


def _screening_product(plan: Plan) -> Product:
    markers = list_children(plan.out / "shards" / plan.shards[0])
    names = [marker.name.removesuffix(".json") for marker in markers]
    products = [Product.parse(name) for name in names if is_product_name(name)]
    screenings = [product for product in products if product.kind == "screen"]
    if len(screenings) != 1:
        raise RunError(f"{plan.out} is not a finished screening; run the same command to resume it")
    return screenings[0]


def _count_missing_files(numbers: str) -> int:
    warnings = json.loads(numbers).get("load_warnings", ())
    matches = [match for line in warnings if (match := MISSING_FILES.match(line))]
    return sum(int(match[1] or 1) for match in matches) + sum(
        line.startswith(MISSING_FILE_OF_READER_1) for line in warnings
    )
