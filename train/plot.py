"""`python -m train.plot RUN ...`: curves of training runs as an image and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.engine.config import PlotConfig

PROG = "python -m train.plot"


def main(args: Sequence[str]) -> None:
    """Parse the options and plot."""
    cfg = parse(PlotConfig, args, prog=PROG)
    try:
        from train.engine.plots import plot_runs
    except ImportError as error:
        raise UserError(
            f"drawing needs the package {error.name}; pip install 'sparse3d[plot]'"
        ) from error
    plot_runs(cfg)


if __name__ == "__main__":
    command(main)
