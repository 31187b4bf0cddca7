"""`python -m train.evaluate vae | generation`: how far reconstructed or generated surfaces are from the stored ones."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.evaluation.generation import GenerationEvaluation, evaluate_generation
from train.evaluation.vae import VAEEvaluation, evaluate_vae

PROG = "python -m train.evaluate"


def main(args: Sequence[str]) -> None:
    what, rest = (args[0], args[1:]) if args else ("nothing", args)
    if what == "vae":
        evaluate_vae(parse(VAEEvaluation, rest, prog=f"{PROG} vae"))
    elif what == "generation":
        evaluate_generation(parse(GenerationEvaluation, rest, prog=f"{PROG} generation"))
    else:
        raise UserError(
            f"say what to evaluate: {PROG} vae [options] or {PROG} generation [options]; got {what}"
        )


if __name__ == "__main__":
    command(main)
