"""`python -m pipeline.estimate DIR`: what the full catalogue would cost, from what a small finished build took."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.product import Product, is_product_name
from pipeline.orchestration.commit import manifest_path, marker_path, product_paths, stats_path
from pipeline.orchestration.manifest import PACK_SECONDS
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.storage.config import PathOrUrl
from pipeline.storage.remote import StorePath, arrow_source, check_exists, list_children, list_files

log = logging.getLogger(__name__)

FIRST = Product.sdf(0)  # stands for whatever product a plan's first pass makes


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Scale the measured seconds and bytes of DIR up, and say which cluster meets a deadline at what cost."""

    directory: Annotated[
        PathOrUrl, tyro.conf.Positional
    ]  # a finished build with the options of the large one
    assets: int = 1_000_000  # raw ones in the whole catalogue
    keep: int = 452_000  # of them, where the build ranks
    best: int = 68_000  # of these, with the resolutions of the second pass
    deadline_h: float = 168.0
    cores_per_node: int = 64
    busy: float = 0.85  # share of its time that a core works on assets
    start_s: float = 90.0  # of a core, before its first asset: imports and compiled code
    core_hour_usd: float = 0.04
    gpu_hour_usd: float = 2.5
    terabyte_month_usd: float = 23.0
    json: Path | None = None  # write the numbers here, too

    def __post_init__(self):
        for name in ("assets", "keep", "best", "deadline_h", "cores_per_node"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.busy <= 1:
            raise ValueError(f"busy must be in (0, 1], got {self.busy}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one visit to an asset, on average over a pass of the small build."""

    assets: int  # that were visited
    seconds: float  # of a core, packing included
    error: float  # of that mean: half of its 90% interval
    gpu_seconds: float
    fetched_bytes: float
    stored_bytes: float
    files: float  # per shard
    shard_size: int
    memory_bytes: float  # 99th percentile of the peaks


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a catalogue costs."""

    core_hours: float
    core_hours_error: float
    gpu_hours: float
    fetched_tb: float
    stored_tb: float
    files: int
    nodes: int
    cores: int
    node_memory_gb: float
    gigabits_per_s: float
    wall_hours: float
    compute_usd: float
    storage_usd_a_month: float


def measure_passes(out: StorePath) -> dict[str, Cost]:
    """The passes of a finished build: "build" and, where it ranks, "screen" and "best". UserError if it is none."""
    plan = read_plan(out)
    rank = plan.info["config"].get("rank") or {}
    best = [Product.sdf(resolution) for resolution in rank.get("best_resolutions", ())]
    passes = {}
    if (out / "screen" / "plan.json").exists():
        passes["screen"] = _cost(read_plan(out / "screen"), lambda product: True)
    passes["build"] = _cost(plan, lambda product: product not in best)
    if best:
        passes["best"] = _cost(plan, lambda product: product in best)
    return passes


def predict(passes: dict[str, Cost], cfg: EstimateConfig) -> Estimate:
    """The model: a pass costs its mean per visit times its visits. Visits: all assets where there is no screening."""
    visits = {
        "screen": cfg.assets,
        "build": cfg.keep if "screen" in passes else cfg.assets,
        "best": cfg.best,
    }
    seconds = sum(visits[name] * cost.seconds for name, cost in passes.items())
    error = math.hypot(*(visits[name] * cost.error for name, cost in passes.items()))
    gpu_seconds = sum(visits[name] * cost.gpu_seconds for name, cost in passes.items())
    fetched = sum(visits[name] * cost.fetched_bytes for name, cost in passes.items())
    stored = sum(visits[name] * cost.stored_bytes for name, cost in passes.items())
    files = sum(
        math.ceil(visits[name] / cost.shard_size) * cost.files for name, cost in passes.items()
    )
    # Every core starts up once a pass.
    room_s = cfg.deadline_h * 3600 - len(passes) * cfg.start_s
    if room_s <= 0:
        raise UserError(f"a deadline of {cfg.deadline_h} h is shorter than the workers' start")
    nodes = math.ceil(seconds / cfg.busy / room_s / cfg.cores_per_node)
    cores = nodes * cfg.cores_per_node
    wall_s = seconds / cfg.busy / cores + len(passes) * cfg.start_s
    return Estimate(
        core_hours=seconds / 3600,
        core_hours_error=error / 3600,
        gpu_hours=gpu_seconds / 3600,
        fetched_tb=fetched / 1e12,
        stored_tb=stored / 1e12,
        files=math.ceil(files),
        nodes=nodes,
        cores=cores,
        node_memory_gb=cfg.cores_per_node
        * max(cost.memory_bytes for cost in passes.values())
        / 1e9,
        gigabits_per_s=8 * fetched / wall_s / 1e9,
        wall_hours=wall_s / 3600,
        compute_usd=cores * wall_s / 3600 * cfg.core_hour_usd
        + gpu_seconds / 3600 * cfg.gpu_hour_usd,
        storage_usd_a_month=stored / 1e12 * cfg.terabyte_month_usd,
    )


def _cost(plan: Plan, counts: Callable[[Product], bool]) -> Cost:
    """Of the visits that made, or tried to make, the products that count."""
    out, seconds, gpu, peaks, files, stored, fetched, pack = plan.out, [], [], [], [], 0, [], 0.0
    for shard in plan.shards:
        markers = _markers(out, shard, counts)
        if not markers:
            continue
        gpu_renders = any(
            "nvidia" in name.lower() for marker in markers for name in marker.get("renderers", ())
        )
        stats, rows = _tables(out, shard)
        visits = [
            row for row in stats.to_pylist() if _is_of(json.loads(row["stage_seconds"]), counts)
        ]
        seconds += [row["seconds"] for row in visits]
        peaks += [row["peak_rss_bytes"] for row in visits]
        renders = [_renders(json.loads(row["stage_seconds"])) for row in visits]
        gpu += renders if gpu_renders else [0.0] * len(visits)
        size_of = {row["uid"]: json.loads(row["numbers"]).get("bytes", 0) for row in rows}
        fetched += [size_of.get(row["uid"], 0) for row in visits]
        pack += _pack_seconds(stats) * len(visits) / max(len(stats), 1)
        stored += sum(marker["bytes"] for marker in markers)
        files.append(sum(1 + _files(out, marker) for marker in markers))
    if not seconds:
        raise UserError(f"{out} has no finished shard to learn from")
    each = np.asarray(seconds)
    spread = float(each.std(ddof=1)) if len(each) > 1 else float(each[0])
    own = (
        3 if counts(FIRST) else 0
    )  # a manifest, its marker, the stats: later passes write over those of the first
    return Cost(
        assets=len(each),
        seconds=float(each.mean()) + pack / len(each),
        error=1.645 * spread / math.sqrt(len(each)),
        gpu_seconds=float(np.mean(gpu)),
        fetched_bytes=float(np.mean(fetched)),
        stored_bytes=stored / len(each),
        files=float(np.mean(files)) + own,
        shard_size=plan.info["config"]["shard_size"],
        memory_bytes=float(np.percentile(peaks, 99)),
    )


def _tables(out: StorePath, shard: str) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Stats and manifest of a shard that has markers."""
    try:
        stats = pq.read_table(arrow_source(stats_path(out, shard)))
        return stats, pq.read_table(
            arrow_source(manifest_path(out, shard)), columns=["uid", "numbers"]
        ).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{out} is not a whole build, copy its stats and manifest, too: {error}"
        ) from error


def _markers(out: StorePath, shard: str, counts: Callable[[Product], bool]) -> list[dict[str, Any]]:
    found = [place.name.removesuffix(".json") for place in list_children(out / "shards" / shard)]
    products = sorted(Product.parse(name) for name in found if is_product_name(name))
    paths = [marker_path(out, shard, product) for product in products if counts(product)]
    return [json.loads(path.read_text()) for path in paths]


def _files(out: StorePath, marker: dict[str, Any]) -> int:
    """An SDF shard is a directory, everything else a file."""
    paths = product_paths(Product.parse(marker["product"]), marker["shard"])
    return sum(len(list_files(out / path)) if path.suffix == ".zarr" else 1 for path in paths)


def _is_of(stages: dict[str, float], counts: Callable[[Product], bool]) -> bool:
    """Whether a visit tried a product that counts, or ended before any, which only the first pass can."""
    products = [Product.parse(stage) for stage in stages if is_product_name(stage)]
    return any(counts(product) for product in products) or (not products and counts(FIRST))


def _renders(stages: dict[str, float]) -> float:
    return sum(
        seconds
        for stage, seconds in stages.items()
        if is_product_name(stage) and Product.parse(stage).kind == "renders"
    )


def _pack_seconds(stats: pa.Table) -> float:
    return float((stats.schema.metadata or {}).get(PACK_SECONDS.encode(), b"0"))


def lines(estimate: Estimate, passes: dict[str, Cost], cfg: EstimateConfig) -> list[str]:
    """The estimate as a table, in Markdown."""
    measured = ", ".join(
        f"{name}: {cost.seconds:.2f} s x {cost.assets}" for name, cost in passes.items()
    )
    shape = f"{estimate.nodes} x {cfg.cores_per_node} cores, {estimate.node_memory_gb:.0f} GB each"
    return [
        f"| {cfg.assets:,} assets, measured on {measured} | |",
        "|---|---|",
        f"| core-hours | {estimate.core_hours:,.0f} ± {estimate.core_hours_error:,.0f} |",
        f"| GPU-hours | {estimate.gpu_hours:,.0f} |",
        f"| downloaded | {estimate.fetched_tb:,.2f} TB, {estimate.gigabits_per_s:.2f} Gbit/s |",
        f"| stored | {estimate.stored_tb:,.2f} TB in {estimate.files:,} files |",
        f"| nodes for {cfg.deadline_h:g} h | {shape}: {estimate.wall_hours:.1f} h |",
        f"| computing at ${cfg.core_hour_usd}/core-hour | ${estimate.compute_usd:,.0f} |",
        f"| storage at ${cfg.terabyte_month_usd:g}/TB-month | ${estimate.storage_usd_a_month:,.0f} a month |",
    ]


def main(args: Sequence[str]) -> None:
    cfg = parse(EstimateConfig, args, prog="python -m pipeline.estimate")
    check_exists(cfg.directory)
    if cfg.json is not None and not cfg.json.absolute().parent.is_dir():
        raise UserError(
            f"no directory {cfg.json.absolute().parent} to write --json to; make it, or name another file"
        )
    passes = measure_passes(cfg.directory)
    estimate = predict(passes, cfg)
    for line in lines(estimate, passes, cfg):
        log.info("%s", line)
    if cfg.json is not None:
        content = {
            "estimate": asdict(estimate),
            "passes": {name: asdict(cost) for name, cost in passes.items()},
        }
        cfg.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
