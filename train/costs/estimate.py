"""Time, cost and data of the paper's schedule, from measured runs, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.product import Product, is_product_name
from pipeline.storage.commit_marker import read_marker
from pipeline.storage.layout import list_commits
from pipeline.storage.remote import StorePath
from train.costs.config import EstimateTraining, GpuName
from train.costs.gpus import CEILINGS, measured_gpu, time_ratios
from train.costs.measured_run import MeasuredRun, read_run
from train.costs.schedule import (
    BRICK_BYTES,
    LATENT_BYTES,
    PAPER_GPU_DAYS,
    RENDER_BYTES,
    Reading,
    Stage,
    closest_run,
    reading,
    stages,
    step_seconds,
)

DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class GpuCost:
    """GPU-days and dollars of a stage on one kind of GPU: the smallest and the largest."""

    days: tuple[float, float]
    usd: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage takes.

    Attributes:
        stage: Name of the stage.
        run: Directory of the measured run. "" if no run has the stage's model.
        costs: GPU-days and dollars by GPU. Empty without a run.
        reading: Bytes that are read. None without a run.
    """

    stage: str
    run: str
    costs: Mapping[GpuName, GpuCost]
    reading: Reading | None


def estimate(cfg: EstimateTraining) -> tuple[list[StageEstimate], list[str]]:
    """Estimate every stage of the schedule.

    Returns:
        The stages, and the assumptions as sentences.

    Raises:
        UserError: If a run cannot be read, or was measured on an unknown device.
    """
    runs = [read_run(out, cfg.warmup_share) for out in cfg.runs]
    sizes = byte_sizes(cfg.data)
    found = [_estimate_stage(stage, runs, cfg, sizes) for stage in stages(cfg)]
    return found, _assumptions(runs, cfg, sizes)


def _estimate_stage(
    stage: Stage, runs: list[MeasuredRun], cfg: EstimateTraining, sizes: Mapping[str, float]
) -> StageEstimate:
    run = closest_run(stage, runs)
    if run is None:
        return StageEstimate(stage=stage.name, run="", costs={}, reading=None)
    source = measured_gpu(run.device, cfg)
    efficiency = cfg.scaling if run.ranks == 1 and cfg.gpus > 1 else 1.0
    step_s = step_seconds(stage, run) / efficiency
    total_s = step_s * (stage.steps * cfg.gpus if stage.steps else stage.assets)
    error = run.error_s / run.step_s
    costs: dict[GpuName, GpuCost] = {}
    for gpu in CEILINGS:
        low, high = time_ratios(source, gpu)
        days = (total_s * low * (1 - error) / DAY_S, total_s * high * (1 + error) / DAY_S)
        price = {"a100": cfg.a100_usd, "h100": cfg.h100_usd, "h200": cfg.h200_usd}[gpu]
        costs[gpu] = GpuCost(days=days, usd=(24 * price * days[0], 24 * price * days[1]))
    return StageEstimate(
        stage=stage.name,
        run=str(run.out),
        costs=costs,
        reading=reading(stage, cfg, sizes, step_s),
    )


def byte_sizes(data: StorePath | None) -> dict[str, float]:
    """Return the stored bytes of a cell of "bricks" and "latents", and of a "render".

    Args:
        data: Build whose commit markers are read. None takes those of the documentation, as do
            products that the build lacks.
    """
    sizes = {"bricks": BRICK_BYTES, "latents": LATENT_BYTES, "render": RENDER_BYTES}
    if data is None:
        return sizes
    bytes_of = {"bricks": 0, "render": 0}
    counts = {"bricks": 0, "render": 0}
    for shard, names in list_commits(data).items():
        for name in filter(is_product_name, names):
            kind = "bricks" if Product.parse(name).kind == "sdf" else "render"
            marker = read_marker(data, shard, name)
            bytes_of[kind] += marker.bytes
            counts[kind] += marker.counts.get("tokens" if kind == "bricks" else "views", 0)
    return sizes | {name: bytes_of[name] / count for name, count in counts.items() if count}


