"""`python -m benchmarks.ssa ssa | launches | top-blocks`: times SSA, its launches, or a part."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ssa_config import LaunchesConfig, SsaConfig, TopBlocksConfig
from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand

PROG = "python -m benchmarks.ssa"


def main(args: Sequence[str]) -> None:
    configs = {"ssa": SsaConfig, "launches": LaunchesConfig, "top-blocks": TopBlocksConfig}
    name, cfg = parse_subcommand(configs, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    if name == "top-blocks":
        from benchmarks.top_blocks_timing import time_top_blocks

        time_top_blocks(cfg)
    elif name == "launches":
        from benchmarks.launches_timing import time_launches

        time_launches(cfg)
    else:
        from benchmarks.ssa_timing import time_ssa

        time_ssa(cfg)


if __name__ == "__main__":
    command(main)
