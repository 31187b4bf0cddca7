"""`python -m train.export`: collect trained stages in one directory for `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from train.stages.config import ExportConfig

PROG = "python -m train.export"


def main(args: Sequence[str]) -> None:
    """Parse the options and export."""
    cfg = parse(ExportConfig, args, prog=PROG)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.stages.export import export

    export(cfg)


if __name__ == "__main__":
    command(main)
