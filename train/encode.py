"""`python -m train.encode`: encode the bricks of a build with a trained SS-VAE.

It encodes with one process for each GPU of the machine, see `--gpus`. torchrun works too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from train.stages.vae.config import EncodeConfig

PROG = "python -m train.encode"


def main(args: Sequence[str]) -> int:
    """Parse the options and encode. Returns the exit code."""
    cfg = parse(EncodeConfig, args, prog=PROG)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.ranks import started_ranks

    code = started_ranks("train.encode", args, cfg)
    if code is not None:
        return code
    from train.engine.distributed import join_world
    from train.stages.vae.encode import encode

    with join_world(cfg.device) as world:
        encode(cfg, world)
    return 0


if __name__ == "__main__":
    command(main)
