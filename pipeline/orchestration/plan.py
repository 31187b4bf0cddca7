"""The plan of a build: its assets, their shards and the options that all products share.

A plan is made once. Later runs read it, so they do not list the sources again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.files import is_disk_full, write_atomically
from pipeline.core.hashing import as_options, differences, hash_of
from pipeline.core.options import Light
from pipeline.core.product import Product
from pipeline.core.provenance import FORMAT_VERSION, commit_of_code, provenance
from pipeline.core.schema import Record
from pipeline.curation.catalogue import Catalogue
from pipeline.sources import Listing
from pipeline.sources.id_list import ListedAssets, check_splits, read_id_list, warn_of_missing
from pipeline.storage.layout import CATALOGUE, PLAN, PLAN_TABLE, SCRATCH, SCREENING
from pipeline.storage.locks import workspace
from pipeline.storage.remote import RemotePath, StorePath, arrow_source, list_children

log = logging.getLogger(__name__)

PACKAGES = (  # whose versions the plan records
    "sparse3d",
    "moderngl",
    "numba",
    "numcodecs",
    "numpy",
    "pillow",
    "pyarrow",
    "scipy",
    "trimesh",
    "zarr",
)
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "source", "url", "shard")),
        ("row", pa.int32()),
        *((name, pa.string()) for name in ("licence", "sha256", "format", "metadata")),
        ("split_key", pa.string()),
    ]
)
LATER_COLUMNS = ("metadata", "split_key")  # older plans lack them
RECORD_COLUMNS = ("uid", "source", "url", "licence", "sha256", "format", *LATER_COLUMNS)
ROWS_PER_WRITE = 1 << 16
CHANGES_SHOWN = 4  # of the options in which a run differs from the plan


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """The content of plan.json.

    Args:
        format_version: Version of the file formats.
        config: The options that all products share, as JSON.
        config_hash: Hash of `config`.
        assets: Number of assets.
        shards: Number of shards.
        skipped_files: {source: number of files that it left out}.
        snapshots: {source: hash of the state of its catalogue}.
        versions: {package: version} of the code that made the plan.
        commit: Git commit of the code that made the plan, None outside a repository.
        light: Light of the renders that the build was begun with.
    """

    format_version: int
    config: dict[str, Any]
    config_hash: str
    assets: int
    shards: int
    skipped_files: dict[str, int]
    snapshots: dict[str, str]
    versions: dict[str, str | None]
    commit: str | None
    light: Light = "lamps"  # of plans that do not state it

    @property
    def shard_size(self) -> int:
        """Number of assets in a full shard."""
        return self.config["shard_size"]

    @property
    def reader_version(self) -> int:
        """Version of the mesh readers that the build was begun with."""
        return self.config.get("reader_version", 1)

    @property
    def rank(self) -> dict[str, Any] | None:
        """Options of the ranking, None in a build that does not rank."""
        return self.config.get("rank")

    def to_json(self) -> str:
        """Return the content of plan.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PlanInfo:
        """Parse the content of plan.json. Fields of newer versions are ignored.

        Raises:
            LookupError: If a field is missing.
            TypeError: If the content is not an object.
            ValueError: If `text` is not JSON.
        """
        content = json.loads(text)
        content.setdefault("light", "lamps")
        return cls(**{item.name: content[item.name] for item in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A build's plan.json and plan.parquet.

    Args:
        out: Output directory of the build.
        info: The content of plan.json.
        table: The content of plan.parquet: one row per asset with the columns COLUMNS.
    """

    out: StorePath
    info: PlanInfo
    table: pa.Table

    @property
    def assets(self) -> int:
        """Number of assets."""
        return self.table.num_rows

    @property
    def shards(self) -> list[str]:
        """Names of the shards in order."""
        return self.table["shard"].unique().to_pylist()

    def wanted(self, product: Product, shard: str) -> int:
        """Return how many of a shard's first assets are to have a product.

        The plan of a ranked build is in the order of the ranking. Its best assets have further
        products.

        Args:
            product: The product.
            shard: Name of the shard.
        """
        size, rank = self.info.shard_size, self.info.rank
        if rank is not None and product in map(Product.sdf, rank["best_resolutions"]):
            return min(max(rank["best_count"] - int(shard) * size, 0), size)
        return size

    def records(self, shard: str) -> list[Record]:
        """Return the assets of a shard in plan order."""
        size = self.info.shard_size
        rows = self.table.slice(int(shard) * size, size).select(list(RECORD_COLUMNS)).to_pylist()
        return [Record(**row) for row in rows]


def shard_name(index: int) -> str:
    """Return the name of the shard with this number, such as "000012"."""
    return f"{index:06d}"


def make_plan(cfg: BuildConfig, sources: Sequence[Listing]) -> Plan:
    """Read the plan of a build, or list the sources and write it.

    Args:
        cfg: Options of the build.
        sources: The sources. They are not used if there is a plan. The list that `cfg.ids` names
            selects their assets, except from a catalogue, which was made from listed assets.

    Raises:
        UserError: If the directory holds a build with other options or something that is not a
            build, if it cannot be written to, or if the sources have no asset.
    """
    if (cfg.out / PLAN).exists():
        return _read_matching_plan(cfg)
    check_unused(cfg.out)
    with workspace(cfg.out, cfg.scratch) as here:
        try:
            _write_plan(here, cfg, sources)
        except OSError as error:
            # An error at another path is one of a source that could not be read.
            if is_disk_full(error) or str(here) not in str(error.filename):
                raise
            raise UserError(
                f"cannot write to {here}: {error.strerror}; choose another --out"
            ) from error
        if isinstance(cfg.out, RemotePath):
            for name in (PLAN_TABLE, PLAN):
                (cfg.out / name).upload(here / name)
    return read_plan(cfg.out)


def _write_plan(here: Path, cfg: BuildConfig, sources: Sequence[Listing]) -> None:
    """Write plan.parquet and then plan.json: a plan without plan.json does not count."""
    here.mkdir(parents=True, exist_ok=True)
    partial = here / f".{PLAN_TABLE}.partial"
    matched: set[int] = set()
    is_ranked = all(isinstance(source, Catalogue) for source in sources)
    ids = None if cfg.ids is None or is_ranked else read_id_list(cfg.ids)
    if ids is not None:
        if cfg.split_column is not None:
            check_splits(ids, cfg.split_column)
        sources = [ListedAssets(source=source, ids=ids, matched=matched) for source in sources]
    records = chain.from_iterable(source.records() for source in sources)
    assets = _write_table(partial, records, cfg)
    if ids is not None and (cfg.limit is None or not assets):
        warn_of_missing(ids, matched)
    if not assets:
        partial.unlink()
        if not any(here.iterdir()):
            here.rmdir()
        raise UserError(f"no assets in {' '.join(cfg.source)}; name a source that has some")
    info = _describe(cfg, sources, assets)
    partial.replace(here / PLAN_TABLE)
    write_atomically(here / PLAN, info.to_json())


def _describe(cfg: BuildConfig, sources: Sequence[Listing], assets: int) -> PlanInfo:
    snapshots = {
        source.name: snapshot()
        for source in sources
        if (snapshot := getattr(source, "snapshot", None))
    }
    skipped = {source.name: sum(getattr(source, "skipped", {}).values()) for source in sources}
    return PlanInfo(
        format_version=FORMAT_VERSION,
        config=cfg.shared(),
        config_hash=hash_of(cfg.shared()),
        assets=assets,
        shards=-(-assets // cfg.shard_size),
        skipped_files={name: files for name, files in skipped.items() if files},
        snapshots=snapshots,
        light=cfg.planned_light,
        **provenance(PACKAGES),
    )


def check_unused(out: StorePath) -> None:
    """Check that an output is free for a new build, or holds the beginning of one.

    Raises:
        UserError: If there is something else at `out`.
    """
    is_file = isinstance(out, Path) and out.exists() and not out.is_dir()
    own_files = (PLAN_TABLE, PLAN, CATALOGUE)
    own = {*own_files, *(f".{name}.partial" for name in own_files), SCRATCH, SCREENING}
    foreign = not is_file and any(path.name not in own for path in list_children(out))
    if is_file or (foreign and not (out / PLAN).exists()):
        raise UserError(f"{out} exists and is not a build; choose another --out")


def read_plan(out: StorePath) -> Plan:
    """Read the plan of a build.

    Args:
        out: Output directory of the build.

    Raises:
        UserError: If `out` is not a build, or a build of another format version.
    """
    try:
        text = (out / PLAN).read_text(encoding="utf-8")
        version = json.loads(text)["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{out} has format_version {version}, this code reads {FORMAT_VERSION}: rebuild it"
            )
        info = PlanInfo.from_json(text)
        table = pq.read_table(arrow_source(out / PLAN_TABLE))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{out} is not a build: it has no readable plan.json and plan.parquet; give the output "
            "directory of python -m pipeline.build"
        ) from error
    for name in LATER_COLUMNS:
        if name not in table.column_names:
            table = table.append_column(name, pa.array([""] * table.num_rows, pa.string()))
    if set(table.column_names) == set(COLUMNS.names):
        table = table.select(COLUMNS.names)
    if not table.schema.equals(COLUMNS):
        raise UserError(
            f"{out / PLAN_TABLE} must have the columns {COLUMNS.names}, it has {table.column_names}"
        )
    return Plan(out=out, info=info, table=table)


def with_values_of_plan(cfg: BuildConfig) -> BuildConfig:
    """Return the options with the values that the build in `cfg.out` was begun with, if any.

    These are the reader version and, if they are not given, the topology resolution and the light.
    A ranked build whose metrics are of version 1 keeps the options of its deduplication. What is
    committed there was made with them. Its options are compared as that version knew them, and the
    runner refuses to add products of another version.

    Raises:
        UserError: If the plan cannot be read.
    """
    for out in (cfg.out, cfg.out / SCREENING):
        if (out / PLAN).exists():
            info = read_plan(out).info
            cfg = replace(cfg, reader_version=info.reader_version)
            if cfg.light is None and cfg.environment is None:
                cfg = replace(cfg, light=info.light)
            if cfg.topology_resolution is None:
                cfg = replace(cfg, topology_resolution=info.config["topology_resolution"])
            screen = info.config.get("screen")
            if screen is not None and "metrics_version" not in screen:
                cfg = replace(
                    cfg,
                    screen=replace(cfg.screen, metrics_version=1),
                    planned_dedup=info.config["rank"]["dedup"],
                )
            break
    return cfg


def _read_matching_plan(cfg: BuildConfig) -> Plan:
    plan = read_plan(cfg.out)
    changes = as_options(differences(plan.info.config, cfg.shared()))
    if changes:
        more = " ..." if len(changes) > CHANGES_SHOWN else ""
        raise UserError(
            f"{cfg.out} was built with {'; '.join(changes[:CHANGES_SHOWN])}{more}; "
            "choose another --out, or use the same options to resume it"
        )
    if plan.info.commit != commit_of_code():
        log.warning(
            "%s was planned with the code of commit %s. This code is commit %s. A + marks "
            "uncommitted changes.",
            cfg.out,
            plan.info.commit,
            commit_of_code(),
        )
    return plan


def _write_table(path: Path, records: Iterator[Record], cfg: BuildConfig) -> int:
    """Write plan.parquet and return the number of assets.

    The table is written in pieces. Ten million assets need memory for their uids only.
    """
    seen: set[str] = set()
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
        for record in records:
            if record.uid in seen:
                log.warning(
                    "%s (%s) is listed twice. The first entry counts.", record.uid, record.url
                )
                continue
            if cfg.limit is not None and len(seen) == cfg.limit:
                break
            columns["shard"].append(shard_name(len(seen) // cfg.shard_size))
            columns["row"].append(len(seen) % cfg.shard_size)
            for name in RECORD_COLUMNS:
                columns[name].append(getattr(record, name))
            seen.add(record.uid)
            if len(columns["row"]) == ROWS_PER_WRITE:
                writer.write_table(pa.table(columns, schema=COLUMNS))
                columns = {name: [] for name in COLUMNS.names}
        if columns["row"]:
            writer.write_table(pa.table(columns, schema=COLUMNS))
    return len(seen)
