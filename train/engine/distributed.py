"""Distributed training under torchrun: ranks, their devices and their collectives."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.devices import Device, choose_device
from pipeline.core.errors import RunError, UserError

CPU = torch.device("cpu")
# Ranks wait this long for the first one, which writes checkpoints and previews.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """All processes of a training run, seen from one of them. The default is a single process."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks as float64, in which counts are exact.

        Args:
            values: Any shape, the same on all ranks. All ranks call this together.
        """
        values = values.double()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. All ranks call this together."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return a model whose gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def join_world(device: Device) -> Iterator[World]:
    """Join the ranks that torchrun has started, or train in this process alone.

    The ranks use NCCL on GPUs and gloo on CPUs. Ranks other than the first log only warnings.

    Args:
        device: Value of `--device`. "auto" and "cuda" take one GPU per rank.

    Yields:
        This rank, as the variables RANK, LOCAL_RANK and WORLD_SIZE describe it.

    Raises:
        UserError: If there is no such GPU, this machine has more ranks than GPUs, or WORLD_SIZE
            asks for several ranks that torchrun has not started.
    """
    size, rank, local_rank = _ranks()
    torch_device = choose_device(device, local_rank)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    if size == 1:
        yield World(device=torch_device)
        return
    backend = "nccl" if torch_device.type == "cuda" else "gloo"
    store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    dist.init_process_group(
        backend,
        store=fresh_store(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=torch_device if torch_device.type == "cuda" else None,
    )
    try:
        with reporting_lost_ranks(rank, size):
            yield World(rank=rank, size=size, device=torch_device)
    finally:
        dist.destroy_process_group()


@contextmanager
def reporting_lost_ranks(rank: int, size: int) -> Iterator[None]:
    """Turn the errors of collectives inside the block, which fail without a rank, into RunError.

    Args:
        rank: Number of this rank.
        size: Number of ranks.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        if not isinstance(error, dist.DistError) and "gloo" not in first_line:
            raise
        raise RunError(
            f"rank {rank} of {size} lost the connection to another rank ({first_line}); see the "
            "message of the rank that ended first, and run the same command to resume"
        ) from error


def _ranks() -> tuple[int, int, int]:
    """Return the number of ranks, the number of this rank, and its number on this machine.

    torchrun sets TORCHELASTIC_RUN_ID. Without it other ranks would be waited for in vain.

    Raises:
        UserError: If WORLD_SIZE asks for several ranks that torchrun has not started.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        size, rank, local_rank = (int(os.environ[name]) for name in names)
        return size, rank, local_rank
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UserError(
            f"the environment has WORLD_SIZE={size}, but torchrun did not start this process: "
            "unset WORLD_SIZE, or start the ranks with torchrun --nproc-per-node N -m ..."
        )
    return 1, 0, 0


def fresh_store(store: Store, rank: int, size: int) -> Store:
    """Return an empty part of torchrun's store, the same part on all ranks.

    The store outlives a restart of the ranks, so it may hold addresses of killed ranks, to which
    others would connect. Each process therefore takes a name that no process had before. The first
    rank names the part after itself and tells its name to every other rank.

    Args:
        store: The store that torchrun has created.
        rank: Number of this rank.
        size: Number of ranks.

    Raises:
        RunError: If a rank did not start within TIMEOUT.
    """
    advice = "see their messages, and run the same command to resume"
    own_name = uuid.uuid4().hex
    if rank:
        store.set(f"here-{rank}", own_name)
        try:
            store.wait([f"start-for-{own_name}"], TIMEOUT)
        except dist.DistError as error:
            raise RunError(
                f"rank 0 of {size} did not start within {TIMEOUT}, or waits for another rank; "
                f"{advice}"
            ) from error
        first_name = store.get(f"start-for-{own_name}").decode()
        store.set(f"heard-{own_name}-{first_name}", "")
        return PrefixStore(first_name, store)
    missing = set(range(1, size))
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in [other for other in missing if store.check([f"here-{other}"])]:
            name = store.get(f"here-{other}").decode()
            store.set(f"start-for-{name}", own_name)
            # The name may be that of a killed rank, which does not answer.
            if store.check([f"heard-{name}-{own_name}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise RunError(
                f"ranks {sorted(missing)} of {size} did not start within {TIMEOUT}; {advice}"
            )
        time.sleep(0.02)
    return PrefixStore(own_name, store)
