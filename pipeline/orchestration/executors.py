"""What runs the tasks of a build: one task per asset and one per commit of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.orchestration.commit import CommitJob

TASKS_PER_SLOT = 2  # tasks handed over for every worker, so that none waits for the driver


class WorkerLostError(Exception):
    """The process or the node of a task was lost. The message is the kind of the loss."""


class Executor(Protocol):
    """Runs tasks beside the driver. The driver calls it from one thread.

    Attributes:
        task_limit: How many tasks may be submitted and not finished.
    """

    task_limit: int

    def submit_asset(
        self, record: Record, shard: str, products: tuple[Product, ...], attempt: int
    ) -> Any:
        """Start `run_asset_task`. Returns the task, which can be a key."""
        ...

    def submit_commit(self, job: CommitJob) -> Any:
        """Start `transfer.commit`. Returns the task, which can be a key."""
        ...

    def wait(self, tasks: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Return tasks that have finished, at least one unless the time is over."""
        ...

    def result(self, task: Any) -> Any:
        """Return the result of a finished task.

        Raises:
            WorkerLostError: If its worker or node was lost.
            Exception: What the task raised.
        """
        ...

    def cancel(self, tasks: Sequence[Any]) -> None:
        """End tasks, whether they run or not, and wait for their end."""
        ...
