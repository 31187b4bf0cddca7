"""`python -m train.vae`: train the SS-VAE on the SDF bricks of a build.

`torchrun --nproc-per-node N -m train.vae` trains on N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse_with_presets
from train.stages.vae.config import VAE_PRESETS

PROG = "python -m train.vae"
BASIC_OPTIONS = (
    *("preset", "data", "out", "init", "device"),
    *("bricks.resolutions", "bricks.batch-size", "bricks.max-tokens"),
    *("loop.steps", "loop.max-minutes", "loop.optimizer", "loop.learning-rate", "loop.seed"),
)


def main(args: Sequence[str]) -> None:
    """Parse the options and train."""
    cfg = parse_with_presets(VAE_PRESETS, "tiny", args, prog=PROG, basic=BASIC_OPTIONS)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.distributed import join_world
    from train.stages.vae.run import train_vae

    with join_world(cfg.device) as world:
        train_vae(cfg, world)


if __name__ == "__main__":
    command(main)
