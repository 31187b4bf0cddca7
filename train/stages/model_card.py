"""The model card of an export. Each section has a source, and is left out without one."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from model.checkpoint import CONFIG, WEIGHTS, read_config
from model.inference.checkpoint_source import HUB
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically
from pipeline.core.provenance import commit_of_code
from train.data.attribution import ATTRIBUTION
from train.stages.config import CardOptions

CARD = "README.md"
TABLE = "table.md"  # beside evaluation.json
PROTOCOL = ("samples", "cells", "views", "seeds", "frame")  # entries of evaluation.json to state


def write_card(folder: Path, card: str) -> None:
    """Write a model card into the directory of its export."""
    write_atomically(folder / CARD, card.encode())


def model_card(
    folder: Path, repository: str | None, licence: str | None, sources: CardOptions | None = None
) -> str:
    """Return the model card of an export.

    Args:
        folder: The export.
        repository: "OWNER/NAME", where it will be. None describes the use of the directory.
        licence: Licence of the weights. None states none.
        sources: Evaluations, list of assets, recipe and limits. None takes nothing.

    Raises:
        UserError: If the directory holds no exported stage, or a file cannot be used.
    """
    sources = sources or CardOptions()
    stages = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not stages:
        raise UserError(f"{folder} holds no exported stage; export one first")
    metadata = ["---", "library_name: sparse3d", "pipeline_tag: image-to-3d"]
    metadata += [f"license: {licence}"] if licence else []
    metadata += ["tags:", "- image-to-3d", "- sparse-sdf", "- direct3d-s2", "---"]
    checkpoint = str(folder) if repository is None else f"{HUB}{repository}"
    checkpoint = sources.name or checkpoint
    title = folder.resolve().name if repository is None else repository.rpartition("/")[2]
    lines = [
        *metadata,
        "",
        f"# {sources.name or title}",
        "",
        "Weights that turn one picture of an object into a closed 3D mesh, trained with sparse3d, "
        "an open implementation of Direct3D-S2 (arXiv 2505.17412).",
        "",
        "## Use",
        "",
        "```",
        f"python -m model.generate chair.png --checkpoint {checkpoint} -o chair.glb",
        f"python -m model.app --checkpoint {checkpoint}",
        "```",
        "",
        "## Stages",
        "",
        "| stage | model | parameters | recommended sampling |",
        "|---|---|---:|---|",
        *(_stage_row(stage) for stage in stages),
        "",
        *_data_section(folder, licence, sources),
        *_recipe_section(sources.recipe),
        *(
            line
            for path in sources.evaluation
            for line in _evaluation_section(path, sources.commit)
        ),
        *_limits_section(sources.limits),
    ]
    return "\n".join(lines)


def _data_section(folder: Path, licence: str | None, sources: CardOptions) -> list[str]:
    """Return the section about training data and licence."""
    assets = sources.assets
    lines = [
        "## Training data and licence",
        "",
        f"[{ATTRIBUTION}]({ATTRIBUTION}) names the authors and the licence of every asset that was "
        "trained on."
        if (folder / ATTRIBUTION).exists()
        else "The export does not list the assets that it was trained on.",
        "",
    ]
    if assets is not None:
        rows = _rows(assets)
        splits = sorted({row["split"] for row in rows})
        counts = Counter((row["licence"], row["split"]) for row in rows)
        lines += [
            f"Number of assets of the list `{assets.name}` by licence and split:",
            "",
            f"| licence | {' | '.join(splits)} |",
            f"|---|{'---:|' * len(splits)}",
            *(
                f"| {name} | {' | '.join(str(counts[name, split]) for split in splits)} |"
                for name in sorted({row["licence"] for row in rows})
            ),
            "",
        ]
    return [
        *lines,
        f"The weights are licensed under {licence}."
        if licence
        else "No licence of the weights was stated.",
        "",
        f"Exported with the code of commit {sources.commit or commit_of_code() or 'unknown'}.",
        "",
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    """Read a list of assets.

    Raises:
        UserError: If it is not readable, has no rows, or lacks a column.
    """
    with_columns = csv.DictReader(_text(path).splitlines())
    missing = {"licence", "split"}.difference(with_columns.fieldnames or ())
    if missing:
        raise UserError(
            f"{path} must be a CSV file with the columns licence and split; it lacks "
            f"{', '.join(sorted(missing))}"
        )
    rows = list(with_columns)
    if not rows:
        raise UserError(f"{path} lists no asset; name the list that was trained on")
    return rows


def _recipe_section(path: Path | None) -> list[str]:
    """Return the section with the commands of the training."""
    if path is None:
        return []
    return ["## Recipe", "", f"`{path.name}`:", "", "```sh", _text(path).strip(), "```", ""]


def _evaluation_section(path: Path, commit: str | None) -> list[str]:
    """Return the section with the numbers of an evaluation.json and of the table beside it.

    Args:
        path: The evaluation.json.
        commit: Commit of the code if the file does not record it.

    Raises:
        UserError: If either file is missing or evaluation.json is no result of an evaluation.
    """
    try:
        content = json.loads(_text(path))
        protocol: dict[str, Any] = content["protocol"]
        commit = content["commit"] or commit or "unknown"
        stated = [f"{name} {_words(protocol[name])}" for name in PROTOCOL if name in protocol]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be the evaluation.json of python -m train.evaluate, but it is not "
            f"({type(error).__name__}: {error})"
        ) from error
    table = _text(path.parent / TABLE).strip()
    name = path.resolve().parent.name
    return [
        f"## Evaluation: {name}",
        "",
        table,
        "",
        f"Measured by `python -m train.evaluate` with the code of commit {commit}: "
        f"{', '.join(stated)}.",
        "",
    ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _limits_section(path: Path | None) -> list[str]:
    """Return the section about what the model cannot do."""
    return [] if path is None else ["## Limits", "", _text(path).strip(), ""]


def _text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read for the model card ({error})") from error


def _stage_row(stage: Path) -> str:
    """Return the row of an exported stage in the table of the model card."""
    from safetensors import safe_open

    described = read_config(stage)
    with safe_open(stage / WEIGHTS, "pt") as file:
        count = sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    recommended: dict[str, Any] = described.get("recommended") or {}
    sampling = ", ".join(f"{name} {value:g}" for name, value in recommended.items())
    return f"| {stage.name} | {described['model']} | {count / 1e6:.2f} M | {sampling or '-'} |"


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
