"""The training loop that every model shares: `fit` runs a task's steps and keeps what they cost and came to."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.checkpoint import load_weights, read_config
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import differences
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.signals import Stop, Stopped, note_signals
from train.engine import checkpoint
from train.engine.config import FREE_ON_RESUME, LoopConfig
from train.engine.distributed import World
from train.engine.metrics_log import MetricsLog
from train.engine.optimizer import GradientGuard, make_optimizer, peak_flops, update_average
from train.engine.prefetch import Stream

log = logging.getLogger(__name__)


class Batch(Protocol):
    """What a stream hands out."""

    @property
    def tokens(self) -> int: ...

    @property
    def samples(self) -> int: ...

    @property
    def metric_labels(
        self,
    ) -> Mapping[str, Any]: ...  # what the metrics should say of it: {"resolution": 256}

    def to(self, device: torch.device) -> Any: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch, contravariant=True)


class Task(Protocol[AnyBatch]):
    """What a model adds to the loop. Everything random must come from the batch, or from torch's default generator."""

    @property
    def model(self) -> nn.Module: ...  # fp32, on the world's device

    def losses(self, model: nn.Module, batch: AnyBatch) -> dict[str, Tensor]:
        """Scalars, the same names every step; "loss" is minimised.

        Scaled so that their mean over the ranks is that of the global batch. `model` is the task's, perhaps wrapped.
        """
        ...

    def flops(self, batch: AnyBatch) -> float:
        """Of one forward."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Losses of held-out assets, the same on every rank, all of which call it; {} if there are none."""
        ...

    def sample(self, model: nn.Module, folder: Path) -> None:
        """Write meshes and images to a new folder; called on the first rank alone."""
        ...


