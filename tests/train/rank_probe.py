"""A rank that tells who it is, and then ends as its arguments say.

Usage: `python -m tests.train.rank_probe FOLDER ok | fail | killed | wait`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from pipeline.core.cli import command
from pipeline.core.errors import RunError
from pipeline.core.signals import Stopped, note_signals
from train.engine.distributed import join_world


def main(args):
    folder, ending = Path(args[0]), args[1]
    with note_signals() as stop, join_world("cpu") as world:
        total = world.sum(torch.tensor(world.rank + 1.0)).item()
        (folder / f"rank-{world.rank}").write_text(f"{world.size} {total}", encoding="utf-8")
        if world.rank == 1 and ending == "fail":
            raise RunError("this rank fails")
        if world.rank == 1 and ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending != "ok":
            deadline = time.monotonic() + 60
            while not stop.signum and time.monotonic() < deadline:
                time.sleep(0.02)
            raise Stopped(stop.signum or signal.SIGTERM)


if __name__ == "__main__":
    command(main)
