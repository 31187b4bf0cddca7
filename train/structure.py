"""`python -m train.structure`: train the structure stage, which generates the cells of an asset.

`torchrun --nproc-per-node N -m train.structure` trains on N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse_with_presets
from train.stages.structure.config import STRUCTURE_PRESETS

PROG = "python -m train.structure"
BASIC_OPTIONS = (
    *("preset", "part", "data", "out", "device", "resolution", "cameras", "held-out-views"),
    *("vae.batch-size", "vae.loop.steps", "vae.loop.max-minutes", "vae.loop.learning-rate"),
    *("flow.batch-size", "flow.loop.steps", "flow.loop.max-minutes", "flow.loop.learning-rate"),
)


def main(args: Sequence[str]) -> None:
    """Parse the options and train."""
    cfg = parse_with_presets(STRUCTURE_PRESETS, "tiny", args, prog=PROG, basic=BASIC_OPTIONS)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.distributed import join_world
    from train.stages.structure.run import train_structure

    with join_world(cfg.device) as world:
        train_structure(cfg, world)


if __name__ == "__main__":
    command(main)
