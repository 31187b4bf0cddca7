"""The runs of `python -m benchmarks.remote_data` and their table."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
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

KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
MAX_STEPS = 1_000_000
PRODUCTS = {"vae": ("sdf",), "dit": ("latents", "renders")}  # what each stage reads


def measure(cfg: RemoteData) -> int:
    """Make the build, run everything, and write remote-data.json and RESULTS.md.

    Returns:
        0, or 1 if a stage loses more than `allowed_loss`.
    """
    began = time.monotonic()
    device = choose_device(cfg.device)
    shutil.rmtree(cfg.scratch, ignore_errors=True)
    cfg.out.mkdir(parents=True, exist_ok=True)
    data = cfg.scratch / "data"
    try:
        encoder = dino_of_random_weights() if _needs_dino(cfg) else nullcontext(None)
        with encoder as weights, _without_checkpoints():
            runs = {stage: _trainer(cfg, stage, device, weights) for stage in cfg.stages}
            seconds = _make_data(cfg, data, runs)
            rows = [_compare(cfg, stage, runs[stage], data) for stage in cfg.stages]
    finally:
        shutil.rmtree(cfg.scratch, ignore_errors=True)
    machine = (
        gpu_machine(device)
        if device.type == "cuda"
        else {"gpu": None, "python": platform.python_version(), **provenance()}
    )
    results = {
        "machine": machine,
        "cpu_cores": os.cpu_count(),
        "command": sys.argv[1:],
        "making_data_s": seconds,
        "total_s": time.monotonic() - began,
        "rows": rows,
    }
    path = cfg.out / "remote-data.json"
    path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    text = _report(cfg, results)
    (cfg.out / "RESULTS.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(any(row["loss"] > cfg.allowed_loss for row in rows))


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


def _make_data(cfg: RemoteData, data: Path, runs: dict[str, Run]) -> float:
    """Make the build in processes while the device compiles and tunes kernels on a small one.

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
            run(cfg.scratch / "small", out, LoopConfig(steps=cfg.warmup_steps + 4), CacheConfig())
        for future in copies:
            future.result()
    finish_latents(data, size)
    return time.monotonic() - began


def _compare(cfg: RemoteData, stage: str, run: Run, data: Path) -> dict[str, Any]:
    """Train a stage from the disk and from the store, and return the row of the table."""
    folder = cfg.scratch / "runs"
    loop = LoopConfig(steps=MAX_STEPS, max_minutes=cfg.seconds / 60)
    began = time.monotonic()
    steps = run(data, folder / f"{stage}-local", loop, CacheConfig())
    local_s = time.monotonic() - began
    if steps <= cfg.warmup_steps:
        steps += cfg.warmup_steps + 1  # a run of so few steps measures nothing; take some more
        run(data, folder / f"{stage}-local", LoopConfig(steps=steps), CacheConfig())
    stored = sum(product_bytes(data, name) for name in PRODUCTS[stage])
    cache = CacheConfig(dir=cfg.scratch / f"cache-{stage}", max_gb=cfg.cache_share * stored / 1e9)
    with _store(cfg, data) as url:
        began = time.monotonic()
        run(url, folder / f"{stage}-remote", LoopConfig(steps=steps), cache)
        remote_s = time.monotonic() - began
    local, remote = (
        _rows(folder / f"{stage}-{place}", cfg.warmup_steps) for place in ("local", "remote")
    )
    if [row["loss"] for row in local][:1] != [row["loss"] for row in remote][:1]:
        log.warning("%s: the first measured losses differ: other kernels ran.", stage)
    assert [row["tokens"] for row in local] == [row["tokens"] for row in remote]
    totals = [sum(row["seconds"] for row in rows) for rows in (local, remote)]
    waits = [sum(row["data_s"] for row in rows) for rows in (local, remote)]
    tokens = sum(row["tokens"] for row in local)
    return {
        "stage": stage,
        "preset": cfg.presets[0 if stage == "vae" else 1],
        "steps": len(local),
        "samples": sum(row["samples"] for row in local),
        "assets": cfg.size.assets,
        "stored_gb": stored / 1e9,
        "cache_gb": cache.max_gb,
        "tokens_per_s": [tokens / total for total in totals],
        "seconds": totals,
        "data_s": waits,
        "whole_runs_s": [local_s, remote_s],
        "loss": totals[1] / totals[0] - 1,
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
    lines = [
        f"Hardware: {machine['gpu'] or 'no GPU'}, {results['cpu_cores']} CPU cores; Python "
        f"{machine['python']}, torch {versions.get('torch')}, commit {machine.get('commit')}. "
        f"Command: `python -m benchmarks.remote_data {' '.join(results['command'])}`.",
        f"Store: {cfg.latency_ms:g} ms latency, {cfg.megabytes_per_s:g} MB/s, a process of its "
        f"own. First epoch, {cfg.token_budget} tokens a step, {cfg.workers} loader threads. The "
        f"build took {results['making_data_s']:.0f} s, everything {results['total_s']:.0f} s.",
        "",
        "| stage | data GB | cache GB | steps | assets read | tokens/s disk | tokens/s store "
        "| waiting disk / store | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        disk, store = row["tokens_per_s"]
        waiting = [wait / total for wait, total in zip(row["data_s"], row["seconds"])]
        lines.append(
            f"| {row['stage']} {row['preset']} | {row['stored_gb']:.2f} | {row['cache_gb']:.2f} "
            f"| {row['steps']} | {row['samples']} of {row['assets']} | {disk:,.0f} | {store:,.0f} "
            f"| {waiting[0]:.1%} / {waiting[1]:.1%} | {row['loss']:+.1%} |"
        )
    return "\n".join(lines) + "\n"
