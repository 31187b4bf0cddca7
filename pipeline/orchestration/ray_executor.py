"""Runs the tasks of a build on Ray: a cluster, or a Ray of this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.product import Product
from pipeline.core.ray_address import connecting
from pipeline.core.schema import Record
from pipeline.orchestration.asset_task import Verdict, isolated_process, run_asset_task
from pipeline.orchestration.commit import CommitJob
from pipeline.orchestration.executors import TASKS_PER_SLOT, WorkerLostError
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.transfer import commit
from pipeline.sources import Source

OBJECT_STORE_BYTES = 100 << 20  # assets travel through the file system, only results through Ray
CANCEL_S = 30.0


class RayExecutor:
    """An `Executor` on the Ray that the driver is connected to.

    Args:
        cfg: Options of the build.
        sources: The sources of the assets by name.
    """

    def __init__(self, cfg: BuildConfig, sources: Mapping[str, Source]):
        self._gpu_share = cfg.gpu_share
        self._sources = {name: ray.put(source) for name, source in sources.items()}
        self._config = ray.put(cfg)
        # Ray runs as many tasks as it has cores for, whatever `workers` says.
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        workers = cfg.workers or cores
        self.task_limit = workers if workers < cores else workers * TASKS_PER_SLOT

    def submit_asset(
        self, record: Record, shard: str, products: tuple[Product, ...], attempt: int
    ) -> ray.ObjectRef:
        task = _asset_task.options(num_gpus=self._gpu_share or None)
        source = self._sources[record.source]
        return task.remote(record, source, self._config, shard, products, attempt)

    def submit_commit(self, job: CommitJob) -> ray.ObjectRef:
        return _commit_task.remote(job)

    def wait(self, tasks: Sequence[ray.ObjectRef], timeout_s: float) -> Sequence[ray.ObjectRef]:
        return ray.wait(list(tasks), num_returns=1, timeout=timeout_s)[0]

    def result(self, task: ray.ObjectRef) -> Verdict | dict[str, int]:
        try:
            return ray.get(task)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise WorkerLostError(type(error).__name__) from error

    def cancel(self, tasks: Sequence[ray.ObjectRef]) -> None:
        for task in tasks:
            ray.cancel(task, force=True)
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=CANCEL_S)


_isolated: dict[bool, IsolatedProcess] = {}  # of this Ray worker process, by whether on a GPU


@ray.remote(num_cpus=1, max_retries=0)
def _asset_task(
    record: Record,
    source: Source,
    cfg: BuildConfig,
    shard: str,
    products: tuple[Product, ...],
    attempt: int,
) -> Verdict:
    """Run all stages of one asset."""
    on_gpu = cfg.gpu_share > 0
    gpu = ray.get_runtime_context().get_accelerator_ids()["GPU"][0] if on_gpu else None
    if on_gpu not in _isolated:
        _isolated[on_gpu] = isolated_process(cfg)
    return run_asset_task(
        record, source, cfg, shard, products, attempt, process=_isolated[on_gpu], gpu=gpu
    )


@ray.remote(num_cpus=1, max_retries=0)
def _commit_task(job: CommitJob) -> dict[str, int]:
    return commit(job)


@contextmanager
def open_ray(cfg: BuildConfig, sources: Mapping[str, Source]) -> Iterator[RayExecutor]:
    """Connect to Ray, and yield its executor.

    Raises:
        UserError: If there is no Ray at RAY_ADDRESS, or no GPU for `--device cuda`.
        RunError: If Ray cannot start on this machine.
    """
    with _connected(cfg):
        if cfg.gpu_share and not ray.cluster_resources().get("GPU"):
            raise UserError(
                "--device cuda cannot be used: Ray finds no GPU in its cluster; leave it out"
            )
        yield RayExecutor(cfg, sources)


@contextmanager
def _connected(cfg: BuildConfig) -> Iterator[None]:
    """Use the caller's Ray, else the cluster at RAY_ADDRESS, else a Ray of this run alone.

    Raises:
        UserError: If there is no Ray at RAY_ADDRESS.
        RunError: If Ray cannot start on this machine.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else _local_settings():
        with connecting(address):
            if address:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",
                    num_cpus=cfg.workers,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _local_settings() -> Iterator[None]:
    """Set what a Ray of this run alone reads from the environment, and restore it at the end.

    Ray protects a local cluster with a token. Without one it would write ~/.ray/auth_token, and
    every later Ray of this user would demand that token. The cluster gets a token of its own, which
    no file keeps.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")
    before = {name: os.environ.get(name) for name in names}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", _process_token())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache
def _process_token() -> str:
    """Return the token of this process. Ray reads it once, so it stays the same."""
    return secrets.token_hex(32)
