"""`python -m train.structure`: train the structure stage, which generates the cells of an asset.

`torchrun --nproc-per-node N -m train.structure` trains on N GPUs.
"""

from functools import partial

from pipeline.core.cli import command
from train.stages.command import train_stage

main = partial(train_stage, "structure")

if __name__ == "__main__":
    command(main)
