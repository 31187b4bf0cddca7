"""`torchrun ... -m tests.train.killed_rank_run FLAG STEP OPTIONS...`: train.dit whose second rank is killed once, at STEP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from pipeline.core.cli import command
from train.dit import main
from train.stages.dit.task import DiTTask


def mortal(flag: Path, step: int) -> None:
    """Kill the second rank in its step number `step`, unless `flag` says that it was done before."""
    original, calls = DiTTask.losses, []

    def losses(self, model, batch):
        calls.append(1)
        if os.environ.get("RANK") == "1" and len(calls) == step and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch)

    DiTTask.losses = losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    mortal(Path(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    command(main)
