"""Make the pictures of held-out props that the demo shows, and what a model generates from them.

The ten assets follow from the list alone, by a rule that knows no result: of each pack the held-out
shape with the smallest SHA-256 of its file, and of these the ten with the smallest ones. Each
picture is the last view of its asset, which training never reads for any asset.

    python -m examples.recipes.props.held_out
    python -m pipeline.build --source github:examples/recipes/props/held_out.csv \\
        --ids examples/recipes/props/held_out.csv \\
        --split-column split --resolutions 256 --views 24 --image-size 256 --out BUILD
    python -m examples.recipes.props.held_out --build BUILD --checkpoint props

Without --build the command writes the list of the ten assets. With --build it writes the pictures,
and with --checkpoint also the stored results and the picture of the README.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from examples.recipes.props.make_list import HERE, read_rows, write_rows
from pipeline.core.cli import command, parse
from pipeline.core.devices import Device
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically
from pipeline.core.hashing import make_uid
from pipeline.storage.config import PathOrUrl
from train.demo.config import HELD_OUT_FOLDER

if TYPE_CHECKING:
    from train.demo.held_out import HeldOutPicture

log = logging.getLogger(__name__)

PROG = "python -m examples.recipes.props.held_out"
SHAPES, LIST = HERE / "shapes.csv", HERE / "held_out.csv"
COUNT = 10
COLUMNS_OF_SHEET = 5
UNSHOWN = ("uid", "nearest", "nearest_is_right")  # they name assets of this small build


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Make the held-out pictures of the demo, and what a model generates from them."""

    build: Path | None = None
    """Build of the assets of held_out.csv, with 24 views of 256 pixels. None writes held_out.csv
    and nothing else."""

    checkpoint: Path | None = None
    """Export that the meshes are generated with, such as props for the shipped weights. None writes
    the pictures alone."""

    training_data: PathOrUrl | None = None
    """Build that the model was trained on. With it the results name the training asset nearest to
    each mesh."""

    device: Device = "auto"
    """Device of the models."""

    out: Path = Path("runs/props/held-out")
    """Directory of the evaluation with the meshes, which are not part of the package."""

    folder: Path = HELD_OUT_FOLDER
    """Directory of the pictures and the stored results."""

    sheet: Path = Path("docs/images/held_out.webp")
    """Picture of the README."""


