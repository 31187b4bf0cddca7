"""`python -m train.dit`: train the SS-DiT on the renders and latents of a build.

`torchrun --nproc-per-node N -m train.dit` trains on N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse_with_presets
from train.stages.dit.config import DIT_PRESETS

PROG = "python -m train.dit"
BASIC_OPTIONS = (
    *("preset", "data", "latents", "vae", "out", "init", "device", "resolution", "max-tokens"),
    *("cameras", "held-out-views", "flow.batch-size", "flow.guidance", "flow.steps"),
    *("flow.loop.steps", "flow.loop.max-minutes", "flow.loop.learning-rate", "flow.loop.seed"),
)


def main(args: Sequence[str]) -> None:
    """Parse the options and train."""
    cfg = parse_with_presets(DIT_PRESETS, "tiny", args, prog=PROG, basic=BASIC_OPTIONS)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.distributed import join_world
    from train.stages.dit.run import train_dit

    with join_world(cfg.device) as world:
        train_dit(cfg, world)


if __name__ == "__main__":
    command(main)
