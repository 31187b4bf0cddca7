"""Work done ahead in threads, handed out in order: the number of workers changes speed and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

Job = TypeVar("Job")
PlannedJob = TypeVar("PlannedJob", covariant=True)
Batch = TypeVar("Batch", covariant=True)
Loaded = TypeVar("Loaded")


class Planned(Protocol[PlannedJob]):
    """A cheap, resumable sequence of jobs."""

    @property
    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Any) -> None: ...

    def next(self) -> PlannedJob: ...


class Stream(Protocol[Batch]):
    """What the training loop draws from. `state` is that after the last batch handed out, JSON."""

    @property
    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Any) -> None: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class Prefetcher(Generic[Job, Loaded]):
    """`load(job)` for job after job of a plan, up to `ahead` of them at once in `workers` threads; 0: when asked for.

    Threads do: reading, decompression and large array operations release the interpreter's lock. An exception of a load
    comes out where its batch would have.
    """

    def __init__(
        self,
        plan: Planned[Job],
        load: Callable[[Job], Loaded],
        *,
        workers: int,
        ahead: int | None = None,
    ):
        self.plan, self.load, self.workers = plan, load, workers
        self.ahead = ahead or 2 * workers
        self._state = plan.state
        self._waiting: deque[tuple[Future[Loaded], dict[str, Any]]] = deque()
        self._pool = ThreadPoolExecutor(workers, "prefetch") if workers else None

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    def restore(self, state: Any) -> None:
        self._drop()
        self.plan.restore(state)
        self._state = self.plan.state

    def __next__(self) -> Loaded:
        if self._pool is None:
            batch = self.load(self.plan.next())
            self._state = self.plan.state
            return batch
        while len(self._waiting) < self.ahead:
            job = self.plan.next()
            self._waiting.append((self._pool.submit(self.load, job), self.plan.state))
        future, state = self._waiting.popleft()
        batch = future.result()
        self._state = state
        return batch

    def close(self) -> None:
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.popleft()[0].cancel()
