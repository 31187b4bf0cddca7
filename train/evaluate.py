"""`python -m train.evaluate vae | generation`: distances of surfaces to the stored ones."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand
from train.evaluation.config import GenerationEvaluation, VAEEvaluation

PROG = "python -m train.evaluate"
SUBCOMMANDS = {"vae": VAEEvaluation, "generation": GenerationEvaluation}


def main(args: Sequence[str]) -> None:
    name, cfg = parse_subcommand(SUBCOMMANDS, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    if name == "vae":
        from train.evaluation.vae import evaluate_vae

        evaluate_vae(cfg)
    else:
        from train.evaluation.generation import evaluate_generation

        evaluate_generation(cfg)


if __name__ == "__main__":
    command(main)
