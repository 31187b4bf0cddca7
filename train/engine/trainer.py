"""The trainer of every model: the training step, validation, previews, checkpoints and resuming."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.checkpoint import read_config
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import differences
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.signals import Stop, Stopped, note_signals
from train.engine import checkpoint
from train.engine.config import FREE_ON_RESUME, LoopConfig
from train.engine.distributed import World
from train.engine.metrics_log import METRICS, MetricsLog
from train.engine.optimizer import (
    GradientGuard,
    device_name,
    make_optimizer,
    peak_flops,
    update_average,
)
from train.engine.prefetch import Stream

log = logging.getLogger(__name__)

WAIT_S = 0.5  # for the next batch, after which the ranks ask each other for signals
SAMPLES = "samples"  # directory of the previews inside a run's directory


class TrainingBatch(Protocol):
    """The part of the global batch that one rank works on in one step."""

    @property
    def tokens(self) -> int:
        """Number of cells."""
        ...

    @property
    def samples(self) -> int:
        """Number of assets."""
        ...

    @property
    def metric_labels(self) -> Mapping[str, Any]:
        """Values that are copied into the step's metrics, such as {"resolution": 256}."""
        ...

    def to(self, device: torch.device) -> Any:
        """Return the same batch on a device."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=TrainingBatch, contravariant=True)


class Task(Protocol[AnyBatch]):
    """What a model adds to the trainer.

    All random numbers come from the batch or from torch's default generator, so that a resumed run
    draws the same ones.
    """

    @property
    def model(self) -> nn.Module:
        """The model in fp32 on the world's device."""
        ...

    def losses(self, model: nn.Module, batch: AnyBatch) -> dict[str, Tensor]:
        """Compute the loss terms of a batch.

        Args:
            model: The task's model, which may be wrapped for distributed training.
            batch: This rank's batch on the world's device.

        Returns:
            Scalars, with the same names in every step. "loss" is minimised. They are scaled so that
            their mean over the ranks is the loss of the global batch.
        """
        ...

    def flops(self, batch: AnyBatch) -> float:
        """Return the number of floating-point operations of one forward pass."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Compute metrics of held-out assets. All ranks call this together.

        Returns:
            The same metrics on every rank. Empty if there are no held-out assets.
        """
        ...

    def sample(self, model: nn.Module, folder: Path) -> None:
        """Write meshes and pictures to an empty folder. Only rank 0 calls this."""
        ...


@dataclass(frozen=True)
class StepResult:
    """Outcome of one training step, the same on every rank."""

    metrics: dict[str, Any]
    flops: float  # of the forward passes of all ranks
    skipped: str  # why the gradient was not applied, or ""
    stop: bool  # a rank got a signal or the time limit has passed
    saved: bool  # every rank has written its part of the pending checkpoint
    has_next: bool  # every rank has loaded its next batch


