"""Export of a build's assets as training samples: what to do, processes, records and lists."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import local

from pipeline.conversion.config import ExportConfig
from pipeline.conversion.vecset_asset import NAME, VecsetJob
from pipeline.conversion.vecset_layouts import LAYOUTS, Counts, Layout
from pipeline.core.errors import RunError, UserError
from pipeline.core.files import write_atomically
from pipeline.core.hashing import as_options, differences, options_of
from pipeline.core.product import Product, is_product_name
from pipeline.core.text import counted
from pipeline.inspection.asset_list import finished_assets
from pipeline.orchestration.asset_results import AssetJob, AssetNotes
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.orchestration.progress import LINE_EVERY_S
from pipeline.orchestration.recorded_options import build_options
from pipeline.sources import Source, open_source
from pipeline.storage.layout import list_commits
from pipeline.storage.locks import lock_output

log = logging.getLogger(__name__)

ABOUT = "export.json"
RECORDS = "assets.jsonl"
SPLITS = ("train", "val")
# Options that do not change what is written for an asset.
FREE_OPTIONS = (
    *("output", "directory", "source", "limit", "split"),
    *("workers", "asset_timeout_s", "asset_memory_gb"),
)


@dataclass(frozen=True, kw_only=True)
class AssetRecord:
    """How one asset ended: a line of assets.jsonl.

    Attributes:
        uid: The asset.
        shard: Its shard in the build.
        split: "train" or "val".
        status: "done", "rejected" or "failed". Failed assets are tried again by the next run.
        stage: The stage that ended the asset. "" if it is done.
        reason: A fixed word for the cause. "" if it is done.
        detail: What was measured, or the last line of the process. "" if it is done.
        smooth: Whether it has no sharp edge.
        images: Number of images that were written.
    """

    uid: str
    shard: str
    split: str
    status: str
    stage: str = ""
    reason: str = ""
    detail: str = ""
    smooth: bool = False
    images: int = 0


def export(cfg: ExportConfig) -> dict[str, int]:
    """Export the finished assets of a build. What an earlier run exported is kept.

    Returns:
        Numbers of assets: "done", "rejected", "failed" and, among the done ones, "smooth".

    Raises:
        UserError: If the directory is not a build that can be exported, or the output directory
            holds something else.
        RunError: If no asset could be exported.
    """
    plan = read_plan(cfg.directory)
    build = build_options(plan)
    layout = LAYOUTS[cfg.trainer]
    resolution = cfg.resolution or _finest(plan)
    cameras = _cameras(plan, cfg, layout)
    counts = Counts(
        surface=cfg.points or layout.counts.surface,
        space=cfg.space_points or layout.counts.space,
        near=layout.counts.near,
    )
    sources = {source.name: source for source in _open_sources(plan, cfg)}
    assets = [
        (record, row)
        for record, row in finished_assets(plan)
        if row.split and cfg.split in ("all", row.split)
    ][: cfg.limit]
    if not assets:
        raise UserError(f"{cfg.directory} has no finished asset of the split {cfg.split}")
    for record, _ in assets:
        if record.source not in sources:
            raise UserError(
                f"the assets of the source {record.source!r} are not among {sorted(sources)}; "
                "name it with --source"
            )
    with lock_output(cfg.output):
        _check_output(cfg, plan, resolution, cameras)
        records = read_records(cfg.output)
        jobs = [
            VecsetJob(
                asset=AssetJob(
                    record=dataclasses.replace(record, sha256=row.sha256),
                    source=sources[record.source],
                    config=build,
                    products=(),
                    folder=cfg.output,  # each process gets a directory of its own
                ),
                center=row.center,
                scale=row.scale,
                shard=row.shard,
                split=row.split,
                out=cfg.output.absolute(),
                trainer=cfg.trainer,
                counts=counts,
                sharp_degrees=cfg.sharp_degrees,
                fill_smooth=cfg.smooth_assets == "uniform",
                resolution=resolution,
                cameras=cameras,
                compress=cfg.compress,
                seed=cfg.seed,
            )
            for record, row in assets
        ]
        missing = [job for job in jobs if not _is_finished(job, records, layout)]
        if len(missing) < len(jobs):
            log.info("%s are exported already.", counted(len(jobs) - len(missing), "asset"))
        _run(missing, cfg, records)
        chosen = [records[job.asset.record.uid] for job in jobs]
        _write_lists(cfg.output, layout, records.values())
    total = Counter(record.status for record in chosen)
    result = {status: total[status] for status in ("done", "rejected", "failed")}
    result["smooth"] = sum(record.smooth for record in chosen if record.status == "done")
    for (status, stage, reason), number in Counter(
        (record.status, record.stage, record.reason) for record in chosen if record.reason
    ).most_common():
        log.warning("%s %s in %s: %s", counted(number, "asset"), status, stage, reason)
    if not result["done"]:
        raise RunError(f"no asset was exported; {cfg.output / RECORDS} has the reasons")
    return result


def _finest(plan: Plan) -> int:
    """Return the finest resolution of a build's bricks."""
    names = {name for products in list_commits(plan.out).values() for name in products}
    products = [Product.parse(name) for name in names if is_product_name(name)]
    resolutions = [product.resolution for product in products if product.kind == "sdf"]
    if not resolutions:
        raise UserError(
            f"{plan.out} has no bricks; name the resolution of shells: --resolution 512"
        )
    return max(resolutions)


