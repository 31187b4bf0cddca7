"""`python -m train.structure`: train the structure stage, which generates the cells of an asset.

It trains with one process for each GPU of the machine, see `--gpus`. torchrun works too.
"""

from functools import partial

from pipeline.core.cli import command
from train.stages.command import train_stage

main = partial(train_stage, "structure")

if __name__ == "__main__":
    command(main)
