"""The runs of `python -m benchmarks.remote_data` and their table."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from s3fs import S3FileSystem

from benchmarks.dit_steps import dino_of_random_weights
from benchmarks.gpu import gpu_machine
from benchmarks.remote_data_build import (
    BuildSize,
    copy_shard,
    finish_latents,
    make_shard,
    product_bytes,
)
from benchmarks.remote_data_config import RemoteData
from benchmarks.throttled_store import BUCKET, running
from benchmarks.throttled_store_config import StoreConfig
from pipeline.core.devices import choose_device
from pipeline.core.errors import Reject, RunError, UserError
from pipeline.storage.remote import StorePath, store_path
from train.data.config import CacheConfig
from train.engine.checkpoint import CheckpointWriter, provenance
from train.engine.config import LoopConfig
from train.engine.distributed import World
from train.stages.dit.config import DIT_PRESETS
from train.stages.dit.run import train_dit
from train.stages.vae.config import VAE_PRESETS
from train.stages.vae.run import train_vae

log = logging.getLogger(__name__)

# A proxy of the environment must not stand between the client and the store.
KEYS = {
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_REGION": "us-east-1",
}
MAX_STEPS = 1_000_000
SLOWEST = 3.0  # times as long as from the disk, after which a run from the store is ended
READERS_S = 30.0  # seconds in which the threads of an ended run end
FAILURES = (RuntimeError, OSError, ValueError, RunError, UserError, Reject)
PRODUCTS = {"vae": ("sdf",), "dit": ("latents", "renders")}  # what each stage reads


def measure(cfg: RemoteData) -> int:
    """Make the build, run everything, and write remote-data.json and RESULTS.md.

    Both files are written after each run, so that a measurement that is cut short leaves what it
    has. A stage that fails does not keep the other from being measured.

    Returns:
        0, or 1 if a stage failed or loses more than `allowed_loss`.
    """
    began = time.monotonic()
    device = choose_device(cfg.device)
    shutil.rmtree(cfg.scratch, ignore_errors=True)
    cfg.out.mkdir(parents=True, exist_ok=True)
    data = cfg.scratch / "data"
    machine = (
        gpu_machine(device)
        if device.type == "cuda"
        else {"gpu": None, "python": platform.python_version(), **provenance()}
    )
    results = {
        "machine": machine,
        "cpu_cores": os.cpu_count(),
        "command": sys.argv[1:],
        "rows": [_row_of(cfg, stage) for stage in cfg.stages],
    }
    rows = {row["stage"]: row for row in results["rows"]}

    def save() -> str:
        results["total_s"] = time.monotonic() - began
        text = json.dumps(results, indent=1, default=str)
        (cfg.out / "remote-data.json").write_text(f"{text}\n", encoding="utf-8")
        report = _report(cfg, results)
        (cfg.out / "RESULTS.md").write_text(report, encoding="utf-8")
        return report

    try:
        encoder = dino_of_random_weights() if _needs_dino(cfg) else nullcontext(None)
        with encoder as weights, _without_checkpoints():
            runs = {stage: _trainer(cfg, stage, device, weights) for stage in cfg.stages}
            results["making_data_s"] = _make_data(cfg, data, runs, rows)
            save()
            for stage, row in rows.items():
                if row["failed"] is not None:
                    continue
                with _recorded(row):
                    row.update(_train_from_disk(cfg, stage, runs[stage], data))
                    save()
                    row.update(_train_from_store(cfg, stage, runs[stage], data, row))
                save()
    finally:
        shutil.rmtree(cfg.scratch, ignore_errors=True)
    sys.stdout.write(save())
    return int(any(row["loss"] is None or row["loss"] > cfg.allowed_loss for row in rows.values()))


def _row_of(cfg: RemoteData, stage: str) -> dict[str, Any]:
    """Return the row of a stage before anything is measured."""
    return {
        "stage": stage,
        "preset": cfg.presets[0 if stage == "vae" else 1],
        "assets": cfg.size.assets,
        "disk": None,
        "store": None,
        "loss": None,
        "failed": None,
    }


@contextmanager
def _recorded(row: dict[str, Any]) -> Iterator[None]:
    """Record a failure in a stage's row, so that the other stage is still measured."""
    try:
        yield
    except FAILURES as error:
        log.exception("%s failed.", row["stage"])
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Let runs end without a checkpoint, which takes seconds for a large model."""
    begin = CheckpointWriter.begin
    CheckpointWriter.begin = lambda _self, _step, _state: ""
    try:
        yield
    finally:
        CheckpointWriter.begin = begin


def _needs_dino(cfg: RemoteData) -> bool:
    return "dit" in cfg.stages and DIT_PRESETS[cfg.presets[1]].model.encoder.kind == "dinov2"


Run = Callable[[StorePath, Path, LoopConfig, CacheConfig], int]


def _trainer(cfg: RemoteData, stage: str, device: torch.device, weights: str | None) -> Run:
    """Return a function that trains a stage on a build, and returns the number of steps done."""
    world = World(device=device)

    def run_vae(data: StorePath, out: Path, loop: LoopConfig, cache: CacheConfig) -> int:
        preset = VAE_PRESETS[cfg.presets[0]]
        bricks = replace(
            preset.bricks,
            resolutions=(cfg.size.resolution,),
            token_budget=cfg.token_budget,
            workers=cfg.workers,
            kept_gb=0,
        )
        loop = _changed(preset.loop, loop)
        return train_vae(
            replace(preset, data=data, out=out, cache=cache, bricks=bricks, loop=loop), world
        )

    def run_dit(data: StorePath, out: Path, loop: LoopConfig, cache: CacheConfig) -> int:
        preset = DIT_PRESETS[cfg.presets[1]]
        model = preset.model
        if weights is not None:
            model = replace(model, encoder=replace(model.encoder, weights=weights))
        return train_dit(
            replace(
                preset,
                data=data,
                out=out,
                cache=cache,
                vae=None,
                init=None,
                model=model,
                resolution=cfg.size.resolution,
                held_out_views=0,
                token_budget=cfg.token_budget,
                max_tokens=None,
                workers=cfg.workers,
                flow=replace(preset.flow, loop=_changed(preset.flow.loop, loop)),
            ),
            world,
        )

    return run_vae if stage == "vae" else run_dit


def _changed(preset: LoopConfig, loop: LoopConfig) -> LoopConfig:
    """Return the preset's loop with the length of another one, and without interruptions."""
    return replace(
        preset,
        steps=loop.steps,
        max_minutes=loop.max_minutes,
        schedule="constant",
        checkpoint_every=MAX_STEPS,
        validate_every=0,
        sample_every=0,
    )