def _cameras(plan: Plan, cfg: ExportConfig, layout: Layout) -> str | None:
    """Return the camera set whose renders are written, None if none are."""
    if not layout.image or not cfg.images:
        return None
    names = {name for products in list_commits(plan.out).values() for name in products}
    variants = sorted(Product.parse(n).variant for n in names if n.startswith("renders-"))
    if not variants:
        raise UserError(
            f"{plan.out} has no renders, which the loader of {cfg.trainer} reads as images; "
            "build them or give --no-images"
        )
    # Image-based light looks more real, and the paper's cameras see the front as its trainer did.
    return min(variants, key=lambda name: ("-ibl" not in name, "paper" not in name, name))


def _open_sources(plan: Plan, cfg: ExportConfig) -> list[Source]:
    recorded = plan.info.config["source"]
    return [open_source(spec) for spec in dict.fromkeys(cfg.source or recorded)]


def _check_output(cfg: ExportConfig, plan: Plan, resolution: int, cameras: str | None) -> None:
    """Write export.json, or compare it with the options of this run.

    Raises:
        UserError: If the directory holds something else or samples with other options.
    """
    options = {n: v for n, v in options_of(cfg).items() if n not in FREE_OPTIONS}
    about = {
        "build": plan.info.config_hash,
        "options": {**options, "resolution": resolution, "cameras": cameras},
    }
    path = cfg.output / ABOUT
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changes = as_options(differences(earlier["options"], about["options"]))
        if earlier["build"] != about["build"]:
            changes = [f"the build {earlier['build']}, now {about['build']}"]
        if changes:
            raise UserError(
                f"{cfg.output} was exported with {'; '.join(changes)}; choose another --output"
            )
        return
    if any(cfg.output.iterdir()):
        raise UserError(f"{cfg.output} is not an export and not empty; choose another --output")
    write_atomically(path, json.dumps(about, indent=1) + "\n")


def read_records(out: Path) -> dict[str, AssetRecord]:
    """Read assets.jsonl: the last record of each asset, by uid. A cut last line is left out."""
    path = out / RECORDS
    records: dict[str, AssetRecord] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = AssetRecord(**json.loads(line))
                records[record.uid] = record
    return records


