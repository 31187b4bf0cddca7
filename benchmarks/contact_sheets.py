"""`python -m benchmarks.contact_sheets BUILD`: pictures of what a ranked build keeps.

The command draws the best, the worst and random kept assets as one WebP image each, and counts
assets by a column of the list that the build was made from. Only assets whose licence is among
--licences are drawn.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from PIL import Image, ImageDraw

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.product import Product, is_product_name
from pipeline.curation.rank import LISTED
from pipeline.inspection.asset_list import attribution_row, finished_assets
from pipeline.inspection.report_pictures import over_page_color
from pipeline.orchestration.plan import read_plan
from pipeline.storage.layout import CATALOGUE, list_commits, product_paths
from pipeline.storage.render_shard import RenderShard

log = logging.getLogger(__name__)

CAPTION_PIXELS = 12
CAPTION_CHARACTERS = 17


@dataclass(frozen=True, kw_only=True)
class ContactSheetsConfig:
    """Draw contact sheets of a ranked build."""

    build: Annotated[Path, tyro.conf.Positional]
    """Directory of the build."""

    output: Path = Path("docs/images")
    """Directory of the sheets."""

    licences: tuple[str, ...] = ("cc0", "by")
    """Licences of the assets that may be drawn."""

    count: int = 30
    """Number of assets on a sheet."""

    columns: int = 10
    """Number of assets side by side."""

    side: int = 96
    """Side of a picture in pixels."""

    count_by: str = "repo"
    """Column of the list by which assets are counted."""


def draw_sheets(cfg: ContactSheetsConfig) -> list[Path]:
    """Draw the sheets and return their paths.

    Raises:
        UserError: If the build has no renders, or no asset with one of the licences.
    """
    plan = read_plan(cfg.build)
    names = set().union(*list_commits(cfg.build).values())
    products = [Product.parse(name) for name in sorted(names) if is_product_name(name)]
    renders = next((product for product in products if product.kind == "renders"), None)
    if renders is None:
        raise UserError(f"{cfg.build} has no renders; build them first")
    assets = [
        (about["title"], row)
        for record, row in finished_assets(plan)
        if (about := attribution_row(record))["licence"] in cfg.licences
    ]
    if not assets:
        raise UserError(f"{cfg.build} has no asset with a licence among {' '.join(cfg.licences)}")
    chosen = np.random.default_rng(0).permutation(len(assets))[: cfg.count]
    sheets = {
        "best": assets[: cfg.count],
        "worst": assets[-cfg.count :],
        "random": [assets[number] for number in sorted(chosen.tolist())],
    }
    cfg.output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in sheets.items():
        pictures = []
        for title, row in rows:
            shard = RenderShard(cfg.build / product_paths(renders, row.shard)[0])
            pictures.append((title, over_page_color(shard.read(row.uid, 0).rgba)))
        paths.append(cfg.output / f"kept_{name}.webp")
        _sheet(pictures, cfg).save(paths[-1], quality=80, method=6)
    return paths


def _sheet(pictures: Sequence[tuple[str, np.ndarray]], cfg: ContactSheetsConfig) -> Image.Image:
    """Return pictures with captions on a grid."""
    rows = -(-len(pictures) // cfg.columns)
    height = cfg.side + CAPTION_PIXELS
    sheet = Image.new("RGB", (cfg.columns * cfg.side, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pixels) in enumerate(pictures):
        x, y = number % cfg.columns * cfg.side, number // cfg.columns * height
        picture = Image.fromarray(pixels).resize((cfg.side, cfg.side), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        draw.text((x + 2, y + cfg.side), title[:CAPTION_CHARACTERS], fill="black")
    return sheet


def count_assets(build: Path, column: str) -> list[dict[str, Any]]:
    """Count the screened assets of a build by a column of its list.

    Returns:
        One row per value: the numbers of assets, of rejected ones, of duplicates, of unique ones
        that pass the thresholds, and of kept ones.
    """
    rows = pq.read_table(build / CATALOGUE).to_pylist()
    groups: dict[str, Counter[str]] = {}
    for row in rows:
        counts = groups.setdefault(str(row.get(LISTED + column) or "none"), Counter())
        counts["assets"] += 1
        is_duplicate = row["stage"] == "duplicates"
        passes = row["keep"] or row["reason"] in ("below_target", "over_share")
        counts["duplicates"] += is_duplicate
        counts["rejected"] += not (passes or is_duplicate)
        counts["kept"] += row["keep"]
    names = ("assets", "rejected", "duplicates", "kept")
    return [
        {column: value, **{name: groups[value][name] for name in names}} for value in sorted(groups)
    ]


def main(args: Sequence[str]) -> None:
    """Parse the options, draw the sheets and print the counts."""
    cfg = parse(ContactSheetsConfig, args, prog="python -m benchmarks.contact_sheets")
    for path in draw_sheets(cfg):
        log.info("%s has %d bytes.", path, path.stat().st_size)
    for row in count_assets(cfg.build, cfg.count_by):
        log.info("%s", json.dumps(row))


if __name__ == "__main__":
    command(main)
