"""`python -m train.evaluate vae`: how far a trained model's surfaces are from the stored ones."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.schema import UserError
from train.command import command, parse
from train.vae_evaluation import VAEEvaluation, evaluate_vae

PROG = "python -m train.evaluate"


def main(args: Sequence[str]) -> None:
    if not args or args[0] != "vae":
        raise UserError(f"say what to evaluate: {PROG} vae [options]; got {args[0] if args else 'nothing'}")
    evaluate_vae(parse(VAEEvaluation, args[1:], prog=f"{PROG} vae"))


if __name__ == "__main__":
    command(main)
