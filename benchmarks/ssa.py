"""`python -m benchmarks.ssa ssa`: times spatial sparse attention."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ssa_config import SsaConfig
from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand

PROG = "python -m benchmarks.ssa"


def main(args: Sequence[str]) -> None:
    _, cfg = parse_subcommand({"ssa": SsaConfig}, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    from benchmarks.ssa_timing import time_ssa

    time_ssa(cfg)


if __name__ == "__main__":
    command(main)
