"""Make an export of the props recipe part of the package, with its model card.

    python -m examples.recipes.props.ship runs/props/export \\
        --evaluation runs/props/evaluation/evaluation.json

The stages are copied to `model/weights/props`, where `--checkpoint props` finds them. The card
names the data, licences, recipe, commit, numbers and limits. `attribution.csv` has a row for each
repository; the list of the recipe, `shapes.csv`, names every asset.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from examples.recipes.props.make_list import HERE, read_rows, write_rows
from model.inference.checkpoint_source import SHIPPED_WEIGHTS
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from train.data.attribution import ATTRIBUTION
from train.stages.config import CardOptions

log = logging.getLogger(__name__)

PROG = "python -m examples.recipes.props.ship"
NAME = "props"
MOST_BYTES = 20_000_000
FILES = ("config.json", "model.safetensors")  # of a stage
ATTRIBUTION_COLUMNS = ("uid", "author", "title", "licence", "url")
KINDS = ["dit", "structure", "vae"]  # of the stages, each once


@dataclass(frozen=True, kw_only=True)
class ShipConfig:
    """Copy an export into the package and write its model card."""

    export: Annotated[Path, tyro.conf.Positional]
    """Directory of the export."""

    evaluation: tuple[Path, ...]
    """Files evaluation.json of `python -m train.evaluate` for this export. The card shows the table
    beside each."""

    license: str = "apache-2.0"
    """Licence of the weights."""

    commit: str | None = None
    """Commit of the code that trained and evaluated the model, where the evaluations do not record
    it."""

    recipe: Path = HERE / "train.sh"
    """Script with the commands that trained the model."""

    limits: Path = HERE / "limits.md"
    """Text in Markdown about what the model cannot do."""

    out: Path = SHIPPED_WEIGHTS / NAME
    """Directory of the shipped weights. It is replaced."""


def attribution(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the author and the licence of each repository that training assets come from.

    Args:
        rows: Rows of the list, with the columns repository, licence, author and split.
    """
    trained = [
        (row["repository"], row["licence"], row["author"])
        for row in rows
        if row["split"] == "train"
    ]
    return [
        {
            "uid": make_uid("github", repository),
            "author": author,
            "title": f"{count} assets of {repository.partition('/')[2]}",
            "licence": licence,
            "url": f"https://github.com/{repository}",
        }
        for (repository, licence, author), count in sorted(Counter(trained).items())
    ]


def ship(cfg: ShipConfig) -> None:
    """Copy the stages of an export, and write their attribution and model card.

    Raises:
        UserError: If the export is not one of three stages and MOST_BYTES, or a file is missing.
    """
    from train.stages.model_card import model_card, write_card

    stages = sorted(path.parent for path in cfg.export.glob("*/config.json"))
    if [stage.name.partition("_")[0] for stage in stages] != KINDS:
        names = ", ".join(stage.name for stage in stages) or "none"
        raise UserError(f"{cfg.export} must have the stages {', '.join(KINDS)}, got {names}")
    files = {stage.name + "/" + name: stage / name for stage in stages for name in FILES}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing; export again")
    size = sum(path.stat().st_size for path in files.values())
    if size > MOST_BYTES:
        raise UserError(
            f"{cfg.export} must have at most {MOST_BYTES} bytes, got {size}; "
            "export with --precision bf16"
        )
    copy = cfg.out.with_name(f"{cfg.out.name}.partial")
    shutil.rmtree(copy, ignore_errors=True)
    for name, path in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / name)
    shapes = read_rows(HERE / "shapes.csv")
    write_rows(copy / ATTRIBUTION, attribution(shapes), ATTRIBUTION_COLUMNS)
    sources = CardOptions(
        evaluation=cfg.evaluation,
        assets=HERE / "shapes.csv",
        recipe=cfg.recipe,
        limits=cfg.limits,
        name=NAME,
        commit=cfg.commit,
    )
    write_card(copy, model_card(copy, None, cfg.license, sources))
    shutil.rmtree(cfg.out, ignore_errors=True)
    copy.rename(cfg.out)
    log.info("%s has %.1f MB in %d stages and a model card.", cfg.out, size / 1e6, len(stages))


def main(args: Sequence[str]) -> None:
    """Parse the options and copy the export."""
    ship(parse(ShipConfig, args, prog=PROG))


if __name__ == "__main__":
    command(main)
