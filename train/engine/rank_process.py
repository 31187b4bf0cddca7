"""A rank as a process: its numbers and environment, the store of all ranks, and how it ended."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

GRACE_S = 30.0  # that other ranks have to end after one has failed


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """The numbers of a rank.

    Args:
        rank: Number among all ranks.
        size: Number of all ranks.
        local_rank: Number among the ranks of its machine.
        local_size: Number of the ranks of its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def environment(self, host: str, port: int) -> dict[str, str]:
        """Return the variables that torchrun would set for the rank.

        Args:
            host: Address of the machine that serves the ranks' store.
            port: Port of the store.
        """
        threads = max(1, (os.cpu_count() or 1) // self.local_size)
        return {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.size),
            "RANK": str(self.rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "LOCAL_RANK": str(self.local_rank),
            "TORCHELASTIC_RUN_ID": f"{host}-{port}",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }


def serve_store(host: str) -> TCPStore:
    """Serve the store in which ranks find each other, on a free port.

    The store outlives every rank, as that of torchrun does.

    Args:
        host: Address of this machine by which the ranks reach it.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def describe_end(returncode: int) -> str:
    """Return how a process ended, such as "ended with exit code 1" or "was killed by SIGKILL"."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