class Trainer:
    """Trains a model up to `cfg.steps` steps, with checkpoints, validation and previews.

    The run continues from `out/latest` if that exists. Otherwise it starts from the weights that
    the task's model has. All ranks end in the same way.

    Args:
        task: The model with its losses.
        stream: This rank's batches.
        cfg: Options of the trainer.
        out: Directory of the run.
        world: This rank.
        config: JSON entries "model", "config" and "training", kept in every checkpoint. A resumed
            run must have the same ones except for FREE_ON_RESUME.

    Raises:
        UserError: If `out` has another configuration or is damaged.
    """

    def __init__(
        self,
        task: Task[Any],
        stream: Stream[Any],
        cfg: LoopConfig,
        *,
        out: Path,
        world: World,
        config: Mapping[str, Any],
    ):
        self.task = task
        self.stream = stream
        self.cfg = cfg
        self.out = out
        self.world = world
        self.config = {
            "format_version": FORMAT_VERSION,
            **config,
            "hardware": {"device": device_name(world.device), "ranks": world.size},
            **checkpoint.provenance(),
        }
        self.model = task.model
        torch.manual_seed(cfg.seed * 1_000_003 + world.rank)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
            torch.use_deterministic_algorithms(True)
        self.guard = GradientGuard(cfg.spike_factor, cfg.clip_norm, cfg.max_bad_steps)
        self.optimizer = make_optimizer(self.model, cfg, world.device)
        newest = checkpoint.latest(out)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.done = 0  # steps, of this process and of those that it resumes
        if newest is not None:
            self._resume(newest)
        self.saved = self.done if newest is not None else -1
        self.writer = checkpoint.CheckpointWriter(
            out,
            weights={"model": self.model, "ema": self.ema},
            optimizer=self.optimizer,
            config=self.config,
            world=world,
            keep_last=cfg.keep_last,
        )
        self.failed_saves = 0
        self.signalled = False  # whether any rank got a signal
        self.wrapped = world.parallel(self.model)
        self.started = time.monotonic()
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None

    def run(self) -> int:
        """Train up to the last step.

        Returns:
            Number of steps done. It is smaller than `cfg.steps` if `cfg.max_minutes` has passed.

        Raises:
            Stopped: After SIGINT or SIGTERM. The current step is finished and a checkpoint written.
            RunError: If too many gradients in a row are bad, or checkpoints cannot be written.
        """
        cfg = self.cfg
        self._log_start()
        metrics_log = MetricsLog(
            self.out, cfg, first=self.done, enabled=self.world.is_first, config=self.config
        )
        try:
            with note_signals() as stop:
                self._train(metrics_log, stop)
        finally:
            self.writer.abandon()
            metrics_log.close()
            self.stream.close()
        self._log_end()
        return self.done

    def _train(self, metrics_log: MetricsLog, stop: Stop) -> None:
        cfg = self.cfg
        ending = self.done >= cfg.steps
        has_batches = False
        while not ending:
            started = time.monotonic()
            if not (has_batches or self._wait_for_batches(stop)):
                self._finish_save(ending=False)
                self._save(ending=True)
                break
            result = self.training_step(stop, started)
            has_batches = result.has_next
            seconds = time.monotonic() - started
            self._log_step(metrics_log, result, seconds)
            if result.skipped:
                self._report_skipped(result.skipped)
            ending = result.stop or self.done >= cfg.steps
            if result.saved:
                self._finish_save(ending=False)
            if _due(self.done, cfg.checkpoint_every, ending):
                self._save(ending)
            # After a signal the process has little time left.
            if self.signalled:
                continue
            validates = _due(self.done, cfg.validate_every, ending)
            samples = _due(self.done, cfg.sample_every, ending)
            # The checkpoint comes first: validation may fail on an unreadable held-out asset.
            if validates or samples:
                self._finish_save(ending)
            if validates:
                self._validate(metrics_log)
            if samples:
                self._sample()
        if stop.signum or self.signalled:
            log.info("The checkpoint of step %d is complete.", self.saved)
            raise Stopped(stop.signum or signal.SIGTERM)

    def _wait_for_batches(self, stop: Stop) -> bool:
        """Wait until every rank has loaded its next batch. All ranks call this together.

        A store may stall for minutes, which the checkpoint after a signal must not wait for.

        Returns:
            False if a signal or the time limit ends the run before.
        """
        while True:
            has_batch = self.stream.wait(WAIT_S)
            flags = [not has_batch, bool(stop.signum), self._is_late()]
            missing, signals, late = self.world.sum(
                torch.tensor(flags, dtype=torch.float64).to(self.world.device)
            ).tolist()
            self.signalled = signals > 0
            if not missing or signals or late:
                return not missing

    def _is_late(self) -> bool:
        limit = self.cfg.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def training_step(self, stop: Stop, started: float) -> StepResult:
        """Do one step on all ranks: batch, losses, gradients, optimizer and averaged weights.

        Args:
            stop: The signal that ends the run, if any.
            started: When this rank began to wait for the batch, by `time.monotonic`.
        """
        cfg, world = self.cfg, self.world
        batch = next(self.stream)
        tokens, samples = batch.tokens, batch.samples
        labels = dict(batch.metric_labels)
        batch = batch.to(world.device)
        waited = time.monotonic() - started

        rate = cfg.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(world.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            losses = self.task.losses(self.wrapped, batch)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_norm)

        # One all-reduce and one wait for the device give all ranks the same numbers.
        counts = [
            *(tokens, samples, self.task.flops(batch), waited, bool(stop.signum)),
            *(self._is_late(), self.writer.is_waiting, self.stream.wait(0)),
        ]
        scalars = torch.stack(
            [*(value.detach().double() for value in losses.values()), norm.double()]
        )
        counted = torch.tensor(counts, dtype=torch.float64).to(world.device, non_blocking=True)
        sums = world.sum(torch.cat([scalars, counted])).tolist()
        split = len(losses) + 1
        *means, norm = (value / world.size for value in sums[:split])
        tokens, samples, flops, waited, signals, late, saved, loaded = sums[split:]
        metrics = dict(zip(losses, means, strict=True))

        # A bad gradient is dropped, so that neither weights, moments nor averages see it.
        skipped = self.guard.judge(metrics["loss"], norm)
        if not skipped:
            self.optimizer.step()
            decay = min(cfg.ema_decay, (1 + self.done) / (10 + self.done))
            update_average(self.ema, self.model, decay)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.signalled = signals > 0
        metrics |= labels | {
            "grad_norm": norm,
            "lr": rate,
            "tokens": int(tokens),
            "samples": int(samples),
            "data_s": waited / world.size,
            "skipped": self.guard.skipped,
        }
        return StepResult(
            metrics,
            flops,
            skipped,
            stop=bool(signals or late),
            saved=saved == world.size,
            has_next=loaded == world.size,
        )

    def _log_step(self, metrics_log: MetricsLog, result: StepResult, seconds: float) -> None:
        work = 3 * result.flops  # a backward pass costs as much as two forward passes
        speed = {
            "seconds": seconds,
            "elapsed_s": time.monotonic() - self.started,
            "tokens_per_s": result.metrics["tokens"] / seconds,
            "mfu": work / seconds / self.peak if self.peak else None,
        }
        metrics_log.log_step(self.done, result.metrics | speed)

    def _report_skipped(self, reason: str) -> None:
        log.warning(
            "Step %d was not applied: %s (%d skipped so far).",
            self.done,
            reason,
            self.guard.skipped,
        )
        if self.guard.in_a_row >= self.cfg.max_bad_steps:
            self._finish_save(ending=False)
            raise RunError(
                f"{self.guard.in_a_row} gradients in a row could not be applied, the last one was "
                f"{reason}; lower the learning rate or check the data; the last checkpoint is "
                f"{checkpoint.latest(self.out)}"
            )

    def _save(self, ending: bool) -> None:
        """Begin to write a checkpoint. At the end of the run, also finish it."""
        if self.saved == self.done:
            return
        self._finish_save(ending=False)
        state = {
            "format_version": FORMAT_VERSION,
            "step": self.done,
            "world_size": self.world.size,
            "data": self.stream.state,
            "guard": self.guard.state(),
        }
        problem = self.writer.begin(self.done, state)
        if problem:
            self._note_failed_save(self.done, problem, ending)
        elif ending:
            self._finish_save(ending)

    def _finish_save(self, ending: bool) -> None:
        """Wait for the pending checkpoint, if there is one. All ranks call this together."""
        step = self.writer.pending_step
        if step is None:
            return
        problem = self.writer.finish()
        if problem:
            self._note_failed_save(step, problem, ending)
        else:
            self.saved = step
            self.failed_saves = 0

    def _note_failed_save(self, step: int, problem: str, ending: bool) -> None:
        self.failed_saves += 1
        kept = checkpoint.latest(self.out)
        log.error(
            "Step %d: the checkpoint could not be written: %s. The last checkpoint is %s.",
            step,
            problem,
            kept,
        )
        if ending or self.failed_saves >= self.cfg.max_failed_checkpoints:
            raise RunError(
                f"{self.failed_saves} checkpoints in a row could not be written ({problem}); "
                f"free some space and run the same command; the last checkpoint is {kept}"
            )

    def _resume(self, path: Path) -> None:
        stored = read_config(path)
        names = ("model", "config", "training")
        old = {name: stored.get(name) for name in names}
        new = {name: self.config.get(name) for name in names}
        changed = differences(_fixed_options(old), _fixed_options(new))
        if changed:
            more = " ..." if len(changed) > 4 else ""
            raise UserError(
                f"{path} was trained with {'; '.join(changed[:4])}{more}; choose another --out "
                "(and --init for its weights), or the same options to resume it"
            )
        weights = {"model": self.model, "ema": self.ema}
        state = checkpoint.restore(
            path, weights=weights, optimizer=self.optimizer, world=self.world
        )
        self.stream.restore(state["data"])
        self.guard.restore(state["guard"])
        self.done = state["step"]
        log.info("Resuming from %s.", path)

    def _validate(self, metrics_log: MetricsLog) -> None:
        with self._inference():
            metrics = self.task.validate(self.ema)
        if metrics:
            metrics_log.log_event(self.done, "validation", metrics)

    def _sample(self) -> None:
        folder = checkpoint.step_directory(self.out / SAMPLES, self.done)
        if self.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                with self._inference():
                    self.task.sample(self.ema, folder)
            except OSError as error:
                log.error("Step %d: the previews could not be written: %s.", self.done, error)
        self.world.barrier()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Compute without gradients, in the run's precision, and restore the random state."""
        device = self.world.device
        devices = [device] if device.type == "cuda" else []
        enabled = self.cfg.precision == "bf16"
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=enabled),
        ):
            yield

    def _log_start(self) -> None:
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "Training %s with %.2f M trainable parameters on %d x %s.",
            type(self.model).__name__,
            count / 1e6,
            self.world.size,
            self.world.device.type,
        )

    def _log_end(self) -> None:
        places = [f"checkpoints are in {self.out}", f"metrics in {self.out / METRICS}"]
        if (self.out / SAMPLES).is_dir():
            places.append(f"previews in {self.out / SAMPLES}/")
        log.info("Done: %d of %d steps; %s.", self.done, self.cfg.steps, ", ".join(places))


def _due(step: int, every: int, ending: bool) -> bool:
    """Return whether something that happens every so many steps and at the end is due. 0: never."""
    return bool(every) and (ending or step % every == 0)


def _fixed_options(value: Any) -> Any:
    """Return a configuration without the options that may change when a run is resumed."""
    if not isinstance(value, dict):
        return value
    return {
        name: _fixed_options(inner) for name, inner in value.items() if name not in FREE_ON_RESUME
    }
