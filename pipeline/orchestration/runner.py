"""Spreads a build over Ray: one task an asset, one task a shard's commit, with our own ledger of what is where."""

from __future__ import annotations

import errno
import heapq
import json
import logging
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full
from pipeline.core.hashing import differences
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.core.signals import Stop, note_signals
from pipeline.orchestration.asset_stages import AssetJob
from pipeline.orchestration.commit import (
    MANIFEST,
    PackJob,
    committed,
    ended_for_good,
    finished,
    land,
    marker_path,
    scratch_folder,
)
from pipeline.orchestration.isolated_process import Exit, Isolated
from pipeline.orchestration.manifest import STATUSES, Result
from pipeline.orchestration.plan import Plan
from pipeline.orchestration.progress import Progress
from pipeline.orchestration.transfer import commit, hand_in, landed_results
from pipeline.sources import Source
from pipeline.storage.locks import scratch_root, sweep_on_exit, workspace
from pipeline.storage.remote import delete, list_children, read_files

log = logging.getLogger(__name__)

IN_FLIGHT_PER_SLOT = 2  # tasks handed to Ray for every core, so that none waits for the driver
OBJECT_STORE_BYTES = (
    100 << 20
)  # assets travel through the file system; Ray carries only a row of each
FAILURES_BEFORE_STOP = 10
DISK_CHECK_S = 5.0
CANCEL_S = 30.0
Verdict = tuple[
    str, str, str, bool
]  # on an asset: status, stage, reason, whether it may be another next time


@dataclass(kw_only=True)
class _Shard:
    """A shard in the works."""

    name: str
    records: tuple[Record, ...]
    products: tuple[Product, ...]
    waiting: set[str] = field(default_factory=set)  # uids that have not landed


def run(plan: Plan, cfg: BuildConfig, sources: Sequence[Source]) -> dict[str, int]:
    """Make every product that is not committed yet. Returns how many assets are done, rejected and failed in all.

    Uses the cluster that RAY_ADDRESS names (Ray sets it in a submitted job), else starts one on this machine for as
    long as the run lasts. UserError without it. RunError if the disk fills, too many assets fail, a commit goes wrong.
    """
    held = committed(cfg.out)
    _check_committed(cfg, held)
    todo = missing_products(plan, cfg, held)
    for folder in list_children(cfg.out / ".scratch"):
        if folder.name not in todo:  # of a run killed between marker and clean-up
            delete(folder)
    if todo:
        stop = Stop()
        # An exception out of a signal handler would break Ray's native code: signals are noted, and looked at between.
        # Ray puts handlers of its own in place as it starts.
        with sweep_on_exit(cfg.out, cfg.scratch), note_signals(stop), _ray(cfg), note_signals(stop):
            stop.check()
            if cfg.gpu_share and not ray.cluster_resources().get("GPU"):
                raise UserError(
                    "--device cuda cannot be used: Ray finds no GPU in its cluster; leave it out"
                )
            _Run(plan, cfg, sources, todo, held).loop(stop)
    delete(cfg.out / ".scratch")
    return counts(plan, cfg)


def _check_committed(cfg: BuildConfig, held: Mapping[str, set[str]]) -> None:
    """UserError if a product that is there was made with other options than the run asks for."""
    for product in cfg.products:
        shard = next((name for name, products in held.items() if str(product) in products), None)
        if shard is None:
            continue
        marker = json.loads(marker_path(cfg.out, shard, product).read_text())
        changed = differences(marker["config"], cfg.of_product(product))
        if changed:
            raise UserError(
                f"{product} in {cfg.out} was built with {'; '.join(changed)}; choose another --out, or the same options"
            )


