"""`python -m train.vae`: train the SS-VAE on the SDF bricks of a build.

It trains with one process for each GPU of the machine, see `--gpus`. torchrun works too.
"""

from functools import partial

from pipeline.core.cli import command
from train.stages.command import train_stage

main = partial(train_stage, "vae")

if __name__ == "__main__":
    command(main)
