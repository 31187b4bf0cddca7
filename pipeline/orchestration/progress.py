"""How far a build is: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class Progress:
    """Counts assets by status; shows counts, rate and the time left."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit = total, unit
        self.counts: Counter[str] = Counter()
        self.resumed = (
            0  # counted before anything was done in this run: they say nothing about its speed
        )
        self.started = self.shown = time.monotonic()
        self.bar = (
            tqdm(total=total, unit=unit[:-1], dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def count(self, status: str, *, resumed: bool = False) -> None:
        self.counts[status] += 1
        self.resumed += resumed
        if self.bar is not None:
            self.bar.set_postfix(self.counts, refresh=False)
            self.bar.update()

    def show(self) -> None:
        """Write a line if the last one is long ago; a bar draws itself."""
        if self.bar is None and time.monotonic() - self.shown >= LINE_EVERY_S:
            self._line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def _line(self) -> None:
        self.shown = time.monotonic()
        seen = sum(self.counts.values())
        rate = (seen - self.resumed) / max(self.shown - self.started, 1e-9)
        left = f"{(self.total - seen) / rate:.0f} s left" if rate else "time left unknown"
        kinds = (
            ", ".join(f"{n} {status}" for status, n in sorted(self.counts.items())) or "none yet"
        )
        log.info("%d/%d %s (%s), %.2f/s, %s", seen, self.total, self.unit, kinds, rate, left)
