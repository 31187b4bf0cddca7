"""`python -m benchmarks.ssa ssa | top-blocks`: times spatial sparse attention, or a part of it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ssa_config import SsaConfig, TopBlocksConfig
from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand

PROG = "python -m benchmarks.ssa"


def main(args: Sequence[str]) -> None:
    name, cfg = parse_subcommand({"ssa": SsaConfig, "top-blocks": TopBlocksConfig}, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    if name == "top-blocks":
        from benchmarks.top_blocks_timing import time_top_blocks

        time_top_blocks(cfg)
    else:
        from benchmarks.ssa_timing import time_ssa

        time_ssa(cfg)


if __name__ == "__main__":
    command(main)
