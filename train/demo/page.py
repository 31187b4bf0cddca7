"""The demo's report: one self-contained HTML page of pictures, curves and every number that was measured."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core import html
from train.demo.charts import chart, curves_of
from train.engine.checkpoint import provenance

TEMPLATE = Path(__file__).with_name("page.html.j2")
CURVES = (
    ("SS-VAE: bricks to latents and back", "vae", ("loss", "in", "ext", "sharp")),
    ("Occupancy VAE of the structure stage", "structure/vae", ("bce", "dice")),
    ("Structure flow: image to cells", "structure/flow", ("loss",)),
    ("SS-DiT: image and cells to latents", "dit", ("loss",)),
)


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """What one command of the demo cost."""

    name: str
    command: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_page(
    out: Path, build: Path, taken: Sequence[StepTaken], *, size: str, seconds: float
) -> Path:
    """Write out/index.html from what the steps left in `out` and in the build; returns its path."""
    content = page_content(out, build, taken, size=size, seconds=seconds)
    return html.write_page(out / "index.html", TEMPLATE, **content)


def page_content(
    out: Path, build: Path, taken: Sequence[StepTaken], *, size: str, seconds: float
) -> dict[str, Any]:
    """Everything the template shows."""
    seen, unseen = (_generation(out / name) for name in ("generation", "unseen"))
    reconstruction = json.loads((out / "reconstruction" / "evaluation.json").read_text())
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
    return {
        "size": size,
        "build_report": build_report(build / "report" / "index.html"),
        "tiles": tiles,
        "encoder": seen["protocol"]["image_encoder"],
        "sampling": seen["protocol"]["sampling"],
        "seen": seen,
        "unseen": unseen,
        "reconstruction": reconstruction,
        "reconstructions": _picture(out / "reconstruction" / "reconstructions.png"),
        "cells": [
            {"name": name, "image": _picture(path)}
            for name, path in (
                ("stored, decoded", _latest_sample(out / "structure" / "vae")),
                ("image, generated, stored", _latest_sample(out / "structure" / "flow")),
            )
            if path is not None
        ],
        "curves": [
            {
                "title": title,
                "svg": chart(curves_of(out / run / "metrics.jsonl", names)),
                **_run(out / run),
            }
            for title, run, names in CURVES
        ],
        "steps": [
            {
                "name": step.name,
                "command": step.command,
                "seconds": f"{step.seconds:.0f}",
                "cpu": f"{step.cpu_seconds:.0f}",
                "memory": f"{step.peak_bytes / 1e9:.2f}",
            }
            for step in taken
        ],
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}",
        "provenance": provenance(),
        "configs": [
            (
                run,
                json.dumps(
                    json.loads((out / run / "latest" / "config.json").read_text()), indent=1
                ),
            )
            for _, run, _ in CURVES
        ],
    }


def _generation(folder: Path) -> dict[str, Any]:
    """An evaluation, each row with its picture."""
    found = json.loads((folder / "evaluation.json").read_text())
    for row in found["rows"]:
        path = folder / "meshes" / f"{row['uid']}.png"
        row["image"] = _picture(path) if path.exists() else ""
    return found


def _run(folder: Path) -> dict[str, Any]:
    """Steps and seconds of a training run, from its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    held = [row for row in rows if row.get("event") == "validation"]
    return {
        "steps": len(steps),
        "seconds": f"{sum(row['seconds'] for row in steps):.0f}",
        "last": f"{steps[-1]['loss']:.3f}" if steps else "",
        "held": f"{held[-1]['loss']:.3f}" if held else "",
    }


def _latest_sample(run: Path) -> Path | None:
    found = sorted(run.glob("samples/step-*/cells.png"))
    return found[-1] if found else None


def _picture(path: Path) -> str:
    """An image file as a data URI, small."""
    with Image.open(path) as image:
        file = BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=82, method=4)
    return html.image_uri(file.getvalue(), "webp")


def build_report(page: Path) -> str:
    """Return the inside of the `main` element of the build's own report.

    Both pages have the style of the same base template, so the demo's page can include it whole.
    """
    main = re.search(r"<main>(.*)</main>", page.read_text(), re.DOTALL)
    assert main is not None, f"{page} has no main element"
    return main[1]
