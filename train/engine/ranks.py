"""Starting one process per GPU, as torchrun does, for the GPUs of one machine or a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from pipeline.core.errors import UserError
from pipeline.core.signals import Stop, Stopped, note_signals
from train.engine.config import Gpus, RankOptions
from train.engine.rank_process import GRACE_S, RankPlace, describe_end, serve_store

log = logging.getLogger(__name__)


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


def started_ranks(module: str, args: Sequence[str], options: RankOptions) -> int | None:
    """Run a command as one process per GPU, unless one process is enough.

    Args:
        module: Module of the command.
        args: The words after the command.
        options: Devices and number of processes, which `args` states.

    Returns:
        The exit code of the command. None if this process is to do the work: it is a rank itself,
        or there is only one.

    Raises:
        UserError: As `number_of_ranks` and `run_on_ray`, or if Ray is needed and not installed.
        RunError: As `run_on_ray`.
        Stopped: After SIGINT or SIGTERM, when all ranks have ended.
    """
    # A rank does the work. WORLD_SIZE without torchrun is an error that `join_world` explains.
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        return None
    if options.ray_gpus is not None:
        if importlib.util.find_spec("ray") is None:
            raise UserError("--ray-gpus needs the package ray; pip install 'sparse3d[ray]'")
        from train.engine.ray_ranks import run_on_ray

        return run_on_ray(module, args, options)
    count = number_of_ranks(options.device, options.gpus)
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
    store = serve_store("127.0.0.1")
    log.info("Starting %d ranks, one for each GPU.", count)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with note_signals() as stop:
            for rank in range(count):
                place = RankPlace(rank=rank, size=count, local_rank=rank, local_size=count)
                env = {**os.environ, **place.environment("127.0.0.1", store.port)}
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
                log.error("Rank %d %s.", number, describe_end(code))
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
