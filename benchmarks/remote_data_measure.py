"""The runs of `python -m benchmarks.remote_data` and their table."""

from __future__ import annotations

import json
import logging
import math
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
from benchmarks.throttled_store import BUCKET, StoreStatistics, running, statistics_of
from benchmarks.throttled_store_config import StoreConfig
from pipeline.core.devices import choose_device
from pipeline.core.errors import Reject, RunError, UserError
from pipeline.storage.remote import StorePath, store_path
from train.data.bricks import read_build_index
from train.data.config import CacheConfig
from train.data.source import open_source
from train.engine.checkpoint import CheckpointWriter, provenance
from train.engine.config import LoopConfig
from train.engine.distributed import World
from train.engine.metrics_log import METRICS
from train.stages.dit.config import DIT_PRESETS
from train.stages.dit.run import train_dit
from train.stages.vae.config import VAE_PRESETS, VAETraining
from train.stages.vae.run import brick_stream, train_vae

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
START_S = 12.0  # that a run takes before its first step, roughly
SHORTEST_S = 4.0  # a shorter run says nothing
SAMPLES_PER_S = 5.0  # of the store's statistics
FAILURES = (RuntimeError, OSError, ValueError, RunError, UserError, Reject)
PRODUCTS = {  # what each stage reads
    "loader": ("sdf",),
    "vae": ("sdf",),
    "dit": ("latents", "renders"),
}


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
                    left = began + cfg.total_s - time.monotonic()
                    measured = sum(other["disk"] is not None for other in rows.values())
                    seconds = _seconds_of_run(cfg, left, len(rows) - measured)
                    row.update(_train_from_disk(cfg, stage, runs[stage], data, seconds))
                    save()
                    row.update(
                        _train_from_store(cfg, stage, runs[stage], data, row, began + cfg.total_s)
                    )
                save()
    finally:
        shutil.rmtree(cfg.scratch, ignore_errors=True)
    sys.stdout.write(save())
    judged = [row for stage, row in rows.items() if stage != "loader"]
    return int(any(row["loss"] is None or row["loss"] > cfg.allowed_loss for row in judged))


def _seconds_of_run(cfg: RemoteData, left_s: float, stages: int) -> float:
    """Return how long each of the two runs of the next stage takes after its start.

    The stages that are left share the time. If that is too short for all of them, the next one
    takes what it needs.

    Raises:
        RunError: If the time is too short even for the next stage.
    """
    shortest = min(SHORTEST_S, cfg.seconds)
    alone, shared = (left_s / 2 / count - START_S for count in (1, stages))
    if alone < shortest:
        raise RunError(f"{left_s:.0f} of {cfg.total_s:.0f} s were left, too few for two runs")
    return min(cfg.seconds, max(shared, shortest))


