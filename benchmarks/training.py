"""`python -m benchmarks.training`: cost of training the SS-VAE, and its quality after minutes.

It has three sub-commands, because a machine with a GPU may lack mesh libraries. `geometry` packs
normalised meshes into one file, `bricks` makes a build of them on all cores, and `measure` times
training steps and trains on that build.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.training_config import BrickBuild, Geometry, Measure
from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand

PROG = "python -m benchmarks.training"
SUBCOMMANDS = {"geometry": Geometry, "bricks": BrickBuild, "measure": Measure}


def main(args: Sequence[str]) -> None:
    """Run the sub-command that the first word names."""
    name, cfg = parse_subcommand(SUBCOMMANDS, args, prog=PROG)
    # The options are parsed before torch and numba are imported, which takes seconds.
    if name == "measure":
        from benchmarks.training_measure import measure

        measure(cfg)
    else:
        from benchmarks import training_bricks

        make = {"geometry": training_bricks.pack_geometry, "bricks": training_bricks.make_bricks}
        make[name](cfg)


if __name__ == "__main__":
    command(main)