def _is_finished(job: VecsetJob, records: Mapping[str, AssetRecord], layout: Layout) -> bool:
    """Return whether an asset needs no further visit: it was rejected, or its files exist."""
    record = records.get(job.asset.record.uid)
    if record is None or record.status == "failed":
        return False
    if record.status == "rejected":
        return True
    ends = ("_surface", "_sdf") if job.trainer == "hunyuan3d-2.1" else ("",)
    paths = [job.path(layout.npz, end=end) for end in ends]
    paths += [job.path(layout.image, view=view) for view in range(record.images)]
    return all(path.exists() for path in paths)


def _run(jobs: Sequence[VecsetJob], cfg: ExportConfig, records: dict[str, AssetRecord]) -> None:
    """Process assets in child processes and append their records as they end."""
    if not jobs:
        return
    own = local()  # each thread has a process of its own
    processes: list[IsolatedProcess] = []

    def visit(job: VecsetJob) -> AssetRecord:
        if not hasattr(own, "process"):
            own.process = IsolatedProcess("pipeline.conversion.vecset_asset:warm_up")
            processes.append(own.process)
        return _visit(job, own.process, cfg)

    path = cfg.output / RECORDS
    _end_last_line(path)
    pool, last_line = ThreadPoolExecutor(cfg.workers), time.monotonic()
    try:
        futures = [pool.submit(visit, job) for job in jobs]
        with path.open("a", encoding="utf-8") as file:
            for number, future in enumerate(as_completed(futures), 1):
                record = future.result()
                records[record.uid] = record
                file.write(json.dumps(dataclasses.asdict(record)) + "\n")
                file.flush()
                if time.monotonic() > last_line + LINE_EVERY_S:
                    last_line = time.monotonic()
                    log.info("%d of %s are processed.", number, counted(len(jobs), "asset"))
    finally:
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


def _end_last_line(path: Path) -> None:
    """Remove a line that an interrupted run has not finished."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            write_atomically(path, content[: content.rfind(b"\n") + 1])


def _visit(job: VecsetJob, process: IsolatedProcess, cfg: ExportConfig) -> AssetRecord:
    """Process one asset and return its record."""
    folder = Path(tempfile.mkdtemp(prefix="export-"))
    try:
        job = dataclasses.replace(job, asset=dataclasses.replace(job.asset, folder=folder))
        end = process.call(
            "pipeline.conversion.vecset_asset:process",
            job,
            log=folder / "log.txt",
            timeout_s=cfg.asset_timeout_s,
            memory_bytes=int(cfg.asset_memory_gb * 1e9),
        )
        if end.reason in ("disk_full", "run_error"):
            raise RunError(f"{job.asset.record.uid}: {end.reason} {end.detail}".strip())
        notes = AssetNotes.load(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status, reason = notes.status, notes.reason
    detail = ", ".join(f"{name}={value}" for name, value in notes.numbers.items())
    if end.reason and status != "rejected":
        status, reason, detail = "failed", end.reason, end.detail
    made = notes.products.get(NAME, {})
    record = AssetRecord(
        uid=job.asset.record.uid,
        shard=job.shard,
        split=job.split,
        status=status,
        stage=notes.stage,
        reason=reason,
        detail="" if status == "done" else detail,
        **(made if status == "done" else {}),
    )
    if status != "done":
        why = f"{reason} ({detail})" if detail else reason
        log.warning("%s: %s in %s: %s", job.asset.record.url, status, notes.stage, why)
    return record


def _write_lists(out: Path, layout: Layout, records: Iterable[AssetRecord]) -> None:
    """Write the lists of all exported assets, sorted by shard and uid."""
    done = sorted((r.shard, r.uid, r.split) for r in records if r.status == "done")
    assets = {split: [(s, u) for s, u, own in done if own == split] for split in SPLITS}
    layout.lists(out, assets)


def summary(result: Mapping[str, int], out: Path) -> str:
    """Return the last line of the command."""
    return (
        f"{counted(result['done'], 'asset')} are exported to {out}, {result['rejected']} rejected "
        f"and {result['failed']} failed. {result['smooth']} have no sharp edge."
    )