def _row_of(cfg: RemoteData, stage: str) -> dict[str, Any]:
    """Return the row of a stage before anything is measured."""
    return {
        "stage": stage,
        "preset": cfg.presets[1 if stage == "dit" else 0],
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

    def vae_options(
        data: StorePath, out: Path, loop: LoopConfig, cache: CacheConfig
    ) -> VAETraining:
        preset = VAE_PRESETS[cfg.presets[0]]
        bricks = replace(
            preset.bricks,
            resolutions=(cfg.size.resolution,),
            token_budget=cfg.token_budget,
            mixed_shards=cfg.mixed_shards,
            workers=cfg.workers,
            worker_kind=cfg.worker_kind,
            kept_gb=0,
        )
        loop = _changed(preset.loop, loop)
        return replace(preset, data=data, out=out, cache=cache, bricks=bricks, loop=loop)

    def run_loader(data: StorePath, out: Path, loop: LoopConfig, cache: CacheConfig) -> int:
        return load_batches(vae_options(data, out, loop, cache), world)

    def run_vae(data: StorePath, out: Path, loop: LoopConfig, cache: CacheConfig) -> int:
        return train_vae(vae_options(data, out, loop, cache), world)

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

    return {"loader": run_loader, "vae": run_vae, "dit": run_dit}[stage]


def load_batches(cfg: VAETraining, world: World) -> int:
    """Load the batches of a run of the SS-VAE, and write metrics.jsonl as the run would.

    The steps have the loss 0.

    Returns:
        Number of batches.
    """
    index = read_build_index(open_source(cfg.data, cfg.cache), cfg.bricks.resolutions)
    cfg.out.mkdir(parents=True)
    _, stream = brick_stream(cfg, world, index.split("train"))
    began = time.monotonic()
    limit = math.inf if cfg.loop.max_minutes is None else 60 * cfg.loop.max_minutes
    done = 0
    try:
        with (cfg.out / METRICS).open("w", encoding="utf-8") as file:
            while done < cfg.loop.steps and time.monotonic() - began < limit:
                started = time.monotonic()
                batch = next(stream)
                seconds = time.monotonic() - started
                row = {"seconds": seconds, "data_s": seconds, "loss": 0.0}
                row |= {"tokens": batch.tokens, "samples": batch.samples}
                file.write(f"{json.dumps(row)}\n")
                done += 1
    finally:
        stream.close()
    return done


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
            if stage == "loader":  # it needs no kernels
                continue
            log.info("Compiling the kernels of %s.", stage)
            out = cfg.scratch / "runs" / f"{stage}-small"
            loop = LoopConfig(steps=cfg.warmup_steps + 4)
            with _recorded(rows[stage]):
                run(cfg.scratch / "small", out, loop, CacheConfig())
        for future in copies:
            future.result()
    finish_latents(data, size)
    return time.monotonic() - began


def _train_from_disk(
    cfg: RemoteData, stage: str, run: Run, data: Path, seconds: float
) -> dict[str, Any]:
    """Train a stage from the disk. Returns the entries of its row that are known by then."""
    out = cfg.scratch / "runs" / f"{stage}-disk"
    began = time.monotonic()
    steps = run(data, out, LoopConfig(steps=MAX_STEPS, max_minutes=seconds / 60), CacheConfig())
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
    cfg: RemoteData, stage: str, run: Run, data: Path, row: dict[str, Any], ends_at: float
) -> dict[str, Any]:
    """Train a stage from the store on the batches of the local run.

    The run ends early if it takes SLOWEST times as long as a local one. The steps that it did not
    reach are then left out of the local run, too.

    Args:
        cfg: Options of the benchmark.
        stage: Name of the stage.
        run: Trains it.
        data: The build on the disk.
        row: Entries of the stage's row.
        ends_at: When the run must have ended, by `time.monotonic`.

    Returns:
        The remaining entries of the row, and "disk" again.
    """
    folder = cfg.scratch / "runs"
    cache = CacheConfig(dir=cfg.scratch / f"cache-{stage}", max_gb=row["cache_gb"])
    steps = row["disk"]["steps"] + cfg.warmup_steps
    began = time.monotonic()
    longest = max(1.0, min(SLOWEST * row["disk"]["whole_run_s"], ends_at - began))
    with _store(cfg, data) as (url, statistics):
        run(
            url,
            folder / f"{stage}-store",
            LoopConfig(steps=steps, max_minutes=longest / 60),
            cache,
        )
        ended = time.monotonic()
        remote = _rows(folder / f"{stage}-store", cfg.warmup_steps)
        first = _rows(folder / f"{stage}-store", 0)[:1]
        store = _sums(remote, began)
        store["first_step_s"] = first[0]["seconds"] if first else None
        store |= statistics.rates(ended - store["seconds"], ended)
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
        "loss": 1 - store["tokens_per_s"] / disk["tokens_per_s"],
    }


