"""`python -m benchmarks.remote_data`: training from a throttled object store and from the disk.

It makes a synthetic build, serves it from a process of its own with a latency and a bandwidth, and
loads batches and trains the SS-VAE and the SS-DiT from the disk and from the store, on the same
batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.remote_data_config import RemoteData
from pipeline.core.cli import command, parse

PROG = "python -m benchmarks.remote_data"


def main(args: Sequence[str]) -> int:
    """Parse the options and measure. Returns 1 if a stage loses more than is allowed."""
    cfg = parse(RemoteData, args, prog=PROG)
    from benchmarks.remote_data_measure import measure

    return measure(cfg)


if __name__ == "__main__":
    command(main)
