"""A source for tests: boxes, some of which crash, hang or exhaust the process that reads them."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import Transient
from pipeline.core.schema import Record
from pipeline.sources.procedural import ProceduralSource


@dataclass(frozen=True, kw_only=True)
class CrashingSource:
    """Yields boxes with procedural names, which are cheap to process.

    Args:
        count: Number of boxes.
        behaviours: (number of a box, what its reader does), such as (3, "segfault").
        notes: Directory in which every visit to a box leaves a file "<number>.<visit>".
    """

    count: int
    behaviours: tuple[tuple[int, str], ...] = ()
    notes: Path | None = None
    name = "procedural"

    def records(self) -> Iterator[Record]:
        yield from ProceduralSource(count=self.count).records()

    def materialize(self, record: Record, scratch: Path) -> Path:
        number = int(record.url.partition(":")[2].partition("-")[0])
        behaviour = dict(self.behaviours).get(number, "")
        visits = 0
        if self.notes is not None:
            visits = len(list(self.notes.glob(f"{number}.*")))
            (self.notes / f"{number}.{visits}").touch()
        if behaviour == "segfault":
            ctypes.string_at(0)
        elif behaviour == "abort":
            os.abort()
        elif behaviour == "hang":
            ctypes.CDLL(None).sleep(600)  # native code: no Python signal handler runs
        elif behaviour == "spin_with_child":
            if os.fork() == 0:
                time.sleep(600)
            time.sleep(600)
        elif behaviour == "memory":
            np.ones(1 << 40, np.uint8)
        elif behaviour == "leak":
            kept = []
            while True:
                kept.append(np.empty(1 << 24, np.uint8))
        elif behaviour == "raise":
            raise RuntimeError(f"a bug, seen in {scratch}")
        elif behaviour == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        elif behaviour == "lose_worker" and visits == 0:
            _kill_ray_worker()
        elif behaviour == "trouble" or (behaviour == "trouble_once" and visits == 0):
            raise Transient("http_503", host="example.org")
        elif behaviour == "vanish":
            raise FileNotFoundError("gone since the folder was listed")
        path = scratch / "box.obj"
        path.write_text(box(1 + number / 10), encoding="utf-8")
        return path


def box(height: float) -> str:
    """Return an OBJ file of a box with side 1 and this height."""
    corners = "".join(f"v {x} {y * height} {z}\n" for x in (0, 1) for y in (0, 1) for z in (0, 1))
    return corners + "f 1 2 4 3\nf 5 7 8 6\nf 1 5 6 2\nf 3 4 8 7\nf 1 3 7 5\nf 2 6 8 4\n"


def _kill_ray_worker() -> None:
    """Kill the Ray worker, which is the parent of the server that forked this process."""
    server = os.getppid()
    worker = int(
        Path(f"/proc/{server}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
    )
    os.kill(worker, signal.SIGKILL)
    time.sleep(600)
