"""Runs a build: one task per asset and one task per commit of a shard.

The driver keeps its own list of what runs where, so that it can retry, resume and stop.
"""

from __future__ import annotations

import heapq
import logging
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full
from pipeline.core.hashing import as_options, differences
from pipeline.core.product import Product
from pipeline.core.provenance import READER_VERSION
from pipeline.core.schema import Record
from pipeline.core.signals import Stop, Stopped, note_signals
from pipeline.core.text import counted
from pipeline.orchestration.asset_results import save_result
from pipeline.orchestration.asset_task import Verdict, make_job
from pipeline.orchestration.commit import CommitJob, read_committed_rows
from pipeline.orchestration.executors import Executor, WorkerLostError
from pipeline.orchestration.isolated_process import ProcessExit
from pipeline.orchestration.plan import Plan
from pipeline.orchestration.progress import Progress
from pipeline.orchestration.splits import assign_splits
from pipeline.orchestration.transfer import read_results, upload_asset
from pipeline.sources import Source
from pipeline.storage.commit_marker import CommitMarker, read_marker
from pipeline.storage.layout import MANIFEST, SCRATCH, list_commits
from pipeline.storage.locks import scratch_root, sweep_on_exit, workspace
from pipeline.storage.manifest import STATUSES
from pipeline.storage.remote import delete, list_children, read_files

log = logging.getLogger(__name__)

FAILURES_BEFORE_STOP = 10
DISK_CHECK_S = 5.0
STARTING = (
    "Starting the workers. The first build on a machine also compiles the geometry code "
    "(once per machine), which can take a few minutes."
)


@dataclass(kw_only=True)
class _Shard:
    """A shard that is being built."""

    name: str
    records: tuple[Record, ...]
    products: tuple[Product, ...]
    unfinished: set[str] = field(default_factory=set)  # uids without a result


def run(plan: Plan, cfg: BuildConfig, sources: Sequence[Source]) -> dict[str, int]:
    """Make every product that is not committed yet.

    On Ray, the run uses the caller's Ray, or the cluster that RAY_ADDRESS names (Ray sets it in a
    submitted job). Without both it starts Ray on this machine for as long as the run lasts.

    Args:
        plan: The plan of the build.
        cfg: Options of the run.
        sources: The sources of the plan's assets.

    Returns:
        Numbers of assets in the build by status: done, rejected and failed.

    Raises:
        UserError: If products were built with other options, or if there is no Ray at RAY_ADDRESS.
        RunError: If the disk fills, too many assets fail or a commit cannot be made.
    """
    commits = list_commits(cfg.out)
    _check_committed(cfg, commits)
    missing = missing_products(plan, cfg, commits)
    for folder in list_children(cfg.out / SCRATCH):
        if folder.name not in missing:  # of a run that was killed after its last marker
            delete(folder)
    if missing and cfg.reader_version != READER_VERSION:
        raise UserError(
            f"{cfg.out} was made by reader {cfg.reader_version} and this is reader "
            f"{READER_VERSION}, which reads some files differently; build into a new directory: "
            "choose another --out"
        )
    if missing:
        if commits:
            _log_resuming(plan, missing)
        stop = Stop()
        # An exception out of a signal handler would break Ray's native code, so signals are noted
        # and checked between steps. Ray installs handlers of its own when it starts.
        with (
            sweep_on_exit(cfg.out, cfg.scratch),
            note_signals(stop),
            _open_executor(cfg, {source.name: source for source in sources}) as executor,
            note_signals(stop),
        ):
            stop.check()
            try:
                _Run(plan, cfg, executor, missing, commits).loop(stop)
            except Stopped:
                assign_splits(plan)  # what is committed can be trained on
                raise
    else:
        log.info("Every product of all shards is committed already; nothing is made again.")
    assign_splits(plan)
    delete(cfg.out / SCRATCH)
    return count_statuses(plan, cfg)


def _check_committed(cfg: BuildConfig, commits: Mapping[str, set[str]]) -> None:
    """Raise UserError if a committed product was made with other options than this run has."""
    for product in cfg.products:
        shard = next((name for name, names in commits.items() if str(product) in names), None)
        if shard is None:
            continue
        try:
            marker = read_marker(cfg.out, shard, product)
        except ValueError as error:
            raise UserError(f"{error}; delete it to make {product} of the shard again") from error
        changes = differences(marker.config, cfg.of_product(product))
        if changes:
            raise UserError(
                f"{product} in {cfg.out} was built with {'; '.join(as_options(changes))}; "
                "choose another --out, or the same options"
            )


def missing_products(
    plan: Plan, cfg: BuildConfig, commits: Mapping[str, set[str]]
) -> dict[str, tuple[Product, ...]]:
    """Find the products that are not committed.

    Args:
        plan: The plan of the build.
        cfg: Options of the run.
        commits: What `list_commits` returns.

    Returns:
        {shard: its missing products in order}. All products of a shard without a manifest are
        missing. Shards that lack nothing are left out.
    """
    missing = {}
    for shard in plan.shards:
        committed = commits.get(shard, set())
        missing[shard] = tuple(
            product
            for product in cfg.products
            if plan.wanted(product, shard)
            and (MANIFEST not in committed or str(product) not in committed)
        )
    return {shard: products for shard, products in missing.items() if products}


