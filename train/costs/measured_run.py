"""What a short training run measured: seconds of a step, of interruptions, and what it trained."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from model.checkpoint import read_config
from pipeline.core.errors import UserError
from train.engine import checkpoint
from train.engine.curves import read_rows
from train.engine.metrics_log import METRICS

MIN_STEPS = 5  # that a mean is taken of
Due = tuple[bool, bool, bool]  # whether a checkpoint, a validation and previews come after a step
INTERVALS = ("checkpoint_every", "validate_every", "sample_every")


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """The measurements of one run.

    Attributes:
        out: Directory of the run.
        model: Name of the model's class.
        training: Options of the run, as its checkpoint holds them.
        device: Name of the device.
        ranks: Number of ranks.
        steps: Number of steps that were averaged.
        step_s: Mean seconds of a step after the first ones.
        error_s: Half of the 95% confidence interval of the mean.
        tokens: Mean tokens of a step on each rank.
        samples: Mean assets of a step on each rank.
        data_share: Share of the time that the steps waited for data.
        startup_s: Seconds before the first step, and by which the first steps were longer.
        pauses_s: Mean seconds between two steps, by what came between them.
        intervals: Steps between checkpoints, validations and previews. 0: never.
    """

    out: Path
    model: str
    training: Mapping[str, Any]
    device: str
    ranks: int
    steps: int
    step_s: float
    error_s: float
    tokens: float
    samples: float
    data_share: float
    startup_s: float
    pauses_s: Mapping[Due, float]
    intervals: tuple[int, int, int]

    def seconds(self, steps: int) -> float:
        """Predict how long the run takes with this number of steps, in seconds.

        Pauses that the measured run did not have inside count as nothing.
        """
        counts: dict[Due, int] = defaultdict(int)
        for step in range(1, steps):
            counts[due_after(step, self.intervals)] += 1
        pauses = sum(count * self.pauses_s.get(due, 0.0) for due, count in counts.items())
        return self.startup_s + steps * self.step_s + pauses

    def unmeasured(self, steps: int) -> list[str]:
        """Return the pauses of a run of this length that the measured run did not have inside."""
        dues = {due_after(step, self.intervals) for step in range(1, steps)} - self.pauses_s.keys()
        names = [name.removesuffix("_every") for name in INTERVALS]
        return sorted(" and ".join(n for n, is_due in zip(names, due) if is_due) for due in dues)


def read_run(out: Path, warmup_share: float) -> MeasuredRun:
    """Read the metrics and the checkpoint of a run.

    Args:
        out: Directory of the run.
        warmup_share: Share of the first steps that are left out of the mean.

    Raises:
        UserError: If there is no checkpoint, or there are too few steps.
    """
    newest = checkpoint.latest(out)
    if newest is None or not (out / METRICS).exists():
        raise UserError(
            f"{out} holds no training run; name one that has ended, such as one of "
            "python -m train.dit --preset 256 --flow.loop.steps 50"
        )
    config = read_config(newest)
    rows = [row for row in read_rows(out / METRICS) if "event" not in row]
    rows = _last_process([row for row in rows if "elapsed_s" in row])
    first = math.ceil(warmup_share * len(rows))
    measured = rows[first:]
    if len(measured) < MIN_STEPS:
        raise UserError(
            f"{out} has {len(measured)} steps to measure after the first {warmup_share:.0%}, and "
            f"at least {MIN_STEPS} are needed; run more steps"
        )
    hardware = config.get("hardware") or {}
    ranks = int(hardware.get("ranks", 1))
    seconds = [row["seconds"] for row in measured]
    step_s = mean(seconds)
    loop = config["training"]["loop"]
    intervals = tuple(int(loop[name]) for name in INTERVALS)
    checked = (intervals[0], intervals[1], intervals[2])
    return MeasuredRun(
        out=out,
        model=str(config["model"]),
        training=config["training"],
        device=str(hardware.get("device", "unknown")),
        ranks=ranks,
        steps=len(measured),
        step_s=step_s,
        error_s=1.96 * stdev(seconds) / math.sqrt(len(seconds)),
        tokens=mean(row["tokens"] for row in measured) / ranks,
        samples=mean(row["samples"] for row in measured) / ranks,
        data_share=sum(row["data_s"] for row in measured) / sum(seconds),
        startup_s=_startup_s(rows, first, step_s),
        pauses_s=_pauses(rows, checked),
        intervals=checked,
    )


def due_after(step: int, intervals: tuple[int, int, int]) -> Due:
    """Return what comes after a step that is not the last one."""
    flags = [bool(every) and step % every == 0 for every in intervals]
    return flags[0], flags[1], flags[2]


def _pauses(rows: Sequence[dict[str, Any]], intervals: tuple[int, int, int]) -> dict[Due, float]:
    pauses: dict[Due, list[float]] = defaultdict(list)
    for before, after in itertools.pairwise(rows):
        pause = after["elapsed_s"] - before["elapsed_s"] - after["seconds"]
        pauses[due_after(before["step"], intervals)].append(max(pause, 0.0))
    return {due: mean(values) for due, values in pauses.items()}


def _last_process(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps since the run was started or resumed for the last time."""
    starts = [
        place + 1
        for place, (before, after) in enumerate(itertools.pairwise(rows))
        if after["elapsed_s"] < before["elapsed_s"]
    ]
    return list(rows[starts[-1] :] if starts else rows)


def _startup_s(rows: Sequence[dict[str, Any]], first: int, step_s: float) -> float:
    before = rows[0]["elapsed_s"] - rows[0]["seconds"]
    return before + sum(row["seconds"] - step_s for row in rows[:first])
