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
        finished = sum(self.counts.values()) - self.resumed
        if not finished and self.starting and now - self.started >= STARTING_AFTER_S:
            log.info("%s", self.starting)
            self.starting = ""
        if self.bar is None and finished and now - self.shown >= LINE_EVERY_S:
            self._log_line()

    def close(self) -> None:
        """Close the bar, or log the last line."""
        if self.bar is not None:
            self.bar.close()
        elif self.counts:
            self._log_line()

    def _log_line(self) -> None:
        self.shown = time.monotonic()
        finished = sum(self.counts.values())
        rate = (finished - self.resumed) / max(self.shown - self.started, 1e-9)
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items()))
        remaining = f"{(self.total - finished) / rate:.0f} s left" if rate else "time left unknown"
        if finished == self.total:
            remaining = "all finished"
        log.info(
            "%d/%d %s (%s), %.2f/s, %s, %d of %d shards committed",
            finished,
            self.total,
            self.unit,
            statuses,
            rate,
            remaining,
            self.committed,
            self.shards,
        )
