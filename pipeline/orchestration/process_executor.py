"""Runs the tasks of a build in processes of this machine, without Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Self

from pipeline.config import BuildConfig
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.orchestration.asset_task import Verdict, isolated_process, run_asset_task
from pipeline.orchestration.commit import CommitJob
from pipeline.orchestration.executors import TASKS_PER_SLOT
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.transfer import commit
from pipeline.sources import Source


class ProcessExecutor:
    """An `Executor` of one machine: threads of the driver, each with a process for its assets.

    The stages of an asset run in a child of such a process, so a thread only waits. Shards are
    committed in the threads, where compressing and writing release the interpreter lock. The first
    process compiles what the others then find on the disk. With `--device cuda` the assets share
    the first GPU.

    Args:
        cfg: Options of the build.
        sources: The sources of the assets by name.
    """

    def __init__(self, cfg: BuildConfig, sources: Mapping[str, Source]):
        self._cfg = cfg
        self._sources = sources
        workers = cfg.workers or len(os.sched_getaffinity(0))
        if cfg.gpu_share:
            workers = min(workers, cfg.assets_per_gpu)
        self.task_limit = workers * TASKS_PER_SLOT
        self._processes = [isolated_process(cfg) for _ in range(workers)]
        self._idle: SimpleQueue[IsolatedProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._compiling = threading.Lock()
        self._is_compiled = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="asset")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all tasks and processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.retire()
        self._threads.shutdown()
        for process in self._processes:
            process.close()

    def submit_asset(
        self, record: Record, shard: str, products: tuple[Product, ...], attempt: int
    ) -> Future[Verdict]:
        return self._threads.submit(self._run, record, shard, products, attempt)

    def submit_commit(self, job: CommitJob) -> Future[dict[str, int]]:
        return self._threads.submit(commit, job)

    def wait(self, tasks: Sequence[Future], timeout_s: float) -> Sequence[Future]:
        return list(wait(tasks, timeout_s, FIRST_COMPLETED).done)

    def result(self, task: Future) -> Verdict | dict[str, int]:
        return task.result()

    def cancel(self, tasks: Sequence[Future]) -> None:
        for task in tasks:
            task.cancel()
        for process in self._processes:
            process.retire()
        wait(tasks)

    def _run(
        self, record: Record, shard: str, products: tuple[Product, ...], attempt: int
    ) -> Verdict:
        process = self._idle.get()
        try:
            with self._compiling:
                if not self._is_compiled:
                    process.start()
                    self._is_compiled = True
            source = self._sources[record.source]
            return run_asset_task(
                record, source, self._cfg, shard, products, attempt, process=process, gpu=None
            )
        finally:
            self._idle.put(process)