def missing_products(
    plan: Plan, cfg: BuildConfig, held: Mapping[str, set[str]]
) -> dict[str, tuple[Product, ...]]:
    """The products of a shard that are not among those held, in order; all of them where it holds no manifest.

    Shards that lack nothing are left out.
    """
    missing = {}
    for name in plan.shards:
        there = held.get(name, set())
        wanted = (product for product in cfg.products if plan.wanted(product, name))
        missing[name] = tuple(
            product for product in wanted if MANIFEST not in there or str(product) not in there
        )
    return {name: products for name, products in missing.items() if products}


def _wanted(plan: Plan, shard: str, products: Sequence[Product]) -> int:
    """How many of a shard's first records a visit is for: the products of one run are wanted by the same ones."""
    size = plan.info["config"]["shard_size"]
    assets = min(size, plan.assets - int(shard) * size)
    return min(assets, *(plan.wanted(product, shard) for product in products))


def counts(plan: Plan, cfg: BuildConfig) -> dict[str, int]:
    """How many assets are done, rejected and failed, as the markers of the manifests say."""
    total: dict[str, int] = dict.fromkeys(STATUSES, 0)
    markers = [f"{name}/{MANIFEST}.json" for name in plan.shards]
    for marker in read_files(cfg.out / "shards", markers):
        for status in STATUSES:
            total[status] += json.loads(marker)["counts"][status]
    return total