def _assumptions(
    runs: Sequence[MeasuredRun], cfg: EstimateTraining, sizes: Mapping[str, float]
) -> list[str]:
    of_build = "the documentation" if cfg.data is None else str(cfg.data)
    measured = [
        f"{run.out} measured {run.step_s:.3g} s a step (± {run.error_s / run.step_s:.0%}), "
        f"{run.tokens:,.0f} tokens and {run.samples:.3g} assets a step and rank, on {run.ranks} x "
        f"{run.device}, waiting for data {run.data_share:.0%} of the time."
        for run in runs
    ]
    ceilings = ", ".join(
        f"{name} {ceiling.teraflops:g} TFLOP/s and {ceiling.terabytes_per_s:g} TB/s"
        for name, ceiling in CEILINGS.items()
    )
    return [
        *measured,
        "A stage is estimated from the run of its model with the most similar number of tokens, in "
        "proportion to the tokens of a step, or to its assets in the structure stage. Encoding "
        "takes a sixth of training for each token.",
        f"Times are carried over by the ratio of published ceilings ({ceilings}). The range goes "
        "from what is limited by one of them to what is limited by the other.",
        f"Each of {cfg.gpus} GPUs keeps {cfg.scaling:.0%} of the speed of one GPU; runs on several "
        "GPUs are not corrected. Validation, previews, checkpoints, restarts and evaluation are "
        "not counted.",
        f"Steps are those of the presets; assets ({cfg.assets:,}, {cfg.best:,} of them at 1024) "
        "and mean tokens are the paper's.",
        f"Bytes by {of_build}: {sizes['bricks']:.0f} for a cell of bricks, {sizes['latents']:.0f} "
        f"for a cell of latents, {sizes['render'] / 1000:.0f} kB for a render of {cfg.views}.",
        "A shard is read once an epoch, which the cache allows if it holds the shards whose assets "
        "are mixed. It drops what was not used for longest, and each node has its own.",
        f"Prices for an hour: A100 ${cfg.a100_usd:g}, H100 ${cfg.h100_usd:g}, H200 "
        f"${cfg.h200_usd:g}. Storage and transfer are not counted.",
        "The paper's own times are "
        + ", ".join(f"{days:g} A100-days for {name}" for name, days in PAPER_GPU_DAYS.items())
        + ".",
    ]


def table_lines(found: Sequence[StageEstimate], cfg: EstimateTraining) -> list[str]:
    """Return the estimate as a table in Markdown."""
    lines = [
        "| stage | measured by | "
        + " | ".join(f"{gpu.upper()}-days | $" for gpu in CEILINGS)
        + f" | read TB with {cfg.cache_gb:g} GB of cache | cache for everything TB "
        "| read TB with it | MB/s of a node |",
        "|" + "---|" * (2 + 2 * len(CEILINGS) + 4),
    ]
    totals = dict.fromkeys(CEILINGS, (0.0, 0.0, 0.0, 0.0))
    for row in found:
        if row.reading is None:
            lines.append(f"| {row.stage} | no run |" + " |" * (2 * len(CEILINGS) + 4))
            continue
        cells = []
        for gpu, cost in row.costs.items():
            cells += [_range(*cost.days), _range(*cost.usd)]
            totals[gpu] = tuple(  # type: ignore[assignment]
                a + b for a, b in zip(totals[gpu], (*cost.days, *cost.usd))
            )
        data = row.reading
        cells += [f"{data.read_tb:.3g}", f"{data.cache_tb:.3g}", f"{data.read_with_it_tb:.3g}"]
        cells.append(f"{data.megabytes_per_s:.3g}")
        lines.append(f"| {row.stage} | {row.run} | " + " | ".join(cells) + " |")
    cells = []
    for low, high, low_usd, high_usd in totals.values():
        cells += [_range(low, high), _range(low_usd, high_usd)]
    lines.append("| all measured stages | | " + " | ".join(cells) + " | | | | |")
    return lines


def _range(low: float, high: float) -> str:
    one, other = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in (low, high))
    return one if one == other else f"{one} - {other}"


def as_json(found: Sequence[StageEstimate], assumptions: Sequence[str]) -> dict[str, Any]:
    """Return the estimate as JSON content."""
    return {"stages": [asdict(row) for row in found], "assumptions": list(assumptions)}


def predicted_run(cfg: EstimateTraining) -> list[str]:
    """Return sentences about how long the first run would take with `cfg.steps` steps."""
    if cfg.steps is None:
        return []
    run = read_run(cfg.runs[0], cfg.warmup_share)
    lines = [
        f"{run.out} with {cfg.steps} steps takes {run.seconds(cfg.steps):.1f} s on the same device."
    ]
    missing = run.unmeasured(cfg.steps)
    if missing:
        lines.append(
            f"Its pauses for {', '.join(missing)} were not measured and count as nothing; measure "
            "a run that is longer than these intervals."
        )
    return lines