def fit(
    task: Task[Any],
    stream: Stream[Any],
    cfg: LoopConfig,
    *,
    out: Path,
    world: World,
    config: Mapping[str, Any],
    init: Path | None = None,
) -> int:
    """Train to cfg.steps: from `out/latest` if that is there, else from the weights of checkpoint `init`, else anew.

    config: JSON {"model", "config", "training"}, kept in every checkpoint; `out` must hold a run of the same one, but
    for FREE_ON_RESUME. Returns the steps done, fewer than cfg.steps if max_minutes came first. Stopped after a signal
    (the step was finished and kept), UserError for an `out` or `init` of another configuration, RunError if gradients
    stay bad or checkpoints cannot be written. All ranks end the same way.
    """
    return _Run(task, stream, cfg, out=out, world=world, config=config, init=init).train()


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        task: Task[Any],
        stream: Stream[Any],
        cfg: LoopConfig,
        *,
        out: Path,
        world: World,
        config: Mapping[str, Any],
        init: Path | None,
    ):
        self.task, self.stream, self.cfg, self.out, self.world = task, stream, cfg, out, world
        self.config = {"format_version": FORMAT_VERSION, **config, **checkpoint.provenance()}
        self.model = task.model
        torch.manual_seed(cfg.seed * 1_000_003 + world.rank)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
            torch.use_deterministic_algorithms(True)
        self.guard = GradientGuard(cfg.spike_factor, cfg.clip_norm, cfg.max_bad_steps)
        self.optimizer = make_optimizer(self.model, cfg, world.device)
        found = checkpoint.latest(out)
        if found is None and init is not None:
            load_weights(init, self.model)
            log.info("weights from %s", init)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.done = 0
        if found is not None:
            self._resume(found)
        self.saved = self.done if found is not None else -1
        self.failed_saves = 0
        self.signalled = False  # whether any rank was asked to stop
        self.wrapped = world.parallel(self.model)
        self.started = time.monotonic()
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None

    def train(self) -> int:
        cfg = self.cfg
        journal = MetricsLog(
            self.out,
            first=self.done,
            steps=cfg.steps,
            log_every=cfg.log_every,
            enabled=self.world.is_first,
        )
        try:
            with note_signals() as stop:
                self._steps(journal, stop)
            return self.done
        finally:
            journal.close()
            self.stream.close()

    def _steps(self, journal: MetricsLog, stop: Stop) -> None:
        cfg, ending = self.cfg, self.done >= self.cfg.steps
        while not ending:
            started = time.monotonic()
            row, bad, ending = self._step(stop)
            seconds = time.monotonic() - started
            work = 3 * row.pop("flops")  # a backward costs two forwards
            mfu = work / seconds / self.peak if self.peak else None
            row |= {"seconds": seconds, "tokens_per_s": row["tokens"] / seconds, "mfu": mfu}
            journal.step(self.done, row)
            if bad:
                self._complain(bad)
            ending |= self.done >= cfg.steps
            at_leisure = not self.signalled
            if _due(self.done, cfg.checkpoint_every, ending):
                self._save(ending)  # before what may find that a held-out asset cannot be read
            if at_leisure and _due(self.done, cfg.validate_every, ending):
                with self._aside():
                    numbers = self.task.validate(self.ema)
                if numbers:
                    journal.event(self.done, "validation", numbers)
            if at_leisure and _due(self.done, cfg.sample_every, ending):
                self._sample()
        if stop.signum or self.signalled:
            raise Stopped(stop.signum or signal.SIGTERM)

    def _complain(self, bad: str) -> None:
        log.warning(
            "step %d not applied: %s (%d skipped so far)", self.done, bad, self.guard.skipped
        )
        if self.guard.in_a_row >= self.cfg.max_bad_steps:
            raise RunError(
                f"{self.guard.in_a_row} gradients in a row could not be applied, the last one {bad}; lower "
                f"--learning-rate or look at the data; the last checkpoint is {checkpoint.latest(self.out)}"
            )

    def _step(self, stop: Stop) -> tuple[dict[str, Any], str, bool]:
        """One step: what it came to, why it was not applied, and whether some rank wants to end."""
        cfg, world, started = self.cfg, self.world, time.monotonic()
        batch = next(self.stream)
        tokens, samples, about = batch.tokens, batch.samples, dict(batch.metric_labels)
        batch = batch.to(world.device)
        waited = time.monotonic() - started
        rate = cfg.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(world.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            losses = self.task.losses(self.wrapped, batch)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_norm)
        late = (
            cfg.max_minutes is not None and time.monotonic() - self.started > 60 * cfg.max_minutes
        )
        counts = [tokens, samples, self.task.flops(batch), waited, bool(stop.signum), late]
        scalars = torch.stack(
            [*(value.detach().double() for value in losses.values()), norm.double()]
        )
        counted = torch.tensor(counts, dtype=torch.float64).to(world.device, non_blocking=True)
        values = world.sum(torch.cat([scalars, counted])).tolist()  # the one wait for the device
        split = len(losses) + 1
        *means, norm = (value / world.size for value in values[:split])
        tokens, samples, flops, waited, signals, late = values[split:]
        row = dict(zip(losses, means, strict=True))
        bad = self.guard.judge(row["loss"], norm)
        if not bad:
            self.optimizer.step()
            update_average(
                self.ema, self.model, min(cfg.ema_decay, (1 + self.done) / (10 + self.done))
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.signalled = signals > 0
        row |= about | {
            "grad_norm": norm,
            "lr": rate,
            "tokens": int(tokens),
            "samples": int(samples),
            "flops": flops,
        }
        row |= {"data_s": waited / world.size, "skipped": self.guard.skipped}
        return row, bad, bool(signals or late)

    def _save(self, ending: bool) -> None:
        if self.saved == self.done:
            return
        state = {
            "format_version": FORMAT_VERSION,
            "step": self.done,
            "world_size": self.world.size,
            "data": self.stream.state,
            "guard": self.guard.state(),
        }
        problem = checkpoint.save(
            self.out,
            self.done,
            weights={"model": self.model, "ema": self.ema},
            optimizer=self.optimizer,
            state=state,
            config=self.config,
            world=self.world,
            keep_last=self.cfg.keep_last,
        )
        if not problem:
            self.saved, self.failed_saves = self.done, 0
            return
        self.failed_saves += 1
        kept = checkpoint.latest(self.out)
        log.error("step %d: no checkpoint: %s; the last one is %s", self.done, problem, kept)
        if ending or self.failed_saves >= self.cfg.max_failed_checkpoints:
            raise RunError(
                f"{self.failed_saves} checkpoints in a row could not be written ({problem}); kept is {kept}"
            )

    def _resume(self, found: Path) -> None:
        there = read_config(found)
        wanted = {name: self.config.get(name) for name in ("model", "config", "training")}
        stored = {name: there.get(name) for name in wanted}
        changed = differences(_identity(stored), _identity(wanted))
        if changed:
            raise UserError(
                f"{found} was trained with {'; '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}; choose "
                "another --out (and --init for its weights), or the same options to go on with it"
            )
        weights = {"model": self.model, "ema": self.ema}
        state = checkpoint.restore(
            found, weights=weights, optimizer=self.optimizer, world=self.world
        )
        self.stream.restore(state["data"])
        self.guard.restore(state["guard"])
        self.done = state["step"]
        log.info("going on from %s", found)

    def _sample(self) -> None:
        folder = self.out / "samples" / f"step-{self.done:08d}"
        if self.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                with self._aside():
                    self.task.sample(self.ema, folder)
            except OSError as error:
                log.error("step %d: samples not written: %s", self.done, error)
        self.world.barrier()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Without gradients, in the run's precision, and leaving no trace in the random state."""
        device = self.world.device
        devices = [device] if device.type == "cuda" else []
        enabled = self.cfg.precision == "bf16"
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=enabled),
        ):
            yield


def _due(step: int, every: int, ending: bool) -> bool:
    return bool(every) and (ending or step % every == 0)


def _identity(value: Any) -> Any:
    """A config without what may change when a run goes on."""
    if not isinstance(value, dict):
        return value
    return {name: _identity(inner) for name, inner in value.items() if name not in FREE_ON_RESUME}
