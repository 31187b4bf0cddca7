"""`python -m train.evaluate vae | generation | retrieval | meshes`: how far surfaces are apart."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command
from pipeline.core.subcommands import parse_subcommand
from train.evaluation.config import (
    GenerationEvaluation,
    MeshEvaluation,
    RetrievalEvaluation,
    VAEEvaluation,
)

PROG = "python -m train.evaluate"
SUBCOMMANDS = {
    "vae": VAEEvaluation,
    "generation": GenerationEvaluation,
    "retrieval": RetrievalEvaluation,
    "meshes": MeshEvaluation,
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
    elif name == "retrieval":
        from train.evaluation.generation import evaluate_retrieval

        evaluate_retrieval(cfg)
    else:
        from train.evaluation.meshes import evaluate_meshes

        evaluate_meshes(cfg)


if __name__ == "__main__":
    command(main)