def choose(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the held-out assets that are shown, in the order of their hashes.

    Args:
        rows: Rows of the list, with the columns file, sha256 and split.
    """
    held_out = sorted((r for r in rows if r["split"] == "val"), key=lambda row: row["sha256"])
    of_packs: dict[str, dict[str, str]] = {}
    for row in held_out:
        of_packs.setdefault(row["file"].partition("/")[0], dict(row))
    return list(of_packs.values())[:COUNT]


def write_pictures(build: Path, folder: Path) -> list[HeldOutPicture]:
    """Write the last view of each asset of the list, and pictures.json with its camera.

    Raises:
        UserError: If the build cannot be used or lacks an asset of the list.
    """
    from pipeline.core.image_codec import encode
    from train.data.bricks import built_resolutions, read_asset_names, read_build_index
    from train.data.render_conditions import ViewReader
    from train.demo.held_out import PICTURES, HeldOutPicture

    index = read_build_index(build, built_resolutions(build))
    names, views = read_asset_names(build), ViewReader(index, "paper")
    rows = read_rows(LIST)
    # A build of the list names assets by their URLs, and a build of a folder by their paths.
    files = {make_uid("folder", row["file"]): row["file"] for row in rows}
    numbers = {files.get(uid, names[uid]): number for number, uid in enumerate(index.uids)}
    missing = [row["file"] for row in rows if row["file"] not in numbers]
    if missing:
        raise UserError(f"{build} lacks {missing[0]}; build all assets of {LIST}")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for place, row in enumerate(rows, 1):
        number = numbers[row["file"]]
        view = views.read_view(number, views.views(number) - 1)
        picture = HeldOutPicture(
            name=f"{place:02d}-{Path(row['file']).name.partition('.')[0].lower()}",
            file=row["file"],
            repository=row["repository"],
            licence=row["licence"],
            camera={key: value for key, value in view.meta.items() if key != "c2w"},
        )
        write_atomically(folder / picture.image, encode(view, "webp"))
        pictures.append(picture)
    text = json.dumps([asdict(picture) for picture in pictures], indent=1)
    write_atomically(folder / PICTURES, text + "\n")
    return pictures


def write_results(cfg: HeldOutConfig, build: Path, pictures: Sequence[HeldOutPicture]) -> None:
    """Evaluate a model on the assets of the list, and store pictures and numbers of its meshes.

    Raises:
        UserError: If the model or a build cannot be used.
        RunError: If nothing can be rendered.
    """
    from model.inference.checkpoint_source import find_checkpoint
    from train.demo.held_out import RESULTS, save_meshes, weights_hash
    from train.engine.mesh_pictures import LABEL_HEIGHT
    from train.evaluation.clay import PICTURE_SIDE
    from train.evaluation.config import GenerationEvaluation
    from train.evaluation.generation import evaluate_generation

    assert cfg.checkpoint is not None
    evaluation = evaluate_generation(
        GenerationEvaluation(
            checkpoint=cfg.checkpoint,
            data=build,
            split="all",
            out=cfg.out,
            device=cfg.device,
            retrieval=cfg.training_data is not None,
            training_data=cfg.training_data,
            held_out_views=4,
        )
    )
    written = json.loads((cfg.out / "evaluation.json").read_text(encoding="utf-8"))
    by_uid = {row["uid"]: row for row in written["rows"]}
    rows: dict[str, Any] = {}
    for picture in pictures:
        row = by_uid[picture.camera["uid"]]
        if row["view"] != picture.camera["view"]:
            raise UserError(f"{picture.file} was generated from view {row['view']}; build it again")
        with Image.open(cfg.out / "meshes" / f"{row['uid']}.png") as image:
            strip = np.asarray(image.convert("RGB"))[LABEL_HEIGHT:, PICTURE_SIDE:]
        parts = [strip[:, n * PICTURE_SIDE : (n + 1) * PICTURE_SIDE] for n in range(3)]
        save_meshes(cfg.folder / picture.meshes, parts)
        rows[picture.name] = {k: v for k, v in row.items() if k not in UNSHOWN}
    content = {
        "weights": weights_hash(find_checkpoint(cfg.checkpoint)),
        "commit": evaluation["commit"],
        "protocol": evaluation["protocol"],
        "rows": rows,
    }
    write_atomically(cfg.folder / RESULTS, json.dumps(content, indent=1) + "\n")
    log.info("%s has the numbers of %d meshes.", cfg.folder / RESULTS, len(rows))


def write_sheet(path: Path, folder: Path) -> None:
    """Write one image of all pictures, each above the mesh that was generated from it."""
    from pipeline.core.image_codec import decode
    from train.demo.held_out import read_pictures
    from train.engine.mesh_pictures import side_by_side
    from train.evaluation.clay import PICTURE_SIDE, shown

    columns = []
    for picture in read_pictures(folder):
        with Image.open(folder / picture.meshes) as image:
            mesh = np.asarray(image.convert("RGB"))[:, :PICTURE_SIDE]
        columns.append((shown(decode((folder / picture.image).read_bytes())), mesh))
    bands = []
    for first in range(0, len(columns), COLUMNS_OF_SHEET):
        some = columns[first : first + COLUMNS_OF_SHEET]
        for kind, label in enumerate(("picture of a held-out object", "generated mesh")):
            labels = (label, *[""] * (len(some) - 1))
            bands.append(side_by_side([[column[kind] for column in some]], labels))
    width = max(band.shape[1] for band in bands)
    padded = [
        np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=255)
        for band in bands
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(padded)).save(path, quality=82, method=6)
    log.info("%s has %d bytes.", path, path.stat().st_size)


def main(args: Sequence[str]) -> None:
    """Write the list, the pictures, or the pictures with results and sheet."""
    cfg = parse(HeldOutConfig, args, prog=PROG)
    if cfg.build is None:
        if cfg.checkpoint is not None:
            raise UserError("--checkpoint needs --build, which has the assets to generate from")
        write_rows(LIST, choose(read_rows(SHAPES)))
        log.info("%s lists %d held-out assets.", LIST, COUNT)
        return
    pictures = write_pictures(cfg.build, cfg.folder)
    if cfg.checkpoint is not None:
        write_results(cfg, cfg.build, pictures)
        write_sheet(cfg.sheet, cfg.folder)


if __name__ == "__main__":
    command(main)