class StatisticsLog:
    """Asks a store for its statistics all the time, in a thread.

    Args:
        endpoint: Endpoint of the store.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self._samples: list[tuple[float, StoreStatistics]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="statistics", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while True:
            self._samples.append((time.monotonic(), statistics_of(self.endpoint)))
            if self._ended.wait(1 / SAMPLES_PER_S):
                return

    def close(self) -> None:
        """Stop asking."""
        self._ended.set()
        self._thread.join()

    def rates(self, start: float, end: float) -> dict[str, Any]:
        """Return what the store did in an interval.

        Args:
            start: Start of the interval, by `time.monotonic`.
            end: End of the interval.

        Returns:
            Megabytes and requests per second, the mean number of requests in flight, and their
            largest number since the store was started.
        """
        inside = [sample for sample in self._samples if start <= sample[0] <= end]
        if len(inside) < 2:
            return dict.fromkeys(("mb_per_s", "requests_per_s", "in_flight", "most_in_flight"))
        (began, before), (ended, after) = inside[0], inside[-1]
        done, seconds = after.since(before), ended - began
        return {
            "mb_per_s": done.bytes / seconds / 1e6,
            "requests_per_s": done.requests / seconds,
            "in_flight": done.busy_s / seconds,
            "most_in_flight": after.most_in_flight,
        }


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
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][warmup_steps:]


@contextmanager
def _store(cfg: RemoteData, data: Path) -> Iterator[tuple[StorePath, StatisticsLog]]:
    """Serve the build from another process. Yields its URL and what the process does."""
    store = StoreConfig(folder=data, latency_ms=cfg.latency_ms, megabytes_per_s=cfg.megabytes_per_s)
    with running(store) as endpoint:
        os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_EC2_METADATA_DISABLED="true")
        S3FileSystem.clear_instance_cache()
        statistics = StatisticsLog(endpoint)
        try:
            yield store_path(f"s3://{BUCKET}"), statistics
        finally:
            statistics.close()


def _report(cfg: RemoteData, results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = machine.get("versions", {})
    making = results.get("making_data_s")
    lines = [
        f"Hardware: {machine['gpu'] or 'no GPU'}, {results['cpu_cores']} CPU cores; Python "
        f"{machine['python']}, torch {versions.get('torch')}, commit {machine.get('commit')}. "
        f"Command: `python -m benchmarks.remote_data {' '.join(results['command'])}`.",
        f"Store: {cfg.latency_ms:g} ms latency, {cfg.megabytes_per_s:g} MB/s, a process of its "
        f"own. First epoch, {cfg.token_budget} tokens a step, {cfg.workers} loader "
        f"{cfg.worker_kind}, {cfg.mixed_shards} mixed shards. "
        + ("" if making is None else f"The build took {making:.0f} s, ")
        + f"everything {results['total_s']:.0f} s.",
        "",
        "| stage | data GB | cache GB | steps | assets read | tokens/s disk | tokens/s store "
        "| waiting disk / store | first step s | MB/s | requests/s | in flight | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        disk, store = row["disk"], row["store"]
        name = f"{row['stage']} {row['preset']}"
        if disk is None:
            reason = row["failed"] or "not measured"
            lines.append(f"| {name} | {reason} |{' |' * 11}")
            continue
        store_speed, store_wait, rates = "not measured", "-", ["-"] * 4
        if store is not None:
            store_speed = f"{store['tokens_per_s']:,.0f}"
            store_wait = f"{store['data_s'] / store['seconds']:.1%}"
            numbers = ("first_step_s", "mb_per_s", "requests_per_s", "in_flight")
            rates = ["-" if store[key] is None else f"{store[key]:.1f}" for key in numbers]
        loss = row["failed"] or "-" if row["loss"] is None else f"{row['loss']:+.1%}"
        lines.append(
            f"| {name} | {row['stored_gb']:.2f} | {row['cache_gb']:.2f} | {disk['steps']} "
            f"| {disk['samples']} of {row['assets']} | {disk['tokens_per_s']:,.0f} "
            f"| {store_speed} | {disk['data_s'] / disk['seconds']:.1%} / {store_wait} "
            f"| {' | '.join(rates)} | {loss} |"
        )
    return "\n".join(lines) + "\n"