def _log_resuming(plan: Plan, missing: Mapping[str, Sequence[Product]]) -> None:
    """Log how many shards are complete, and what the others lack."""
    shards = Counter(chain.from_iterable(missing.values()))
    log.info(
        "Resuming: %d of %d shards have every product. Missing: %s.",
        len(plan.shards) - len(missing),
        len(plan.shards),
        ", ".join(
            f"{product} of {counted(shards[product], 'shard')}"
            for product in sorted(shards, key=str)
        ),
    )


def count_statuses(plan: Plan, cfg: BuildConfig) -> dict[str, int]:
    """Return the numbers of done, rejected and failed assets that the manifests' markers state."""
    total: dict[str, int] = dict.fromkeys(STATUSES, 0)
    markers = [f"{shard}/{MANIFEST}.json" for shard in plan.shards]
    for text in read_files(cfg.out / "shards", markers):
        counts = CommitMarker.from_json(text).counts
        for status in STATUSES:
            total[status] += counts[status]
    return total


def _count_wanted(plan: Plan, shard: str, products: Sequence[Product]) -> int:
    """Return how many of a shard's first assets a run visits.

    The products of one run are wanted by the same assets.
    """
    size = plan.info.shard_size
    assets = min(size, plan.assets - int(shard) * size)
    return min(assets, *(plan.wanted(product, shard) for product in products))


