"""`python -m benchmarks.assets`: assets per hour of one machine, with the CPU or a GPU, no Ray.

There are two commands. `measure` processes the meshes of a folder with the stages of
`pipeline.build`, each asset in a process of its own, and keeps the products. `compare` compares the
products of two such runs.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.sdf_gpu import difference, machine
from pipeline.config import PRESETS, BuildConfig, PresetName
from pipeline.core.cli import command
from pipeline.core.errors import RunError, UserError
from pipeline.core.image_codec import decode
from pipeline.core.primitives.voxel_iou import intersection_over_union
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.core.subcommands import parse_subcommand
from pipeline.geometry import sdf_cuda
from pipeline.orchestration.asset_results import AssetJob, save_result
from pipeline.orchestration.asset_stages import load_bricks
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.sources import Source, open_source

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.assets"
WARM_UP = {
    "cpu": "pipeline.orchestration.asset_stages:warm_up",
    "cuda": "pipeline.orchestration.asset_stages:warm_up_cuda",
}
Row = dict[str, Any]
Visit = Callable[[IsolatedProcess, Record, str], Row]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Process and time all meshes of a folder, several at the same time."""

    meshes: Path
    """Folder of mesh files."""

    out: Path
    """Directory for assets.json and the products of each asset."""

    preset: PresetName = "full"
    """Preset of the build whose stages are run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device for the distances: cpu or cuda."""

    processes: int | None = None
    """Number of assets that are processed at the same time. None uses all cores."""

    products: tuple[str, ...] = ()
    """Products to make, such as sdf-512. If none is given, all products of the preset are made."""

    views: int | None = None
    """Number of views per asset. None takes that of the preset."""

    image_size: int | None = None
    """Width and height of a view in pixels. None takes that of the preset."""

    repeats: int = 1
    """Number of times that each asset is processed. The products of the first time are kept."""

    memory_gb: float = 8.0
    """Memory limit in GB of the process that works on an asset. It limits the address space, or
    the private memory with CUDA."""

    def __post_init__(self):
        for name in ("processes", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare distances and images of two runs, as far as both have them."""

    expected: Path
    """Output directory of the first run of measure."""

    found: Path
    """Output directory of the second run of measure."""

    out: Path | None = None
    """JSON file for the results. None writes no file."""


def build_config(cfg: Measure) -> BuildConfig:
    """Return the options of the equivalent build.

    Raises:
        UserError: If the preset does not make one of the products.
    """
    base = PRESETS[cfg.preset]
    build = replace(
        base,
        source=(f"folder:{cfg.meshes}",),
        out=cfg.out,
        device=cfg.device,
        views=base.views if cfg.views is None else cfg.views,
        image_size=base.image_size if cfg.image_size is None else cfg.image_size,
        limits=replace(base.limits, asset_memory_gb=cfg.memory_gb),
    )
    unknown = sorted(set(cfg.products) - set(map(str, build.products)))
    if unknown:
        raise UserError(
            f"preset {cfg.preset} makes {', '.join(map(str, build.products))}, "
            f"not {', '.join(unknown)}"
        )
    return build


def measure(cfg: Measure) -> Row:
    """Process all assets and write the results to `cfg.out`/assets.json.

    The smallest asset is processed first and alone, in a process without compiled code. It does not
    count. Then the largest assets come first, so that no process is busy alone at the end.

    Raises:
        UserError: If the folder has no meshes.
        RunError: If a process cannot continue, for example because the disk is full.
    """
    build = build_config(cfg)
    if cfg.device == "cuda":
        sdf_cuda.check_cuda()
    source = open_source(build.source[0])
    records = sorted(source.records(), key=lambda record: -(cfg.meshes / record.url).stat().st_size)
    processes = min(cfg.processes or os.cpu_count() or 1, len(records) * cfg.repeats)
    products = tuple(
        product for product in build.products if not cfg.products or str(product) in cfg.products
    )

    jobs = [
        (record, f"again-{n}" if n else "assets") for n in range(cfg.repeats) for record in records
    ]

    def one(server: IsolatedProcess, record: Record, name: str) -> Row:
        return visit(server, record, source, build, products, cfg.out / name)

    shutil.rmtree(cfg.out / "assets", ignore_errors=True)
    servers = [IsolatedProcess(WARM_UP[cfg.device]) for _ in range(processes)]
    try:
        began = time.monotonic()
        first = one(servers[0], *jobs[len(records) - 1])
        start_s = time.monotonic() - began
        with ThreadPoolExecutor(processes) as pool:
            # start all processes before the clock starts
            list(
                pool.map(
                    lambda server: _call(server, "builtins:bool", None, cfg.out, build), servers
                )
            )
            rows, wall_s = _all(pool, servers, jobs, one)
    finally:
        for server in servers:
            server.close()
        for old in cfg.out.glob("again-*"):
            shutil.rmtree(old, ignore_errors=True)
    results = {
        "machine": {**machine(), "cores": os.cpu_count(), "processes": processes},
        "config": {
            "preset": cfg.preset,
            "device": cfg.device,
            "products": [*map(str, products)],
            "memory_gb": cfg.memory_gb,
        }
        | {
            "views": build.views,
            "image_size": build.image_size,
            "topology_resolution": build.decision_resolution,
        },
        "start_s": start_s,  # imports and compilation of the first process, and one asset
        "first": first,
        "wall_s": wall_s,
        "assets_per_hour": 3600 * sum(row["status"] == "done" for row in rows) / wall_s,
        "rows": rows,
    }
    (cfg.out / "assets.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _all(
    pool: ThreadPoolExecutor,
    servers: Sequence[IsolatedProcess],
    jobs: Sequence[tuple[Record, str]],
    one: Visit,
) -> tuple[list[Row], float]:
    """Process all assets. Return their rows in the order of completion, and the wall seconds."""
    rows: list[Row] = []
    waiting = iter(jobs)  # shared: each thread takes the next job
    began = time.monotonic()

    def work(server: IsolatedProcess) -> None:
        for record, name in waiting:
            row = one(server, record, name)
            row["ended_s"] = time.monotonic() - began
            log.info(
                "%s: %s %s in %.1f s", row["mesh"], row["status"], row["reason"], row["wall_s"]
            )
            rows.append(row)

    list(pool.map(work, servers))
    return rows, time.monotonic() - began


def visit(
    server: IsolatedProcess,
    record: Record,
    source: Source,
    build: BuildConfig,
    products: tuple[Product, ...],
    root: Path,
) -> Row:
    """Process one asset as a build does.

    Args:
        server: The process that works on the asset.
        record: The asset.
        source: Its source.
        build: Options of the build.
        products: The products to make.
        root: The products are written to root/<uid>.
    """
    folder = root / f"{record.uid}.new"
    folder.mkdir(parents=True)
    on_gpu = "0" if build.device == "cuda" else None
    job = AssetJob(
        record=record, source=source, config=build, products=products, folder=folder, gpu=on_gpu
    )
    result = save_result(
        job, _call(server, "pipeline.orchestration.asset_stages:process", job, folder, build), 1
    )
    made = {name: value for counts in result.products.values() for name, value in counts.items()}
    return {
        "mesh": record.url,
        "uid": record.uid,
        "status": result.status,
        "reason": result.reason,
        "faces": result.row.get("faces"),
        "sign_path": result.row.get("sign_path"),
        "wall_s": result.wall_s,
        "seconds": result.seconds,
        "peak_mb": result.peak_rss_bytes >> 20,
        "tokens": {
            name: counts["tokens"] for name, counts in result.products.items() if "tokens" in counts
        },
        "device": made.get("device"),
        "renderer": made.get("renderer"),
    }


def _call(
    server: IsolatedProcess, function: str, argument: Any, folder: Path, build: BuildConfig
) -> Any:
    end = server.call(
        function,
        argument,
        log=folder / "log.txt",
        timeout_s=build.limits.asset_timeout_s,
        memory_bytes=int(build.limits.asset_memory_gb * 1e9),
        memory_limit=resource.RLIMIT_DATA if build.device == "cuda" else resource.RLIMIT_AS,
    )
    if end.reason in ("disk_full", "run_error"):
        raise RunError(end.detail or end.reason)
    return end


def table(results: Row) -> str:
    """Format the seconds of each stage as a Markdown table, with medians and means."""
    stages = ["topology", *results["config"]["products"]]
    head = ["mesh", "faces", *stages, "rest", "all", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    numbers: list[list[float]] = []
    for row in sorted(results["rows"], key=lambda row: (row["mesh"], row["ended_s"])):
        if row["status"] != "done":
            lines.append(
                f"| {row['mesh']} | {row['status']}: {row['reason']} |" + " |" * (len(head) - 2)
            )
            continue
        spent = [row["seconds"].get(stage, 0.0) for stage in stages]
        numbers.append([*spent, row["wall_s"] - sum(spent), row["wall_s"], row["peak_mb"]])
        lines.append(
            "| " + " | ".join([row["mesh"], str(row["faces"]), *map(_short, numbers[-1])]) + " |"
        )
    for name, of in (("median", statistics.median), ("mean", statistics.fmean)) if numbers else ():
        lines.append(
            "| " + " | ".join([name, "", *(_short(of(column)) for column in zip(*numbers))]) + " |"
        )
    drawn = sorted(
        {
            f"{row['device']}; {row['renderer']}"
            for row in results["rows"]
            if row["status"] == "done"
        }
    )
    processes, wall_s = results["machine"]["processes"], results["wall_s"]
    done = f"{len(numbers)} visits by {processes} processes in {wall_s:.1f} s"
    return (
        "\n".join([*lines, "", f"{done}: {results['assets_per_hour']:.0f} assets an hour", *drawn])
        + "\n"
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def compare(cfg: Compare) -> Row:
    """Compare the products of two runs.

    Returns:
        "sdf": a row per asset and resolution. "views": a row per view.

    Raises:
        UserError: If the runs have no product in common.
    """
    folders = [path for path in sorted((cfg.expected / "assets").glob("*/*")) if path.is_dir()]
    pairs = [(path, cfg.found / path.relative_to(cfg.expected)) for path in folders]
    pairs = [(path, other) for path, other in pairs if other.is_dir()]
    if not pairs:
        raise UserError(f"{cfg.expected} and {cfg.found} have no product of an asset in common")
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        rows = [
            row for some in pool.map(lambda pair: _compare_product(*pair), pairs) for row in some
        ]
    results = {
        "sdf": [row for row in rows if "resolution" in row],
        "views": [row for row in rows if "view" in row],
    }
    if cfg.out is not None:
        cfg.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _compare_product(expected: Path, found: Path) -> list[Row]:
    """Compare one product of one asset."""
    uid, product = expected.parts[-2:]
    if (made := Product.parse(product)).kind == "sdf":
        R = made.resolution
        return [
            {
                "uid": uid,
                "resolution": R,
                **difference(load_bricks(found, R), load_bricks(expected, R)),
            }
        ]
    images, other_images = (
        {path.stem: path for path in folder.iterdir() if path.suffix != ".json"}
        for folder in (expected, found)
    )
    return [
        {
            "uid": uid,
            "view": view,
            **compare_images(
                decode(images[view].read_bytes()), decode(other_images[view].read_bytes())
            ),
        }
        for view in sorted(images.keys() & other_images.keys())
    ]


def compare_images(expected: NDArray[np.uint8], found: NDArray[np.uint8]) -> Row:
    """Compare two images.

    Args:
        expected: uint8 [height, width, 4], colour not premultiplied.
        found: The same.

    Returns:
        Mean absolute differences of colour on a black background, 0 to 1, over the image and where
        an object covers it, the share of pixels that differ by more than 16 of 255, the coverage of
        both images, and the intersection over union of their silhouettes.
    """
    a, b = (image.astype(np.float32) / 255 for image in (expected, found))
    apart = np.abs(a[..., :3] * a[..., 3:] - b[..., :3] * b[..., 3:])
    covered, other = expected[..., 3] > 127, found[..., 3] > 127
    either = covered | other
    return {
        "mean_difference": float(apart.mean()),
        "mean_difference_covered": float(apart[either].mean()) if either.any() else 0.0,
        "pixels_apart": float((apart.max(axis=-1) > 16 / 255).mean()),
        "coverage": float(covered.mean()),
        "other_coverage": float(other.mean()),
        "silhouette_iou": float(intersection_over_union(covered, other)),
    }


def summary(results: Row) -> str:
    """Format the largest differences by resolution and over all views."""
    lines = []
    for R in sorted({row["resolution"] for row in results["sdf"]}):
        rows = [row for row in results["sdf"] if row["resolution"] == R]
        worst, step = (max(row[name] for row in rows) for name in ("max_voxels", "f16_step_voxels"))
        names = ("values", "wrong_signs", "other_cells", "other_sharp_bits")
        sums = ", ".join(f"{sum(row[name] for row in rows)} {name}" for name in names)
        lines.append(
            f"R = {R}: {len(rows)} assets, at most {worst:.5f} voxels apart "
            f"(fp16 step {step:.5f}), {sums}"
        )
    if views := results["views"]:
        mean = statistics.fmean(row["mean_difference_covered"] for row in views)
        worst = max(row["mean_difference_covered"] for row in views)
        iou = min(row["silhouette_iou"] for row in views)
        lines.append(
            f"{len(views)} views: mean difference where covered {255 * mean:.3f} of 255, "
            f"in the worst view {255 * worst:.3f}; silhouette IoU at least {iou:.5f}"
        )
    return "\n".join(lines) + "\n"


def main(args: Sequence[str]) -> None:
    """Run the command."""
    name, cfg = parse_subcommand({"measure": Measure, "compare": Compare}, args, prog=PROG)
    sys.stdout.write(table(measure(cfg)) if name == "measure" else summary(compare(cfg)))


if __name__ == "__main__":
    command(main)
