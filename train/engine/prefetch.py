"""Streams of batches, and prefetchers that load batches ahead in threads or processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Generic, Protocol, TypeVar

import torch

from pipeline.core.errors import RunError
from train.engine.config import WorkerKind

Job = TypeVar("Job")
JobT_co = TypeVar("JobT_co", covariant=True)
BatchT_co = TypeVar("BatchT_co", covariant=True)
Loaded = TypeVar("Loaded")


class JobSource(Protocol[JobT_co]):
    """A cheap, endless and resumable sequence of jobs, such as a batch sampler."""

    @property
    def state(self) -> dict[str, Any]:
        """JSON state after the last job."""
        ...

    def restore(self, state: Any) -> None:
        """Continue after the job at which `state` was read."""
        ...

    def next(self) -> JobT_co:
        """Return the next job."""
        ...


class Stream(Protocol[BatchT_co]):
    """The batches of one rank, in the order of the training steps."""

    @property
    def state(self) -> dict[str, Any]:
        """JSON state after the last batch that was handed out."""
        ...

    def restore(self, state: Any) -> None:
        """Continue after the batch at which `state` was read."""
        ...

    def __next__(self) -> BatchT_co: ...

    def wait(self, timeout_s: float) -> bool:
        """Wait until the next batch can be had at once, for at most `timeout_s` seconds.

        Returns:
            Whether it can, or loading it has failed. True if it is loaded by `__next__` itself.
        """
        ...

    def close(self) -> None:
        """Stop loading."""
        ...


class Loader(Protocol[Job, Loaded]):
    """Loads the batches of all ranks."""

    def load(self, step: Job, rank: int) -> Loaded:
        """Load the batch of one rank in one step."""
        ...

    def close(self) -> None:
        """End loads that wait for data. They may fail."""
        ...


def start_prefetcher(
    jobs: JobSource[Job],
    make_loader: Callable[[], Loader[Job, Loaded]],
    *,
    rank: int,
    workers: int,
    kind: WorkerKind,
) -> Prefetcher[Job, Loaded]:
    """Return the batches of a rank, which are loaded ahead.

    Args:
        jobs: The samples of each step.
        make_loader: Makes the loader. It must be picklable for processes, each of which makes one.
        rank: Number of the rank.
        workers: Number of threads or processes. 0 loads each batch when it is asked for.
        kind: Whether threads or processes load the batches, which are the same.
    """
    if kind == "processes" and workers:
        return ProcessPrefetcher(jobs, make_loader, rank=rank, workers=workers)
    loader = make_loader()
    return Prefetcher(
        jobs, lambda job: loader.load(job, rank), workers=workers, close_loader=loader.close
    )


class Prefetcher(Generic[Job, Loaded]):
    """A stream that loads the jobs of a source ahead in threads.

    The batches come in the order of the jobs, whatever the number of threads. Reading,
    decompression and large array operations release the interpreter's lock. An exception in `load`
    is raised where its batch would have been returned.

    Args:
        jobs: The source of jobs.
        load: Loads the batch of a job. It runs in several threads at once.
        workers: Number of threads. 0 loads each batch when it is asked for.
        ahead: Largest number of batches that are loaded or waiting. None is twice `workers`.
        close_loader: Ends loads that wait for data when the stream is closed.
    """

    def __init__(
        self,
        jobs: JobSource[Job],
        load: Callable[[Job], Loaded],
        *,
        workers: int,
        ahead: int | None = None,
        close_loader: Callable[[], None] = lambda: None,
    ):
        self._close_loader = close_loader
        self.jobs = jobs
        self.load = load
        self.workers = workers
        self.ahead = ahead or 2 * workers
        self._state = jobs.state
        self._waiting: deque[tuple[Future[Loaded], dict[str, Any]]] = deque()
        self._pool = self._make_pool() if workers else None

    def _make_pool(self) -> Executor:
        return ThreadPoolExecutor(self.workers, "prefetch")

    def _submit(self, pool: Executor, job: Job) -> Future[Loaded]:
        return pool.submit(self.load, job)

    @property
    def state(self) -> dict[str, Any]:
        """JSON state after the last batch that was handed out."""
        return self._state

    def restore(self, state: Any) -> None:
        """Continue after the batch at which `state` was read, dropping batches loaded ahead."""
        self._drop()
        self.jobs.restore(state)
        self._state = self.jobs.state

    def __next__(self) -> Loaded:
        self._load_ahead()
        if self._pool is None:
            batch = self.load(self.jobs.next())
            self._state = self.jobs.state
            return batch
        future, state = self._waiting.popleft()
        batch = future.result()
        self._state = state
        return batch

    def wait(self, timeout_s: float) -> bool:
        """Wait until the next batch is loaded, for at most `timeout_s` seconds."""
        self._load_ahead()
        if not self._waiting:
            return True
        return bool(wait([self._waiting[0][0]], timeout_s).done)

    def close(self) -> None:
        """Stop the workers. They end soon, although a store may give no answer.

        Batches loaded ahead are dropped.
        """
        self._drop()
        self._close_loader()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _load_ahead(self) -> None:
        while self._pool is not None and len(self._waiting) < self.ahead:
            job = self.jobs.next()
            self._waiting.append((self._submit(self._pool, job), self.jobs.state))

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.popleft()[0].cancel()


class ProcessPrefetcher(Prefetcher[Job, Loaded]):
    """A prefetcher that loads the jobs in processes.

    Processes are worth their start of some seconds and their memory where many small samples make
    a batch: the interpreter's lock then limits threads. Tensors come back through shared memory.

    Args:
        jobs: The source of jobs.
        make_loader: Makes the loader of each process. It is pickled.
        rank: Number of the rank whose batches are loaded.
        workers: Number of processes.
        ahead: Largest number of batches that are loaded or waiting. None is twice `workers`.
    """

    def __init__(
        self,
        jobs: JobSource[Job],
        make_loader: Callable[[], Loader[Job, Loaded]],
        *,
        rank: int,
        workers: int,
        ahead: int | None = None,
    ):
        # Processes that are forked from this one would inherit the locks of its threads and a CUDA
        # context that they cannot use.
        self._context = multiprocessing.get_context("spawn")
        running, self._running = self._context.Pipe(duplex=False)
        self._arguments = (make_loader, rank, running)
        close = self._running.close
        super().__init__(jobs, _load, workers=workers, ahead=ahead, close_loader=close)

    def _make_pool(self) -> Executor:
        return ProcessPoolExecutor(self.workers, self._context, _start, self._arguments)

    def _submit(self, pool: Executor, job: Job) -> Future[Loaded]:
        try:
            return super()._submit(pool, job)
        except BrokenProcessPool as error:  # raised where the batch would have been returned
            failed: Future[Loaded] = Future()
            failed.set_exception(error)
            return failed

    def __next__(self) -> Loaded:
        """Return the next batch.

        Raises:
            RunError: If a process ended, besides the exceptions of the loader.
        """
        try:
            return super().__next__()
        except BrokenProcessPool as error:
            raise RunError(
                "a process that loads batches ended, perhaps for lack of memory or because its "
                "loader could not be made; set fewer workers, or load in threads"
            ) from error


_loader: list[tuple[Loader[Any, Any], int]] = []  # of this process, if it is a worker


def _start(make_loader: Callable[[], Loader[Any, Any]], rank: int, running: Connection) -> None:
    """Make the loader of a worker process.

    The process ends with the process that started it, or when that closes its end of `running`.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    ends = (parent.sentinel, running)
    threading.Thread(target=lambda: (wait_for_any(ends), os._exit(1)), daemon=True).start()
    # A signal to stop the run reaches all processes of its group. The run still needs its batches.
    os.setsid()
    torch.set_num_threads(1)
    _loader.append((make_loader(), rank))


def _load(job: Any) -> Any:
    loader, rank = _loader[0]
    return loader.load(job, rank)