class _Run:
    """The tasks of one run: which ones are submitted, and how often each asset was tried."""

    def __init__(
        self,
        plan: Plan,
        cfg: BuildConfig,
        executor: Executor,
        missing: Mapping[str, tuple[Product, ...]],
        commits: Mapping[str, set[str]],
    ):
        self.plan = plan
        self.cfg = cfg
        self.missing = missing
        self.commits = commits
        self.executor = executor
        self.tasks: dict[Any, tuple[_Shard, Record | None]] = {}  # None: a commit
        self.attempts: dict[str, int] = {}
        self.retries: list[tuple[float, str, _Shard, Record]] = []  # heap by time
        self.tried = 0
        self.failed = 0
        visits = sum(_count_wanted(plan, shard, products) for shard, products in missing.items())
        self.progress = Progress(visits, "assets", shards=len(missing), starting=STARTING)
        self.disk_checked = 0.0

    def loop(self, stop: Stop) -> None:
        """Keep a bounded number of tasks submitted until every shard is committed."""
        jobs = self._jobs()
        try:
            while True:
                room = max(0, self.executor.task_limit - len(self.tasks))
                for shard, record in islice(chain(self._due_retries(), jobs), room):
                    self._submit(shard, record)
                if self.tasks:
                    ready = self.executor.wait(list(self.tasks), 0.5)
                elif self.retries:
                    ready = []
                    time.sleep(0.5)
                else:
                    return
                stop.check()
                for task in ready:
                    self._finish_task(task)
                self._check_disk()
                self.progress.show()
        finally:
            self.progress.close()
            # After an error nobody needs the tasks any more, and the next run must not meet them.
            self.executor.cancel(list(self.tasks))

    def _jobs(self) -> Iterator[tuple[_Shard, Record | None]]:
        """Yield assets shard by shard.

        A shard whose assets all have a result already comes as (shard, None), to be committed.
        """
        for name, products in self.missing.items():
            shard = _Shard(name=name, records=tuple(self.plan.records(name)), products=products)
            wanted = shard.records[: _count_wanted(self.plan, name, products)]
            rows = {}
            if MANIFEST in self.commits.get(name, ()):
                rows = read_committed_rows(self.cfg.out, name)
            results = read_results(self.cfg, name, [record.uid for record in wanted], products)
            visits = []
            for record in wanted:
                row, result = rows.get(record.uid), results.get(record.uid)
                if row is not None and row.ended_before_products:
                    self.progress.count(row.status, resumed=True)
                elif result is not None and result.status != "failed":
                    self.progress.count(result.status, resumed=True)
                else:
                    # Failures that were not committed are tried again. Later products must be
                    # made of the same bytes as the first ones.
                    sha256 = record.sha256 or (row.sha256 if row is not None else None)
                    visits.append(replace(record, sha256=sha256))
            shard.unfinished = {record.uid for record in visits}
            if visits:
                yield from ((shard, record) for record in visits)
            else:
                yield shard, None

    def _due_retries(self) -> Iterator[tuple[_Shard, Record]]:
        """Yield the assets whose waiting time is over."""
        while self.retries and self.retries[0][0] <= time.monotonic():
            yield heapq.heappop(self.retries)[2:]

    def _submit(self, shard: _Shard, record: Record | None) -> None:
        if record is None:
            job = CommitJob(
                config=self.cfg,
                shard=shard.name,
                records=shard.records,
                products=shard.products,
                wanted=_count_wanted(self.plan, shard.name, shard.products),
            )
            task = self.executor.submit_commit(job)
        else:
            attempt = self.attempts[record.uid] = self.attempts.get(record.uid, 0) + 1
            task = self.executor.submit_asset(record, shard.name, shard.products, attempt)
        self.tasks[task] = (shard, record)

    def _finish_task(self, task: Any) -> None:
        """Take the result of a finished task. Retry the task if its worker or node was lost."""
        shard, record = self.tasks.pop(task)
        try:
            result = self.executor.result(task)
        except WorkerLostError as error:
            self._retry_lost(shard, record, str(error))
            return
        # Our own code raised: the run is at fault, not an asset.
        except (RunError, UserError) as error:
            raise RunError(str(error)) from None
        except OSError as error:
            if is_disk_full(error):
                raise RunError(self._disk_full_message()) from None
            raise
        if record is None:
            log.debug("Shard %s is committed: %s.", shard.name, result)
            self.progress.count_shard()
            return
        self._finish_asset(shard, record, result)

    def _finish_asset(self, shard: _Shard, record: Record, verdict: Verdict) -> None:
        """Count an asset, or schedule its next attempt. Commit its shard if it was the last one."""
        limits = self.cfg.limits
        attempt = self.attempts[record.uid]
        if verdict.transient and attempt <= limits.retries:
            wait_s = limits.retry_wait_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)
            log.warning(
                "%s: %s in %s. It is retried in %.0f s.",
                record.uid,
                verdict.reason,
                verdict.stage,
                wait_s,
            )
            heapq.heappush(self.retries, (time.monotonic() + wait_s, record.uid, shard, record))
            return
        self.tried += 1
        self.progress.count(verdict.status)
        if verdict.status == "failed":
            self.failed += 1
            log.warning(
                "%s (%s) failed in %s: %s", record.uid, record.url, verdict.stage, verdict.reason
            )
            failed_share = self.failed / self.tried
            if self.failed >= FAILURES_BEFORE_STOP and failed_share > limits.max_failed_share:
                raise RunError(
                    f"{self.failed} of {self.tried} assets failed, the last in {verdict.stage}: "
                    f"{verdict.reason}; the limit is --limits.max-failed-share "
                    f"{limits.max_failed_share}"
                )
        shard.unfinished.discard(record.uid)
        if not shard.unfinished:
            self._submit(shard, None)

    def _retry_lost(self, shard: _Shard, record: Record | None, kind: str) -> None:
        """Retry a task whose worker or node was lost, as often as the limits allow."""
        name = record.uid if record else f"commit of shard {shard.name}"
        if record is None:
            self.attempts[name] = self.attempts.get(name, 0) + 1
        attempt = self.attempts[name]
        if attempt <= self.cfg.limits.retries:
            log.warning("%s lost its worker (%s). It is retried.", name, kind)
            self._submit(shard, record)
        elif record is None:
            raise RunError(f"{name} lost its worker {attempt} times: {kind}")
        else:
            lost = ProcessExit(reason="worker_lost", detail="", seconds=0.0, peak_rss_bytes=0)
            with workspace(self.cfg.out, self.cfg.scratch) as here:
                job = make_job(
                    record, None, self.cfg, here, shard.name, shard.products, attempt + 1
                )
                verdict = Verdict.of(save_result(job, lost, attempt))
                upload_asset(self.cfg.out, here, shard.name, record.uid)
            self._finish_asset(shard, record, verdict)

    def _check_disk(self) -> None:
        """Stop the run before the disk is full."""
        if time.monotonic() - self.disk_checked < DISK_CHECK_S:
            return
        self.disk_checked = time.monotonic()
        if shutil.disk_usage(self._disk).free < self.cfg.limits.min_free_gb * 1e9:
            raise RunError(self._disk_full_message())

    def _disk_full_message(self) -> str:
        free = shutil.disk_usage(self._disk).free / 1e9
        return (
            f"the disk of {self._disk} is full ({free:.2f} GB free); "
            "free some space and run the same command to resume"
        )

    @property
    def _disk(self) -> Path:
        """An existing directory on the disk that a build on this machine writes to.

        The disks of other nodes are not watched. A task there reports a full disk itself.
        """
        root = self.cfg.out if isinstance(self.cfg.out, Path) else scratch_root(self.cfg.scratch)
        return next(folder for folder in (root, *root.absolute().parents) if folder.exists())


def _open_executor(
    cfg: BuildConfig, sources: Mapping[str, Source]
) -> AbstractContextManager[Executor]:
    """Return the executor of a build. It runs until the end of the block.

    Args:
        cfg: Options of the build. `executor` chooses.
        sources: The sources of the assets by name.

    Raises:
        UserError: If there is no Ray at RAY_ADDRESS, or no GPU for `--device cuda`.
        RunError: If Ray cannot start on this machine.
    """
    # Imported here, because a machine need not have Ray.
    if cfg.executor == "ray":
        from pipeline.orchestration.ray_executor import open_ray

        return open_ray(cfg, sources)
    from pipeline.orchestration.process_executor import ProcessExecutor

    return ProcessExecutor(cfg, sources)
