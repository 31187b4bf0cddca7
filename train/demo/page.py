"""The demo's report: one self-contained HTML page of pictures, loss curves and measurements."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core import html
from train.demo.charts import chart
from train.demo.held_out import HeldOutRow
from train.demo.held_out import page_content as held_out_content
from train.demo.runner import CommandCost
from train.engine.checkpoint import provenance
from train.engine.curves import read_curves

TEMPLATE = Path(__file__).with_name("page.html.j2")
# Title, directory and charted metrics of each training run.
RUNS = (
    ("SS-VAE: reconstruction of bricks", "vae", ("loss", "in", "ext", "sharp")),
    ("Occupancy VAE of the structure stage", "structure/vae", ("bce", "dice")),
    ("Structure flow: image to cells", "structure/flow", ("loss",)),
    ("SS-DiT: image and cells to latents", "dit", ("loss",)),
)


def write_page(
    out: Path,
    build: Path,
    costs: Sequence[CommandCost],
    held_out: Sequence[HeldOutRow],
    *,
    size: str,
    seconds: float,
) -> Path:
    """Write the page `out`/index.html, which needs no other file.

    Args:
        out: Directory of the demo, with the outputs of all its commands.
        build: Directory of the build, with its report.
        costs: The cost of each command, in the order in which they are listed.
        held_out: Meshes of the shipped weights. Empty if the installation does not have them.
        size: Name of the demo's size.
        seconds: Wall time of the demo.

    Returns:
        The path of the page.
    """
    seen, unseen = (_generation(out / name) for name in ("generation", "unseen"))
    summary = seen["summary"]
    tiles = [
        {"value": f"{seconds / 60:.1f} min", "label": f"in all, {os.cpu_count()} cores"},
        {
            "value": f"{summary['nearest_is_right']:.0f}%",
            "label": f"recognised among {summary['candidates']} assets",
        },
        {"value": f"{summary['iou']:.0f}%", "label": "IoU of generated solids"},
        {"value": f"{summary['silhouette_iou']:.0f}%", "label": "silhouette IoU with the image"},
        {"value": f"{summary['closed']:.0f}%", "label": "generated meshes closed"},
        {"value": f"{summary['seconds']:.1f} s", "label": "a generated mesh"},
    ]
    cells = (
        ("stored cells, decoded cells", _latest_sample(out / "structure" / "vae")),
        ("image, generated cells, stored cells", _latest_sample(out / "structure" / "flow")),
    )
    content = {
        **held_out_content(held_out),
        "size": size,
        "build_report": build_report(build / "report" / "index.html"),
        "tiles": tiles,
        "encoder": seen["protocol"]["image_encoder"],
        "sampling": seen["protocol"]["sampling"],
        "seen": seen,
        "unseen": unseen,
        "reconstruction": json.loads(
            (out / "reconstruction" / "evaluation.json").read_text(encoding="utf-8")
        ),
        "reconstructions": _webp_uri(out / "reconstruction" / "reconstructions.png"),
        "cells": [
            {"name": name, "image": _webp_uri(path)} for name, path in cells if path is not None
        ],
        "runs": [
            {
                "title": title,
                "svg": chart(read_curves(out / run / "metrics.jsonl", names)),
                **_run_summary(out / run),
            }
            for title, run, names in RUNS
        ],
        "costs": [
            {
                "name": cost.name,
                "command_line": cost.command_line,
                "seconds": f"{cost.seconds:.0f}",
                "cpu": f"{cost.cpu_seconds:.0f}",
                "memory": f"{cost.peak_bytes / 1e9:.2f}",
            }
            for cost in costs
        ],
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}",
        "provenance": provenance(),
        "configs": [(run, _config_text(out / run)) for _, run, _ in RUNS],
    }
    return html.write_page(out / "index.html", TEMPLATE, **content)


def _generation(folder: Path) -> dict[str, Any]:
    """Return an evaluation of generated meshes, with a picture in each row."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for row in evaluation["rows"]:
        path = folder / "meshes" / f"{row['uid']}.png"
        row["image"] = _webp_uri(path) if path.exists() else ""
    return evaluation


def _run_summary(run: Path) -> dict[str, Any]:
    """Return the steps, the seconds and the last losses of a training run."""
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [line for line in lines if "event" not in line]
    validations = [line for line in lines if line.get("event") == "validation"]
    return {
        "steps": len(steps),
        "seconds": f"{sum(line['seconds'] for line in steps):.0f}",
        "last_loss": f"{steps[-1]['loss']:.3f}" if steps else "",
        "validation_loss": f"{validations[-1]['loss']:.3f}" if validations else "",
    }


def _config_text(run: Path) -> str:
    return json.dumps(
        json.loads((run / "latest" / "config.json").read_text(encoding="utf-8")), indent=1
    )


def _latest_sample(run: Path) -> Path | None:
    samples = sorted(run.glob("samples/step-*/cells.png"))
    return samples[-1] if samples else None


def _webp_uri(path: Path) -> str:
    """Return an image file as a data URI. It is compressed with loss to keep the page small."""
    with Image.open(path) as image:
        file = BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=82, method=4)
    return html.image_uri(file.getvalue(), "webp")


def build_report(page: Path) -> str:
    """Return the inside of the `main` element of the build's own report.

    Both pages have the style of the same base template, so the demo's page can include it whole.
    """
    main = re.search(r"<main>(.*)</main>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert main is not None, f"{page} has no main element"
    return main[1]
