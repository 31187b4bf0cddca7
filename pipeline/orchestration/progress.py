"""Progress of a build: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
STARTING_AFTER_S = 3.0  # warm workers finish the first assets before that


class Progress:
    """Counts finished assets by status and shows counts, rate and remaining time.

    Rate and remaining time count from the first asset that this run finishes, because starting the
    workers and compiling take longer than many assets.

    Args:
        total: Number of assets in this run, with those of earlier runs that are still in scratch.
        unit: Plural noun for what is counted.
        shards: Number of shards to commit.
        starting: What to log while nothing is counted yet.
    """

    def __init__(self, total: int, unit: str, *, shards: int, starting: str):
        self.total = total
        self.unit = unit
        self.shards = shards
        self.starting = starting
        self.committed = 0
        self.counts: Counter[str] = Counter()
        self.resumed = 0  # finished by an earlier run: they say nothing about this run's speed
        self.started = self.shown = time.monotonic()
        self.first_finished: float | None = None
        self.last_line = ""
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, unit=unit[:-1], dynamic_ncols=True)

    def count(self, status: str, *, resumed: bool = False) -> None:
        """Count one asset.

        Args:
            status: "done", "rejected" or "failed".
            resumed: Whether an earlier run finished the asset.
        """
        self.counts[status] += 1
        self.resumed += resumed
        if not resumed and self.first_finished is None:
            self.first_finished = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(self.counts, refresh=False)
            self.bar.update()

    def count_shard(self) -> None:
        """Count one committed shard."""
        self.committed += 1

    def show(self) -> None:
        """Log a line if the last one is at least ten seconds old. A bar draws itself.

        Until this run has finished an asset, `starting` is logged instead, and only once.
        """
        now = time.monotonic()
        waiting = self.first_finished is None
        if waiting and self.starting and now - self.started >= STARTING_AFTER_S:
            log.info("%s", self.starting)
            self.starting = ""
        if self.bar is None and not waiting and now - self.shown >= LINE_EVERY_S:
            self._log_line()

    def close(self) -> None:
        """Close the bar, or log the last line unless it is there already."""
        if self.bar is not None:
            self.bar.close()
        elif self.counts:
            self._log_line()

    def _log_line(self) -> None:
        self.shown = time.monotonic()
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items()))
        if self.resumed:
            statuses += f"; {self.resumed} by an earlier run"
        finished = sum(self.counts.values())
        line = (
            f"{finished}/{self.total} {self.unit} ({statuses}), {self._outlook(finished)}, "
            f"{self.committed} of {self.shards} shards committed"
        )
        if line != self.last_line:
            log.info("%s", line)
        self.last_line = line

    def _outlook(self, finished: int) -> str:
        """Return what is left to do: assets with rate and time, shards, or nothing."""
        if finished == self.total:
            return "all finished" if self.committed == self.shards else "committing the shards"
        later = finished - self.resumed - 1  # those after the first one of this run
        if self.first_finished is None or later < 1:
            return "time left unknown"
        rate = later / max(self.shown - self.first_finished, 1e-9)
        return f"{rate:.2f}/s, {(self.total - finished) / rate:.0f} s left"