def _make_data(
    cfg: RemoteData, data: Path, runs: dict[str, Run], rows: dict[str, dict[str, Any]]
) -> float:
    """Make the build in processes while the device compiles and tunes kernels on a small one.

    A stage whose run on the small build fails is recorded as failed in its row.

    Returns:
        Seconds until the build was complete, without waiting for the device.
    """
    size = BuildSize(
        resolution=cfg.size.resolution,
        assets=cfg.size.assets,
        shard_size=cfg.size.shard_size,
        views=cfg.size.views,
        image_size=cfg.size.image_size,
    )
    small = replace(size, assets=2 * size.shard_size)
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cfg.processes, mp_context=context) as pool:
        first = [
            pool.submit(make_shard, cfg.scratch / "small", small, number)
            for number in range(small.shards)
        ]
        templates = [
            pool.submit(make_shard, data, size, number)
            for number in range(min(cfg.size.templates, size.shards))
        ]
        for future in first:
            future.result()
        finish_latents(cfg.scratch / "small", small)
        for future in templates:
            future.result()
        copies = [
            pool.submit(copy_shard, data, size, number % len(templates), number)
            for number in range(len(templates), size.shards)
        ]
        for stage, run in runs.items():
            log.info("Compiling the kernels of %s.", stage)
            out = cfg.scratch / "runs" / f"{stage}-small"
            loop = LoopConfig(steps=cfg.warmup_steps + 4)
            with _recorded(rows[stage]):
                run(cfg.scratch / "small", out, loop, CacheConfig())
        for future in copies:
            future.result()
    finish_latents(data, size)
    return time.monotonic() - began


def _train_from_disk(cfg: RemoteData, stage: str, run: Run, data: Path) -> dict[str, Any]:
    """Train a stage from the disk. Returns the entries of its row that are known by then."""
    out = cfg.scratch / "runs" / f"{stage}-disk"
    began = time.monotonic()
    steps = run(data, out, LoopConfig(steps=MAX_STEPS, max_minutes=cfg.seconds / 60), CacheConfig())
    if steps <= cfg.warmup_steps:
        steps += cfg.warmup_steps + 1  # a run of so few steps measures nothing; take some more
        run(data, out, LoopConfig(steps=steps), CacheConfig())
    stored = sum(product_bytes(data, name) for name in PRODUCTS[stage])
    return {
        "stored_gb": stored / 1e9,
        "cache_gb": cfg.cache_share * stored / 1e9,
        "disk": _sums(_rows(out, cfg.warmup_steps), began),
    }


