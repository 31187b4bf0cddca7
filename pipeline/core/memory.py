"""Peak memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    getrusage counts that of the parent process too, if the parent was larger when it started this
    one. It is only asked where /proc is missing.
    """
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
