"""`python -m train.structure`: train the structure stage, which generates the cells of an asset.

`torchrun --nproc-per-node N -m train.structure` trains on N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse_with_presets
from train.stages.structure.config import STRUCTURE_PRESETS

PROG = "python -m train.structure"


def main(args: Sequence[str]) -> None:
    """Parse the options and train."""
    cfg = parse_with_presets(STRUCTURE_PRESETS, "tiny", args, prog=PROG)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.distributed import join_world
    from train.stages.structure.run import train_structure

    with join_world(cfg.device) as world:
        train_structure(cfg, world)


if __name__ == "__main__":
    command(main)
