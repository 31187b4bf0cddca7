"""Who else is training: ranks under torchrun, the device of each, and the few things they say to each other."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.devices import Device, choose_device
from pipeline.core.errors import RunError

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
TIMEOUT = timedelta(
    minutes=30
)  # ranks wait for the one that writes checkpoints and reconstructions


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, on each of them; float64 so that counts stay exact. Any shape."""
        numbers = numbers.double()
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over ranks where there are several."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def join_world(device: Device) -> Iterator[World]:
    """The world that torchrun describes in the environment (RANK, LOCAL_RANK, WORLD_SIZE), or this process alone.

    auto: a GPU where there is one. NCCL on GPUs, gloo on CPUs. UserError if cuda is asked for and is not there, or this
    machine has more ranks than GPUs.
    """
    size, rank, local = (int(os.environ.get(name, value)) for name, value in _TORCHRUN)
    where = choose_device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size == 1:
        yield World(device=where)
        return
    backend = "nccl" if where.type == "cuda" else "gloo"
    store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    dist.init_process_group(
        backend,
        store=fresh_store(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=where if where.type == "cuda" else None,
    )
    try:
        yield World(rank=rank, size=size, device=where)
    finally:
        dist.destroy_process_group()


def fresh_store(store: Store, rank: int, size: int) -> Store:
    """A part of torchrun's store that is empty.

    The store outlives a restart, so it may still hold addresses of ranks that were killed, whom others would call. The
    first rank names the part after itself and tells the others, each by a name that no process had before.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"here-{rank}", me)
        start = store.get(f"start-for-{me}").decode()
        store.set(f"heard-{me}-{start}", "")
        return PrefixStore(start, store)
    missing, deadline = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in [other for other in missing if store.check([f"here-{other}"])]:
            name = store.get(f"here-{other}").decode()
            store.set(f"start-for-{name}", me)
            if store.check([f"heard-{name}-{me}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise RunError(f"ranks {sorted(missing)} of {size} did not come within {TIMEOUT}")
        time.sleep(0.02)
    return PrefixStore(me, store)


_TORCHRUN: Sequence[tuple[str, int]] = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
