"""Runs train.dit and kills its second rank once, in a given step.

Usage: `torchrun ... -m tests.train.killed_rank_run FLAG STEP OPTIONS...`. The file FLAG records
that the rank was killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from pipeline.core.cli import command
from train.dit import main
from train.stages.dit.task import DiTTask


def kill_second_rank(flag: Path, step: int) -> None:
    """Kill the second rank in its step number `step`, unless the file `flag` exists."""
    original = DiTTask.losses
    calls = []

    def losses(self, model, batch):
        calls.append(1)
        if os.environ.get("RANK") == "1" and len(calls) == step and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch)

    DiTTask.losses = losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_second_rank(Path(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    command(main)
