"""What a run tells: one JSON line a step, TensorBoard where it is installed, a progress bar or plain log lines."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
QUIET = ("seconds", "data_s", "tokens", "samples", "skipped")  # only in the file


class MetricsLog:
    """Writes on the first rank only. A full disk costs lines, never the run.

    `first` is the number of steps done before: lines beyond it, of a run that was killed, are removed, so that every
    step has one line.
    """

    def __init__(self, out: Path, *, first: int, steps: int, log_every: int, enabled: bool = True):
        self.enabled, self.log_every, self.steps = enabled, log_every, steps
        self._file: TextIO | None = None
        self._board: Any = None
        self._bar: Any = None
        self._complained = False
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        drop_steps_after(out / METRICS, first)
        self._file = (out / METRICS).open("a")
        self._board = _tensorboard(out / "tensorboard", first)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)

    def step(self, step: int, row: dict[str, Any]) -> None:
        """One finished step."""
        if not self.enabled:
            return
        self._write({"step": step, **row})
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(brief(row), refresh=False)
        if step % self.log_every == 0 or step == self.steps:
            if self._bar is None:
                log.info("step %d/%d  %s", step, self.steps, brief(row))
            self._scalars("train", step, row)

    def event(self, step: int, name: str, numbers: dict[str, Any]) -> None:
        """Something beside the steps, such as validation: a line {"step", "event", ...}."""
        if not self.enabled:
            return
        self._write({"step": step, "event": name, **numbers})
        log.info("step %d  %s: %s", step, name, brief(numbers))
        self._scalars(name, step, numbers)

    def close(self) -> None:
        for resource in (self._bar, self._board, self._file):
            if resource is not None:
                try:
                    resource.close()
                except OSError as error:
                    self._complain(error)

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self._complain(error)

    def _scalars(self, group: str, step: int, numbers: dict[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:
            self._board = None
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning(
                "metrics cannot be written (%s); training goes on without", error.strerror or error
            )
        self._complained = True


def drop_steps_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, LookupError):
            continue
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def brief(row: dict[str, Any]) -> str:
    """The numbers worth a line: "loss 0.123  12.3k tokens/s  MFU 31%  ..."."""
    words = []
    for name, value in row.items():
        if name in QUIET:
            continue
        if name == "tokens_per_s":
            words.append(f"{value / 1000:.1f}k tokens/s")
        elif name == "mfu":
            words += [f"MFU {100 * value:.1f}%"] if value else []
        elif isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, str) or (name == "resolution"):
            words.append(f"{name} {value}")
    return "  ".join(words)


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:  # optional: pip install sparse3d[tensorboard]
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)