def _train_from_store(
    cfg: RemoteData, stage: str, run: Run, data: Path, row: dict[str, Any]
) -> dict[str, Any]:
    """Train a stage from the store on the batches of the local run.

    The run ends early if it takes SLOWEST times as long as a local one. The steps that it did not
    reach are then left out of the local run, too.

    Returns:
        The remaining entries of the row, and "disk" again.
    """
    folder = cfg.scratch / "runs"
    cache = CacheConfig(dir=cfg.scratch / f"cache-{stage}", max_gb=row["cache_gb"])
    steps = row["disk"]["steps"] + cfg.warmup_steps
    minutes = SLOWEST * max(cfg.seconds, row["disk"]["whole_run_s"]) / 60
    with _store(cfg, data) as url:
        began = time.monotonic()
        loop = LoopConfig(steps=steps, max_minutes=minutes)
        run(url, folder / f"{stage}-store", loop, cache)
        remote = _rows(folder / f"{stage}-store", cfg.warmup_steps)
        store = _sums(remote, began)
        _wait_for_readers()
    local = _rows(folder / f"{stage}-disk", cfg.warmup_steps)[: len(remote)]
    if not remote:
        raise RunError(f"the run from the store took no step after the first {cfg.warmup_steps}")
    for name in ("tokens", "loss"):  # other losses mean that other kernels ran
        first_other = next(
            (n for n, pair in enumerate(zip(local, remote)) if pair[0][name] != pair[1][name]), None
        )
        if first_other is not None:
            log.warning("%s: the %s differs from measured step %d on.", stage, name, first_other)
    disk = row["disk"] | {name: value for name, value in _sums(local).items() if value is not None}
    return {
        "disk": disk,
        "store": store,
        "same_tokens": [step["tokens"] for step in local] == [step["tokens"] for step in remote],
        "same_first_loss": local[0]["loss"] == remote[0]["loss"],
        "loss": disk["tokens_per_s"] / store["tokens_per_s"] - 1,
    }


def _wait_for_readers() -> None:
    """Wait until the threads of an ended run have read what they had begun.

    Without its store, each would try again for minutes, and the process would wait for them.
    """
    deadline = time.monotonic() + READERS_S
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join(max(0.0, deadline - time.monotonic()))


def _sums(rows: list[dict[str, Any]], began: float | None = None) -> dict[str, Any]:
    """Return the speed of steps.

    Args:
        rows: Their lines of metrics.jsonl.
        began: When the whole run began, by `time.monotonic`.
    """
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "steps": len(rows),
        "samples": sum(row["samples"] for row in rows),
        "tokens": tokens,
        "seconds": seconds,
        "data_s": sum(row["data_s"] for row in rows),
        "tokens_per_s": tokens / seconds if rows else None,
        "whole_run_s": None if began is None else time.monotonic() - began,
    }


def _rows(out: Path, warmup_steps: int) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][warmup_steps:]


@contextmanager
def _store(cfg: RemoteData, data: Path) -> Iterator[StorePath]:
    """Serve the build from another process, and yield its URL."""
    store = StoreConfig(folder=data, latency_ms=cfg.latency_ms, megabytes_per_s=cfg.megabytes_per_s)
    with running(store) as endpoint:
        os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_EC2_METADATA_DISABLED="true")
        S3FileSystem.clear_instance_cache()
        yield store_path(f"s3://{BUCKET}")


def _report(cfg: RemoteData, results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = machine.get("versions", {})
    making = results.get("making_data_s")
    lines = [
        f"Hardware: {machine['gpu'] or 'no GPU'}, {results['cpu_cores']} CPU cores; Python "
        f"{machine['python']}, torch {versions.get('torch')}, commit {machine.get('commit')}. "
        f"Command: `python -m benchmarks.remote_data {' '.join(results['command'])}`.",
        f"Store: {cfg.latency_ms:g} ms latency, {cfg.megabytes_per_s:g} MB/s, a process of its "
        f"own. First epoch, {cfg.token_budget} tokens a step, {cfg.workers} loader threads. "
        + ("" if making is None else f"The build took {making:.0f} s, ")
        + f"everything {results['total_s']:.0f} s.",
        "",
        "| stage | data GB | cache GB | steps | assets read | tokens/s disk | tokens/s store "
        "| waiting disk / store | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        disk, store = row["disk"], row["store"]
        name = f"{row['stage']} {row['preset']}"
        if disk is None:
            lines.append(f"| {name} | {row['failed'] or 'not measured'} | | | | | | | |")
            continue
        store_speed, store_wait = "not measured", "-"
        if store is not None:
            store_speed = f"{store['tokens_per_s']:,.0f}"
            store_wait = f"{store['data_s'] / store['seconds']:.1%}"
        loss = row["failed"] or "-" if row["loss"] is None else f"{row['loss']:+.1%}"
        lines.append(
            f"| {name} | {row['stored_gb']:.2f} | {row['cache_gb']:.2f} | {disk['steps']} "
            f"| {disk['samples']} of {row['assets']} | {disk['tokens_per_s']:,.0f} "
            f"| {store_speed} | {disk['data_s'] / disk['seconds']:.1%} / {store_wait} | {loss} |"
        )
    return "\n".join(lines) + "\n"
