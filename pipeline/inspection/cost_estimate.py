"""Cost of a large build, predicted from what a small finished build measured.

A build has up to three passes, see `pipeline.orchestration.passes`. In each pass an asset is
visited once. The model multiplies the mean cost of a visit in each pass of the small build by the
number of visits in the large build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically
from pipeline.core.product import Product, is_product_name
from pipeline.inspection.config import EstimateConfig
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.orchestration.visit_stats import read_commit_seconds
from pipeline.storage.commit_marker import CommitMarker, read_marker
from pipeline.storage.layout import PLAN, SCREENING, manifest_path, product_paths, stats_path
from pipeline.storage.remote import StorePath, arrow_source, list_children, list_files

FIRST_PASS = Product.sdf(0)  # stands for any product that the first pass of a plan makes
FIRST_PASS_FILES = 3  # manifest, its marker and stats; later passes replace them
NORMAL_90_PERCENT = 1.645  # half width of the 90% interval, in standard deviations


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Mean cost of one visit to an asset in one pass of the small build.

    Attributes:
        assets: Number of assets that were visited.
        seconds: Seconds of one CPU core, including the packing of the shard.
        error: Half of the 90% confidence interval of the mean seconds.
        gpu_seconds: Seconds of rendering on a GPU.
        fetched_bytes: Bytes of the source files.
        stored_bytes: Bytes of the products.
        files: Number of files per shard.
        shard_size: Number of assets per shard.
        memory_bytes: 99th percentile of the peak memory.
    """

    assets: int
    seconds: float
    error: float
    gpu_seconds: float
    fetched_bytes: float
    stored_bytes: float
    files: float
    shard_size: int
    memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted cost of the large build. Units are in the names; terabytes are 10^12 bytes.

    Attributes:
        core_hours_error: Half of the 90% confidence interval of the core hours.
        nodes: Number of nodes that meet the deadline.
        gigabits_per_s: Mean download rate of the whole cluster.
        wall_hours: Duration of the build on these nodes.
    """

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
    """Measure the passes of a finished build.

    Args:
        out: Output directory or URL of the build.

    Returns:
        The cost of the pass "build", and of "screen" and "best" if the build ranks its assets.

    Raises:
        UserError: If `out` is not a build, or none of its shards is finished.
    """
    plan = read_plan(out)
    rank = plan.info.rank or {}
    best = [Product.sdf(resolution) for resolution in rank.get("best_resolutions", ())]
    passes = {}
    if (out / SCREENING / PLAN).exists():
        passes["screen"] = _measure(read_plan(out / SCREENING), lambda product: True)
    passes["build"] = _measure(plan, lambda product: product not in best)
    if best:
        passes["best"] = _measure(plan, lambda product: product in best)
    return passes


def estimate_cost(passes: dict[str, Cost], cfg: EstimateConfig) -> Estimate:
    """Predict the cost of a large build.

    Args:
        passes: The passes of the small build, see `measure_passes`.
        cfg: Sizes, deadline and prices. Without screening, all assets are built.

    Raises:
        UserError: If no number of nodes meets the deadline.
    """
    visits = {
        "screen": cfg.assets,
        "build": cfg.keep if "screen" in passes else cfg.assets,
        "best": cfg.best,
    }

    def total(measure: Callable[[Cost], float]) -> float:
        return sum(visits[name] * measure(cost) for name, cost in passes.items())

    seconds = total(lambda cost: cost.seconds)
    error = math.hypot(*(visits[name] * cost.error for name, cost in passes.items()))
    gpu_seconds = total(lambda cost: cost.gpu_seconds)
    fetched_bytes = total(lambda cost: cost.fetched_bytes)
    stored_bytes = total(lambda cost: cost.stored_bytes)
    files = sum(
        math.ceil(visits[name] / cost.shard_size) * cost.files for name, cost in passes.items()
    )
    # The cluster: in every pass each core starts once.
    start_s = len(passes) * cfg.start_s
    available_s = cfg.deadline_h * 3600 - start_s
    if available_s <= 0:
        raise UserError(
            f"a deadline of {cfg.deadline_h} h is shorter than the workers' start; "
            "give a later --deadline-h"
        )
    nodes = math.ceil(seconds / cfg.busy / available_s / cfg.cores_per_node)
    cores = nodes * cfg.cores_per_node
    wall_s = seconds / cfg.busy / cores + start_s
    worker_bytes = max(cost.memory_bytes for cost in passes.values())
    return Estimate(
        core_hours=seconds / 3600,
        core_hours_error=error / 3600,
        gpu_hours=gpu_seconds / 3600,
        fetched_tb=fetched_bytes / 1e12,
        stored_tb=stored_bytes / 1e12,
        files=math.ceil(files),
        nodes=nodes,
        cores=cores,
        node_memory_gb=cfg.cores_per_node * worker_bytes / 1e9,
        gigabits_per_s=8 * fetched_bytes / wall_s / 1e9,
        wall_hours=wall_s / 3600,
        compute_usd=cores * wall_s / 3600 * cfg.core_hour_usd
        + gpu_seconds / 3600 * cfg.gpu_hour_usd,
        storage_usd_a_month=stored_bytes / 1e12 * cfg.terabyte_month_usd,
    )


def _measure(plan: Plan, includes: Callable[[Product], bool]) -> Cost:
    """Measure the visits that made, or tried to make, the products for which `includes` is true."""
    out = plan.out
    seconds: list[float] = []
    gpu_seconds: list[float] = []
    peak_bytes: list[float] = []
    fetched_bytes: list[float] = []
    files_per_shard: list[int] = []
    stored_bytes = 0
    commit_seconds = 0.0
    for shard in plan.shards:
        markers = _markers(out, shard, includes)
        if not markers:
            continue
        stats, manifest_rows = _read_tables(out, shard)
        # The stats also have the visits of other passes.
        visits = [
            row
            for row in stats.to_pylist()
            if _belongs_to_pass(json.loads(row["stage_seconds"]), includes)
        ]
        seconds += [row["seconds"] for row in visits]
        peak_bytes += [row["peak_rss_bytes"] for row in visits]
        on_gpu = any("nvidia" in name.lower() for m in markers for name in m.renderers or ())
        gpu_seconds += [
            _render_seconds(json.loads(row["stage_seconds"])) if on_gpu else 0.0 for row in visits
        ]
        bytes_of = {row["uid"]: json.loads(row["numbers"]).get("bytes", 0) for row in manifest_rows}
        fetched_bytes += [bytes_of.get(row["uid"], 0) for row in visits]
        commit_seconds += read_commit_seconds(stats) * len(visits) / max(len(stats), 1)
        stored_bytes += sum(marker.bytes for marker in markers)
        files_per_shard.append(sum(1 + _file_count(out, marker) for marker in markers))
    if not seconds:
        raise UserError(f"{out} has no finished shard to measure; let the build finish one")
    count = len(seconds)
    spread = float(np.std(seconds, ddof=1)) if count > 1 else seconds[0]
    return Cost(
        assets=count,
        seconds=float(np.mean(seconds)) + commit_seconds / count,
        error=NORMAL_90_PERCENT * spread / math.sqrt(count),
        gpu_seconds=float(np.mean(gpu_seconds)),
        fetched_bytes=float(np.mean(fetched_bytes)),
        stored_bytes=stored_bytes / count,
        files=float(np.mean(files_per_shard)) + (FIRST_PASS_FILES if includes(FIRST_PASS) else 0),
        shard_size=plan.info.shard_size,
        memory_bytes=float(np.percentile(peak_bytes, 99)),
    )


def _read_tables(out: StorePath, shard: str) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Read the stats of a committed shard, and uid and numbers from its manifest."""
    try:
        stats = pq.read_table(arrow_source(stats_path(out, shard)))
        manifest = arrow_source(manifest_path(out, shard))
        return stats, pq.read_table(manifest, columns=["uid", "numbers"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{out} is not a complete build; copy its stats and manifest, too: {error}"
        ) from error


def _markers(out: StorePath, shard: str, includes: Callable[[Product], bool]) -> list[CommitMarker]:
    """Read the commit markers of the products for which `includes` is true."""
    names = [path.name.removesuffix(".json") for path in list_children(out / "shards" / shard)]
    products = sorted(Product.parse(name) for name in names if is_product_name(name))
    return [read_marker(out, shard, product) for product in products if includes(product)]


def _file_count(out: StorePath, marker: CommitMarker) -> int:
    """Return the number of files of a product. An SDF shard is a directory, all else is a file."""
    paths = product_paths(Product.parse(marker.product), marker.shard)
    return sum(len(list_files(out / path)) if path.suffix == ".zarr" else 1 for path in paths)


def _belongs_to_pass(stages: dict[str, float], includes: Callable[[Product], bool]) -> bool:
    """Return whether a visit tried an included product, or belongs to the first pass.

    Only a visit of the first pass can end before any product.
    """
    products = [Product.parse(stage) for stage in stages if is_product_name(stage)]
    return any(includes(product) for product in products) or (not products and includes(FIRST_PASS))


def _render_seconds(stages: dict[str, float]) -> float:
    return sum(
        seconds
        for stage, seconds in stages.items()
        if is_product_name(stage) and Product.parse(stage).has_views
    )


def table_lines(estimate: Estimate, passes: dict[str, Cost], cfg: EstimateConfig) -> list[str]:
    """Return the estimate as the lines of a Markdown table."""
    measured = ", ".join(
        f"{name}: {cost.seconds:.2f} s x {cost.assets}" for name, cost in passes.items()
    )
    cluster = (
        f"{estimate.nodes} x {cfg.cores_per_node} cores, {estimate.node_memory_gb:.0f} GB each"
    )
    storage_price = f"${cfg.terabyte_month_usd:g}/TB-month"
    return [
        f"| {cfg.assets:,} assets, measured on {measured} | |",
        "|---|---|",
        f"| core-hours | {estimate.core_hours:,.0f} ± {estimate.core_hours_error:,.0f} |",
        f"| GPU-hours | {estimate.gpu_hours:,.0f} |",
        f"| downloaded | {estimate.fetched_tb:,.2f} TB, {estimate.gigabits_per_s:.2f} Gbit/s |",
        f"| stored | {estimate.stored_tb:,.2f} TB in {estimate.files:,} files |",
        f"| nodes for {cfg.deadline_h:g} h | {cluster}: {estimate.wall_hours:.1f} h |",
        f"| computing at ${cfg.core_hour_usd}/core-hour | ${estimate.compute_usd:,.0f} |",
        f"| storage at {storage_price} | ${estimate.storage_usd_a_month:,.0f} a month |",
    ]


def write_json(path: Path, estimate: Estimate, passes: dict[str, Cost]) -> None:
    """Write the estimate and the measured passes as JSON."""
    content = {
        "estimate": asdict(estimate),
        "passes": {name: asdict(cost) for name, cost in passes.items()},
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
