"""`python -m train.export`: collect trained stages in one directory for `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.cli import command, parse
from train.stages.config import CardOptions, ExportConfig

PROG = "python -m train.export"


def main(args: Sequence[str]) -> None:
    """Parse the options, export, and upload the export if that is asked for."""
    cfg = parse(ExportConfig, args, prog=PROG)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.stages.export import export

    export(cfg)
    if cfg.push is not None:
        from train.stages.hub import push_export

        push_export(cfg.out, cfg.push, licence=cfg.license, sources=cfg.card, private=cfg.private)
    elif cfg.card != CardOptions():
        from train.stages.model_card import model_card, write_card

        write_card(cfg.out, model_card(cfg.out, None, cfg.license, cfg.card))


if __name__ == "__main__":
    command(main)
