"""The work on one asset as a task: all its stages in a child process, and its result in scratch."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import NamedTuple

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.orchestration.asset_results import AssetJob, AssetResult, save_result
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.transfer import upload_asset
from pipeline.sources import Source
from pipeline.storage.layout import scratch_folder
from pipeline.storage.locks import workspace


class Verdict(NamedTuple):
    """How an attempt at an asset ended."""

    status: str
    stage: str
    reason: str
    transient: bool  # whether the cause may be gone later

    @classmethod
    def of(cls, result: AssetResult) -> Verdict:
        """Return the verdict of a result."""
        return cls(result.status, result.stage, result.reason, result.transient)


def isolated_process(cfg: BuildConfig) -> IsolatedProcess:
    """Return a process that runs the stages of assets, and has compiled them before the first."""
    warm_up = "warm_up_cuda" if cfg.gpu_share else "warm_up"
    return IsolatedProcess(f"pipeline.orchestration.asset_stages:{warm_up}")


def run_asset_task(
    record: Record,
    source: Source,
    cfg: BuildConfig,
    shard: str,
    products: tuple[Product, ...],
    attempt: int,
    *,
    process: IsolatedProcess,
    gpu: str | None,
) -> Verdict:
    """Run all stages of one asset in a child process.

    Args:
        record: The asset.
        source: Where its bytes come from.
        cfg: Options of the build.
        shard: Name of the asset's shard.
        products: The products to make.
        attempt: Number of the attempt, from 1.
        process: What `isolated_process` returned for `cfg`. No other task uses it meanwhile.
        gpu: The GPU of the task as CUDA numbers them. None takes any.

    Raises:
        OSError: If the disk is full.
        RunError: If the cause would make every asset fail.
    """
    with workspace(cfg.out, cfg.scratch) as here:
        job = make_job(record, source, cfg, here, shard, products, attempt, gpu)
        end = process.call(
            "pipeline.orchestration.asset_stages:process",
            job,
            log=job.folder / "log.txt",
            timeout_s=cfg.limits.asset_timeout_s,
            memory_bytes=int(cfg.limits.asset_memory_gb * 1e9),
            memory_limit=resource.RLIMIT_DATA if cfg.gpu_share else resource.RLIMIT_AS,
        )
        if end.reason == "disk_full":
            raise OSError(errno.ENOSPC, "disk full")
        if end.reason == "run_error":
            raise RunError(end.detail)
        result = save_result(job, end, attempt)
        upload_asset(cfg.out, here, shard, record.uid)
        return Verdict.of(result)


def make_job(
    record: Record,
    source: Source | None,
    cfg: BuildConfig,
    here: Path,
    shard: str,
    products: tuple[Product, ...],
    attempt: int,
    gpu: str | None = None,
) -> AssetJob:
    """Return the job with an empty directory that no other attempt uses.

    An attempt on a node that only seemed lost may still be running.
    """
    final = scratch_folder(here, shard, record.uid)
    for old in final.parent.glob(f"{record.uid}.*"):
        shutil.rmtree(old, ignore_errors=True)
    folder = final.with_name(f"{record.uid}.{attempt}-{os.getpid()}")
    folder.mkdir(parents=True)
    return AssetJob(
        record=record, source=source, config=cfg, products=products, folder=folder, gpu=gpu
    )
