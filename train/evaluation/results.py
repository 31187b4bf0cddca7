"""What both evaluations share: the numbers of a surface, tables, and the files of the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.files import write_atomically
from pipeline.core.primitives.surface_distance import THRESHOLDS
from train.engine.checkpoint import provenance
from train.engine.mesh_pictures import save_image, side_by_side
from train.evaluation.config import AssetSelection
from train.evaluation.page import write_page

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SurfaceResult:
    """How far one surface is from the stored surface of its asset.

    Args:
        uid: The asset.
        split: "train" or "val".
        iou: Intersection over union of the insides.
        chamfer: Mean of both directions' mean point-to-surface distances, in the frame [-1, 1]^3.
            Infinite if the surface is empty.
        normal_consistency: Mean absolute cosine between the normals of nearest points.
        f1: F1 score by distance threshold, in the frame [-1, 1]^3.
    """

    uid: str
    split: str
    iou: float
    chamfer: float
    normal_consistency: float
    f1: dict[float, float]


@dataclass(frozen=True, kw_only=True)
class PictureSheet:
    """Pictures of several assets, one row for each.

    Args:
        file: Name of the PNG file.
        labels: Title of each column.
        rows: RGB images, uint8 [H, W, 3], all of one size.
    """

    file: str
    labels: tuple[str, ...]
    rows: Sequence[Sequence[NDArray[np.uint8]]]


def surface_protocol(cfg: AssetSelection) -> dict[str, Any]:
    """Return how the numbers of a SurfaceResult are measured."""
    return {
        "frame": "[-1, 1]^3",
        "distance": "from points of each surface to the other surface, not squared",
        "CD": "Chamfer distance: the mean of both directions",
        "F1(d)": "F1 score of the points closer than d to the other surface",
        "normals": "mean absolute cosine between the normals of nearest points",
        "samples": cfg.samples,
        "reference": "marching cubes of the finest stored SDF",
    }


def summarize_surfaces(results: Sequence[SurfaceResult], name: str) -> dict[str, Any]:
    """Return the means over assets in the units of the tables.

    Args:
        results: The assets, at least one.
        name: Name of the group of assets.

    Returns:
        Distances x 1000 and shares in percent. An empty surface counts as 0 in the shares, but has
        no distance. "empty" is the number of these. "chamfer" is None if all are empty.
    """
    distances = [result.chamfer for result in results if np.isfinite(result.chamfer)]
    f1 = {f"f1_{t}": mean_percent([result.f1[t] for result in results]) for t in THRESHOLDS}
    return {
        "name": name,
        "assets": len(results),
        "empty": len(results) - len(distances),
        "iou": mean_percent([result.iou for result in results]),
        "chamfer": 1000 * float(np.mean(distances)) if distances else None,
        **f1,
        "normal_consistency": mean_percent([result.normal_consistency for result in results]),
    }


def mean_percent(shares: Sequence[float]) -> float:
    """Return the mean of shares in [0, 1], in percent."""
    return 100 * float(np.mean(shares))


def markdown_table(
    summaries: Sequence[Mapping[str, Any]], heads: Mapping[str, str], digits: Mapping[str, int]
) -> str:
    """Format summaries as a Markdown table, one row for each.

    Args:
        summaries: Values by name. "name" labels the row. A value that is None or missing leaves its
            cell empty.
        heads: Heading of each column, by the name of its value.
        digits: Digits after the decimal point of a column's floats, by the same name.
    """
    lines = ["| | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
    for summary in summaries:
        cells = []
        for name in heads:
            value = summary.get(name)
            text = f"{value:.{digits[name]}f}" if isinstance(value, float) else str(value)
            cells.append("" if value is None else text)
        lines.append(f"| {summary['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(
    out: Path, protocol: Mapping[str, Any], results: Sequence[Any], table: str
) -> dict[str, Any]:
    """Write evaluation.json and table.md of an evaluation without pictures.

    Args:
        out: Directory of the results.
        protocol: How the numbers were measured, by name.
        results: One dataclass for each row.
        table: Summary in Markdown.

    Returns:
        The content of evaluation.json.
    """
    content = {"protocol": protocol, **provenance(), "rows": [asdict(row) for row in results]}
    write_atomically(out / "evaluation.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "table.md", table + "\n")
    for line in table.splitlines():
        log.info("%s", line)
    log.info("The results are in %s: evaluation.json, table.md.", out)
    return content


def write_results(
    out: Path,
    cfg: AssetSelection,
    *,
    checkpoint: Path | None,
    title: str,
    protocol: Mapping[str, Any],
    results: Sequence[SurfaceResult],
    table: str,
    sheet: PictureSheet,
    details: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write evaluation.json, table.md, index.html and the pictures of an evaluation.

    Args:
        out: Directory of the results.
        cfg: Options of the evaluation.
        checkpoint: Directory of the model, if one was evaluated.
        title: Heading of the page.
        protocol: How the numbers were measured, by name.
        results: One per asset, or per asset and resolution.
        table: Summary in Markdown.
        sheet: Pictures. No file is written if it has no rows.
        details: Further table in Markdown for the page, one row for each asset.
        **more: Further entries of evaluation.json.

    Returns:
        The content of evaluation.json. Infinite numbers are null in the file.
    """
    content = {
        **({} if checkpoint is None else {"checkpoint": str(checkpoint.resolve())}),
        "data": str(cfg.data),
        "protocol": protocol,
        **provenance(),
        **more,
        "rows": [
            {**asdict(result), "f1": {str(t): value for t, value in result.f1.items()}}
            for result in results
        ],
    }
    text = json.dumps(content, indent=1, default=asdict).replace("Infinity", "null")
    write_atomically(out / "evaluation.json", text + "\n")
    write_atomically(out / "table.md", table + "\n")
    pictures = {}
    if sheet.rows:
        save_image(out / sheet.file, side_by_side(sheet.rows, sheet.labels))
        pictures[sheet.file] = f"Columns: {', '.join(sheet.labels)}."
    write_page(out, title, protocol, table, pictures, details)
    for line in table.splitlines():
        log.info("%s", line)
    files = ("evaluation.json", "table.md", "index.html", *pictures)
    log.info("The results are in %s: %s.", out, ", ".join(files))
    return content
