"""Starting one process per GPU: what torchrun does, for the GPUs of one machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from pipeline.core.errors import UserError
from pipeline.core.signals import Stop, Stopped, note_signals
from train.engine.config import Gpus

log = logging.getLogger(__name__)

GRACE_S = 30.0  # that other ranks have to end after one has failed


def number_of_ranks(device: str, gpus: Gpus) -> int:
    """Return how many processes a command is to run as.

    Args:
        device: Value of `--device`.
        gpus: Value of `--gpus`.

    Raises:
        UserError: If there are not so many GPUs, or the device is a single one.
    """
    if gpus == 1:
        return 1
    if device not in ("auto", "cuda"):
        if gpus != "auto":
            raise UserError(f"--gpus {gpus} needs --device auto or cuda, got --device {device}")
        return 1
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == "auto":
        return max(found, 1)
    if gpus > found:
        raise UserError(f"--gpus {gpus} needs {gpus} GPUs, {found} found; use --gpus auto")
    return gpus


def started_ranks(module: str, args: Sequence[str], device: str, gpus: Gpus) -> int | None:
    """Run a command as one process per GPU, unless one process is enough.

    Args:
        module: Module of the command.
        args: The words after the command.
        device: Value of `--device`.
        gpus: Value of `--gpus`.

    Returns:
        The exit code of the command. None if this process is to do the work: it is a rank itself,
        or there is only one.

    Raises:
        UserError: As `number_of_ranks`.
        Stopped: After SIGINT or SIGTERM, when all ranks have ended.
    """
    # A rank does the work. WORLD_SIZE without torchrun is an error that `join_world` explains.
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        return None
    count = number_of_ranks(device, gpus)
    return None if count == 1 else run_ranks(module, args, count)


def run_ranks(module: str, args: Sequence[str], count: int) -> int:
    """Run a module in several processes that find each other as ranks of torch.distributed.

    SIGINT and SIGTERM are passed on. If a rank fails, the others are ended.

    Args:
        module: The module, run as `python -m` does it.
        args: Its arguments.
        count: Number of processes on this machine.

    Returns:
        0, or the exit code of the first rank that failed.

    Raises:
        Stopped: After SIGINT or SIGTERM, when all ranks have ended.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # The store of this process outlives every rank, as that of torchrun does.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": str(os.getpid()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))
        ),
    }
    log.info("Starting %d ranks, one for each GPU.", count)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with note_signals() as stop:
            for rank in range(count):
                env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", module, *args]
                # In a session of its own a rank gets signals from this process alone.
                ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
            code = _wait(ranks, stop)
    finally:
        for rank in ranks:
            rank.kill()
    if stop.signum:
        raise Stopped(stop.signum)
    return code


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stop: Stop) -> int:
    """Wait until all ranks have ended. Returns 0 or the exit code of the first one that failed."""
    code = 0
    passed_on = False
    deadline = float("inf")
    while None in [rank.poll() for rank in ranks]:
        if stop.signum and not passed_on:
            passed_on = True
            _send(ranks, stop.signum)
        failed = [(n, rank.returncode) for n, rank in enumerate(ranks) if rank.returncode]
        if failed and not code and not stop.signum:
            number, code = failed[0]
            if code < 0:
                log.error("Rank %d was killed by %s.", number, signal.Signals(-code).name)
                code = 1
            _send(ranks, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:  # they wait for the failed rank and see no signal
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05)
    codes = [rank.returncode for rank in ranks]
    return code or next((1 if other < 0 else other for other in codes if other), 0)


def _send(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signum)
