"""`python -m benchmarks.conv`: times the sparse convolutions of the SS-VAE."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.conv_config import ConvConfig
from pipeline.core.cli import command, parse


def main(args: Sequence[str]) -> None:
    cfg = parse(ConvConfig, args, prog="python -m benchmarks.conv")
    # The options are parsed before torch is imported, which takes seconds.
    from benchmarks.conv_timing import time_convolutions

    time_convolutions(cfg)


if __name__ == "__main__":
    command(main)
