"""The plan of a build: which assets, in which shards, under which shared config; made once, then only read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.files import is_disk_full
from pipeline.core.hashing import differences, hash_of
from pipeline.core.product import Product
from pipeline.core.provenance import FORMAT_VERSION, commit_of_code, provenance
from pipeline.core.schema import Record
from pipeline.sources import Listing
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, arrow_source, list_children

log = logging.getLogger(__name__)

PACKAGES = (
    "sparse3d",
    "numba",
    "numcodecs",
    "numpy",
    "pillow",
    "pyarrow",
    "pyrender",
    "scipy",
    "trimesh",
    "zarr",
)
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "source", "url", "shard")),
        ("row", pa.int32()),
        # The rest of the record, so that going on with a build never depends on listing the source again.
        *((name, pa.string()) for name in ("licence", "sha256", "format", "metadata")),
    ]
)
RECORD = ("uid", "source", "url", "licence", "sha256", "format", "metadata")
ROWS = 1 << 16  # written at once


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`plan.json` and `plan.parquet` of an output directory."""

    out: StorePath
    info: dict[str, Any]
    table: pa.Table

    @property
    def assets(self) -> int:
        return self.table.num_rows

    @property
    def shards(self) -> list[str]:
        return self.table["shard"].unique().to_pylist()

    def wanted(self, product: Product, shard: str) -> int:
        """How many of a shard's first records are to have a product. A ranked plan is in the order of its ranking."""
        size = self.info["config"]["shard_size"]
        rank = self.info["config"].get("rank")
        if rank is not None and product in map(Product.sdf, rank["best_resolutions"]):
            return min(max(rank["best_count"] - int(shard) * size, 0), size)
        return size

    def shard(self, name: str) -> list[Record]:
        """The assets of one shard in row order."""
        size = self.info["config"]["shard_size"]
        rows = self.table.slice(int(name) * size, size).to_pylist()
        return [Record(**{k: row[k] for k in row if k not in ("shard", "row")}) for row in rows]


def shard_name(index: int) -> str:
    return f"{index:06d}"


def make_plan(cfg: BuildConfig, sources: Sequence[Listing]) -> Plan:
    """List the sources and write the plan; or read the one that is there.

    UserError if the directory holds another configuration or something else altogether, or there is no asset.
    """
    if (cfg.out / "plan.json").exists():
        return _matching_plan(cfg)
    refuse_foreign(cfg.out)
    with workspace(cfg.out, cfg.scratch) as here:
        partial = here / ".plan.parquet.partial"
        try:
            here.mkdir(parents=True, exist_ok=True)
            assets = _write_table(
                partial, chain.from_iterable(source.records() for source in sources), cfg
            )
            if not assets:
                _forget(partial)
                raise UserError(f"no assets in {' '.join(cfg.source)}; name a source that has some")
            info = _info(cfg, sources, assets)
            partial.replace(here / "plan.parquet")
            partial = here / ".plan.json.partial"
            partial.write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
            partial.replace(here / "plan.json")  # last: a plan without it does not count
        except OSError as error:
            if is_disk_full(error) or str(here) not in str(
                error.filename
            ):  # or a source could not be read
                raise
            raise UserError(
                f"cannot write to {here}: {error.strerror}; choose another --out"
            ) from error
        if isinstance(cfg.out, RemotePath):
            for name in ("plan.parquet", "plan.json"):
                (cfg.out / name).upload(here / name)
    return read_plan(cfg.out)


def _info(cfg: BuildConfig, sources: Sequence[Listing], assets: int) -> dict[str, Any]:
    """The content of plan.json."""
    snapshots = {
        source.name: snapshot()
        for source in sources
        if (snapshot := getattr(source, "snapshot", None))
    }
    skipped = {source.name: n for source in sources if (n := getattr(source, "skipped", 0))}
    return {
        "format_version": FORMAT_VERSION,
        "config": cfg.shared(),
        "config_hash": hash_of(cfg.shared()),
        "assets": assets,
        "shards": -(-assets // cfg.shard_size),
        "skipped_files": skipped,
        "snapshots": snapshots,
        **provenance(PACKAGES),
    }


def _forget(partial: Path) -> None:
    """Leave nothing of a plan that has no asset, unless something else lies there."""
    partial.unlink()
    if not any(partial.parent.iterdir()):
        partial.parent.rmdir()


def refuse_foreign(out: StorePath) -> None:
    """UserError if there is something at `out` that is not a build, nor the beginning of one."""
    a_file = isinstance(out, Path) and out.exists() and not out.is_dir()
    if a_file or (any(_foreign(out)) and not (out / "plan.json").exists()):
        raise UserError(f"{out} exists and is not a build; choose another --out")


def read_plan(out: StorePath) -> Plan:
    """The plan of a build. UserError if `out` is not one, or of another format version."""
    try:
        info = json.loads((out / "plan.json").read_text())
        table = pq.read_table(arrow_source(out / "plan.parquet"))
        found = info["format_version"]
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{out} is not a build: it has no readable plan.json and plan.parquet"
        ) from error
    if found != FORMAT_VERSION:
        raise UserError(
            f"{out} has format_version {found}, this code reads {FORMAT_VERSION}: rebuild it"
        )
    if "metadata" not in table.column_names:  # of a plan made before there were catalogues
        table = table.append_column("metadata", pa.array([""] * table.num_rows, pa.string()))
    if not table.schema.equals(COLUMNS):
        raise UserError(
            f"{out / 'plan.parquet'} must have the columns {COLUMNS.names}, has {table.column_names}"
        )
    return Plan(out=out, info=info, table=table)


def _matching_plan(cfg: BuildConfig) -> Plan:
    plan = read_plan(cfg.out)
    changed = differences(plan.info["config"], cfg.shared())
    if changed:
        raise UserError(
            f"{cfg.out} was built with {'; '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}; "
            "choose another --out, or the same options to go on with it"
        )
    if plan.info["commit"] != commit_of_code():
        log.warning(
            "%s was planned by commit %s, this is %s",
            cfg.out,
            plan.info["commit"],
            commit_of_code(),
        )
    return plan


def _write_table(path: Path, records: Iterator[Record], cfg: BuildConfig) -> int:
    """Writes plan.parquet piece by piece, so that ten million assets need no more memory than their uids; how many."""
    seen: set[str] = set()
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
        for record in records:
            if record.uid in seen:
                log.warning("%s comes twice (%s); the first one counts", record.uid, record.url)
                continue
            if cfg.limit is not None and len(seen) == cfg.limit:
                break
            columns["shard"].append(shard_name(len(seen) // cfg.shard_size))
            columns["row"].append(len(seen) % cfg.shard_size)
            for name in RECORD:
                columns[name].append(getattr(record, name))
            seen.add(record.uid)
            if len(columns["row"]) == ROWS:
                writer.write_table(pa.table(columns, schema=COLUMNS))
                columns = {name: [] for name in COLUMNS.names}
        if columns["row"]:
            writer.write_table(pa.table(columns, schema=COLUMNS))
    return len(seen)


def _foreign(out: StorePath) -> Iterator[StorePath]:
    """What lies there and is not the beginning of a build."""
    names = ("plan.parquet", "plan.json", "catalogue.parquet")
    ours = {*names, *(f".{name}.partial" for name in names), ".scratch", "screen"}
    return islice((path for path in list_children(out) if path.name not in ours), 1)
