"""Streams of batches, and a prefetcher that loads batches ahead in threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

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


class Prefetcher(Generic[Job, Loaded]):
    """A stream that loads the jobs of a source ahead in threads.

    The batches come in the order of the jobs, whatever the number of threads. Threads suffice:
    reading, decompression and large array operations release the interpreter's lock. An exception
    in `load` is raised where its batch would have been returned.

    Args:
        jobs: The source of jobs.
        load: Loads the batch of a job. It runs in several threads at once.
        workers: Number of threads. 0 loads each batch when it is asked for.
        ahead: Largest number of batches that are loaded or waiting. None is twice `workers`.
    """

    def __init__(
        self,
        jobs: JobSource[Job],
        load: Callable[[Job], Loaded],
        *,
        workers: int,
        ahead: int | None = None,
    ):
        self.jobs = jobs
        self.load = load
        self.workers = workers
        self.ahead = ahead or 2 * workers
        self._state = jobs.state
        self._waiting: deque[tuple[Future[Loaded], dict[str, Any]]] = deque()
        self._pool = ThreadPoolExecutor(workers, "prefetch") if workers else None

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
        """Stop the threads after the batches that they load now, which a store may delay.

        Batches loaded ahead are dropped.
        """
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _load_ahead(self) -> None:
        while self._pool is not None and len(self._waiting) < self.ahead:
            job = self.jobs.next()
            self._waiting.append((self._pool.submit(self.load, job), self.jobs.state))

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.popleft()[0].cancel()