class _Run:
    """The ledger: which tasks fly, what each is for, how often it was tried."""

    def __init__(
        self,
        plan: Plan,
        cfg: BuildConfig,
        sources: Sequence[Source],
        todo: Mapping[str, tuple[Product, ...]],
        held: Mapping[str, set[str]],
    ):
        self.plan, self.cfg = plan, cfg
        self.sources = {source.name: ray.put(source) for source in sources}
        self.config = ray.put(cfg)
        self.tasks: dict[ray.ObjectRef, tuple[_Shard, Record | None]] = {}
        self.attempts: dict[str, int] = {}
        self.later: list[
            tuple[float, str, _Shard, Record]
        ] = []  # heap: when, uid, what to try again
        self.tried, self.failed = 0, 0
        self.todo, self.held = todo, held
        self.progress = Progress(
            sum(_wanted(plan, name, products) for name, products in todo.items()), "assets"
        )
        self.disk_checked = 0.0

    def loop(self, stop: Stop) -> None:
        """Keep a bounded number of tasks in flight until every shard is committed."""
        jobs = self._jobs()
        try:
            while True:
                room = max(0, self._places() - len(self.tasks))
                for shard, record in islice(chain(self._due(), jobs), room):
                    self._submit(shard, record)
                if self.tasks:
                    ready, _ = ray.wait(list(self.tasks), num_returns=1, timeout=0.5)
                elif self.later:
                    ready = []
                    time.sleep(0.5)
                else:
                    return
                stop.check()
                for ref in ready:
                    self._take(ref)
                self._check_disk()
                self.progress.show()
        finally:
            self.progress.close()
            for ref in self.tasks:  # on the way out after an error: nobody needs these any more
                ray.cancel(ref, force=True)
            if self.tasks:  # the next run must not meet them
                ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=CANCEL_S)

    def _jobs(self) -> Iterator[tuple[_Shard, Record | None]]:
        """Assets shard by shard; a shard that has all of them in scratch already comes as (shard, None)."""
        for name, products in self.todo.items():
            shard = _Shard(name=name, records=tuple(self.plan.shard(name)), products=products)
            wanted = shard.records[: _wanted(self.plan, name, products)]
            old = finished(self.cfg, name) if MANIFEST in self.held.get(name, ()) else {}
            found = landed_results(self.cfg, name, [record.uid for record in wanted], products)
            visits = []
            for record in wanted:
                result = found.get(record.uid)
                if record.uid in old and ended_for_good(old[record.uid]):
                    self.progress.count(old[record.uid]["status"], resumed=True)
                elif result is not None and result.status != "failed":
                    self.progress.count(result.status, resumed=True)
                else:  # a failure that was not committed may have had a cause that is gone now
                    # What is made later must be of the bytes that the first products were made of.
                    known = record.sha256 or old.get(record.uid, {}).get("sha256")
                    visits.append(replace(record, sha256=known))
            shard.waiting = {record.uid for record in visits}
            if visits:
                yield from ((shard, record) for record in visits)
            else:
                yield shard, None

    def _due(self) -> Iterator[tuple[_Shard, Record]]:
        """What waited long enough."""
        while self.later and self.later[0][0] <= time.monotonic():
            yield heapq.heappop(self.later)[2:]

    def _submit(self, shard: _Shard, record: Record | None) -> None:
        if record is None:
            job = PackJob(
                config=self.cfg,
                shard=shard.name,
                records=shard.records,
                products=shard.products,
                wanted=_wanted(self.plan, shard.name, shard.products),
            )
            ref = _pack_task.remote(job)
        else:
            attempt = self.attempts[record.uid] = self.attempts.get(record.uid, 0) + 1
            source = self.sources[record.source]
            task = _asset_task.options(num_gpus=self.cfg.gpu_share or None)
            ref = task.remote(record, source, self.config, shard.name, shard.products, attempt)
        self.tasks[ref] = (shard, record)

    def _take(self, ref: ray.ObjectRef) -> None:
        """Enter a finished task into the ledger; send it again if its worker or node was lost."""
        shard, record = self.tasks.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:  # our own code raised: the run is at fault, not an asset
            cause = error.cause
            if isinstance(cause, RunError | UserError):
                raise RunError(str(cause)) from None
            if isinstance(cause, OSError) and is_disk_full(cause):
                raise RunError(self._disk_full()) from None
            raise
        except RayError as error:
            self._lost(shard, record, error)
            return
        if record is None:
            log.debug("shard %s committed: %s", shard.name, result)
            return
        self._landed(shard, record, result)

    def _landed(self, shard: _Shard, record: Record, result: Verdict) -> None:
        status, stage, reason, transient = result
        attempt = self.attempts[record.uid]
        if transient and attempt <= self.cfg.limits.retries:
            wait_s = self.cfg.limits.retry_wait_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)
            log.warning("%s: %s in %s; trying again in %.0f s", record.uid, reason, stage, wait_s)
            heapq.heappush(self.later, (time.monotonic() + wait_s, record.uid, shard, record))
            return
        self.tried += 1
        self.progress.count(status)
        if status == "failed":
            self.failed += 1
            log.warning("%s (%s) failed in %s: %s", record.uid, record.url, stage, reason)
            share = self.failed / self.tried
            if self.failed >= FAILURES_BEFORE_STOP and share > self.cfg.limits.max_failed_share:
                raise RunError(
                    f"{self.failed} of {self.tried} assets failed, the last in {stage}: {reason}; the limit is "
                    f"--limits.max-failed-share {self.cfg.limits.max_failed_share}"
                )
        shard.waiting.discard(record.uid)
        if not shard.waiting:
            self._submit(shard, None)

    def _lost(self, shard: _Shard, record: Record | None, error: RayError) -> None:
        """A worker or node died under a task."""
        key = record.uid if record else f"commit of shard {shard.name}"
        if record is None:
            self.attempts[key] = self.attempts.get(key, 0) + 1
        if self.attempts[key] <= self.cfg.limits.retries:
            log.warning("%s lost its worker (%s); trying again", key, type(error).__name__)
            self._submit(shard, record)
        elif record is None:
            raise RunError(
                f"{key} lost its worker {self.attempts[key]} times: {type(error).__name__}"
            )
        else:
            lost = Exit(reason="worker_lost", detail="", seconds=0.0, peak_rss_bytes=0)
            with workspace(self.cfg.out, self.cfg.scratch) as here:
                job = _job(
                    record, None, self.cfg, here, shard.name, shard.products, self.attempts[key] + 1
                )
                verdict = _verdict(land(job, lost, self.attempts[key]))
                hand_in(self.cfg.out, here, shard.name, record.uid)
            self._landed(shard, record, verdict)

    def _places(self) -> int:
        """How many tasks may fly. Ray starts all that it has cores for, workers or not."""
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        workers = self.cfg.workers or cores
        return workers if workers < cores else workers * IN_FLIGHT_PER_SLOT

    def _check_disk(self) -> None:
        if time.monotonic() - self.disk_checked < DISK_CHECK_S:
            return
        self.disk_checked = time.monotonic()
        if shutil.disk_usage(self._disk).free < self.cfg.limits.min_free_gb * 1e9:
            raise RunError(self._disk_full())

    def _disk_full(self) -> str:
        free = shutil.disk_usage(self._disk).free / 1e9
        return f"the disk of {self._disk} is full ({free:.2f} GB free); make room and run the same command to go on"

    @property
    def _disk(self) -> Path:
        """Where a build that runs here writes; the disks of other nodes are not seen, but say so when they are full."""
        root = self.cfg.out if isinstance(self.cfg.out, Path) else scratch_root(self.cfg.scratch)
        return next(folder for folder in (root, *root.absolute().parents) if folder.exists())


