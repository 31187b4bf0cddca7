"""`python -m train.evaluate vae | generation | retrieval`: distances of surfaces to stored ones."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand
from train.evaluation.config import GenerationEvaluation, RetrievalEvaluation, VAEEvaluation

PROG = "python -m train.evaluate"
SUBCOMMANDS = {
    "vae": VAEEvaluation,
    "generation": GenerationEvaluation,
    "retrieval": RetrievalEvaluation,
}


def main(args: Sequence[str]) -> None:
    name, cfg = parse_subcommand(SUBCOMMANDS, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    if name == "vae":
        from train.evaluation.vae import evaluate_vae

        evaluate_vae(cfg)
    elif name == "generation":
        from train.evaluation.generation import evaluate_generation

        evaluate_generation(cfg)
    else:
        from train.evaluation.generation import evaluate_retrieval

        evaluate_retrieval(cfg)


if __name__ == "__main__":
    command(main)
