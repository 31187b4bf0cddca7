"""`python -m train.plot RUN ...`: curves of training runs as an image and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from train.engine.config import PlotConfig

PROG = "python -m train.plot"


def main(args: Sequence[str]) -> None:
    """Parse the options and plot."""
    cfg = parse(PlotConfig, args, prog=PROG)
    from train.engine.plots import plot_runs

    plot_runs(cfg)


if __name__ == "__main__":
    command(main)