_isolated = {  # of a Ray worker process
    "cpu": Isolated("pipeline.orchestration.asset_stages:warm_up"),
    "cuda": Isolated("pipeline.orchestration.asset_stages:warm_up_cuda"),
}


@ray.remote(num_cpus=1, max_retries=0)
def _asset_task(
    record: Record,
    source: Source,
    cfg: BuildConfig,
    shard: str,
    products: tuple[Product, ...],
    attempt: int,
) -> Verdict:
    """All stages of one asset in a child of its own. RunError if no asset could succeed."""
    with workspace(cfg.out, cfg.scratch) as here:
        job = _job(record, source, cfg, here, shard, products, attempt)
        on_gpu = cfg.gpu_share > 0
        if on_gpu:
            job = replace(job, gpu=ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
        end = _isolated["cuda" if on_gpu else "cpu"].call(
            "pipeline.orchestration.asset_stages:process",
            job,
            log=job.folder / "log.txt",
            timeout_s=cfg.limits.asset_timeout_s,
            memory_bytes=int(cfg.limits.asset_memory_gb * 1e9),
            memory_limit=resource.RLIMIT_DATA if on_gpu else resource.RLIMIT_AS,
        )
        if end.reason == "disk_full":
            raise OSError(errno.ENOSPC, "disk full")
        if end.reason == "run_error":
            raise RunError(end.detail)
        result = land(job, end, attempt)
        hand_in(cfg.out, here, shard, record.uid)
        return _verdict(result)


@ray.remote(num_cpus=1, max_retries=0)
def _pack_task(job: PackJob) -> dict[str, int]:
    return commit(job)


def _job(
    record: Record,
    source: Source | None,
    cfg: BuildConfig,
    here: Path,
    shard: str,
    products: tuple[Product, ...],
    attempt: int,
) -> AssetJob:
    """The job, with an empty folder that no other attempt writes to, not even one on a node that only seemed lost."""
    final = scratch_folder(here, shard, record.uid)
    for old in final.parent.glob(f"{record.uid}.*"):
        shutil.rmtree(old, ignore_errors=True)
    folder = final.with_name(f"{record.uid}.{attempt}-{os.getpid()}")
    folder.mkdir(parents=True)
    return AssetJob(record=record, source=source, config=cfg, products=products, folder=folder)


def _verdict(result: Result) -> Verdict:
    return result.status, result.stage, result.reason, result.transient


@contextmanager
def _ray(cfg: BuildConfig) -> Iterator[None]:
    """The caller's Ray if there is one, else RAY_ADDRESS's cluster (UserError if none), else one of our own here."""
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"no Ray at RAY_ADDRESS={address}: {why}; correct or unset it"
            ) from error
    else:
        os.environ.setdefault(
            "RAY_USAGE_STATS_ENABLED", "0"
        )  # read by Ray's start-up, which has no argument for it
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
