"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar or log lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.core.files import write_atomically
from train.engine.config import LoopConfig
from train.engine.wandb_log import WandbLog

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# Left out of log lines.
FILE_ONLY = ("seconds", "elapsed_s", "data_s", "tokens", "samples", "skipped")


class MetricsLog:
    """Writes the metrics of a run. A full disk loses metrics but does not end the run.

    Args:
        out: Directory of the run.
        loop: The run's steps, steps between log lines, and time limit, which bounds the time left.
        first: Number of steps done before. Lines of later steps, which a killed run left behind,
            are deleted, so that every step has one line.
        enabled: Whether this rank writes. Only rank 0 does.
        config: JSON content that describes the run to Weights & Biases.

    Raises:
        UserError: If `loop` names a project of Weights & Biases, which cannot be used.
    """

    def __init__(
        self,
        out: Path,
        loop: LoopConfig,
        *,
        first: int,
        enabled: bool = True,
        config: Mapping[str, Any] | None = None,
    ):
        self.enabled = enabled
        self.log_every = loop.log_every
        self.steps = loop.steps
        self._max_seconds = None if loop.max_minutes is None else 60 * loop.max_minutes
        self._started = time.monotonic()
        self._recent_seconds: list[float] = []  # of the steps since the last log line
        self._file: TextIO | None = None
        self._board: Any = None
        self._wandb: WandbLog | None = None
        self._bar: Any = None
        self._warned = False
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        drop_steps_after(out / METRICS, first)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(out / "tensorboard", first)
        if loop.wandb_project is not None:
            self._wandb = WandbLog(out, loop.wandb_project, config or {})
        if sys.stderr.isatty():
            self._bar = tqdm(total=loop.steps, initial=first, unit="step", dynamic_ncols=True)

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a finished step.

        Args:
            step: Number of steps done.
            metrics: Values by name, with "seconds" as the duration of the step.
        """
        if not self.enabled:
            return
        self._write({"step": step, **metrics})
        self._recent_seconds.append(metrics["seconds"])
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(format_metrics(metrics), refresh=False)
        if step % self.log_every == 0 or step == self.steps:
            if self._bar is None:
                log.info("Step %d/%d: %s", step, self.steps, self._line(step, metrics))
            self._recent_seconds.clear()
            self._scalars("train", step, metrics)

    def log_event(self, step: int, name: str, metrics: dict[str, Any]) -> None:
        """Write metrics that do not belong to a training step, such as those of a validation."""
        if not self.enabled:
            return
        self._write({"step": step, "event": name, **metrics})
        log.info("Step %d, %s: %s", step, name, format_metrics(metrics))
        self._scalars(name, step, metrics)

    def close(self) -> None:
        """Close all files."""
        for resource in (self._bar, self._board, self._wandb, self._file):
            if resource is not None:
                try:
                    resource.close()
                except OSError as error:
                    self._warn(error)

    def _line(self, step: int, metrics: dict[str, Any]) -> str:
        """Return the metrics with the seconds per step and the time left."""
        per_step = sum(self._recent_seconds) / len(self._recent_seconds)
        left = (self.steps - step) * per_step
        if self._max_seconds is not None:
            left = min(left, self._max_seconds - (time.monotonic() - self._started))
        time_left = timedelta(seconds=round(max(left, 0)))
        return f"{format_metrics(metrics)}  {per_step:.3g} s/step  {time_left} left"

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self._warn(error)

    def _scalars(self, group: str, step: int, metrics: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.log(group, step, metrics)
        if self._board is None:
            return
        try:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:
            self._board = None
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "The metrics cannot be written (%s). Training continues without them.",
                error.strerror or error,
            )
        self._warned = True


def drop_steps_after(path: Path, step: int) -> None:
    """Delete the lines of later steps from a metrics file, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, LookupError):
            continue
    write_atomically(path, "".join(kept))


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the metrics of a log line, such as "loss 0.123  12.3k tokens/s  MFU 31.0%"."""
    words = []
    for name, value in metrics.items():
        if name in FILE_ONLY:
            continue
        if name == "tokens_per_s":
            words.append(f"{value / 1000:.1f}k tokens/s")
        elif name == "mfu":
            words += [f"MFU {100 * value:.1f}%"] if value else []
        elif isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, str) or name == "resolution":
            words.append(f"{name} {value}")
    return "  ".join(words)


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:  # optional: pip install sparse3d[tensorboard]
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)
