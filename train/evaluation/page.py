"""An evaluation as one HTML page: its table, its pictures, and what the numbers mean."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2


def write_page(
    out: Path, title: str, protocol: Mapping[str, Any], table: str, pictures: Mapping[str, str]
) -> Path:
    """Write out/index.html, which needs no other file; returns its path.

    table: Markdown as the evaluation writes it; pictures: file in `out` -> caption.
    """
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("train", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("evaluation.html.j2")
    heads, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    shown = [
        {
            "caption": caption,
            "source": "data:image/png;base64," + b64encode((out / name).read_bytes()).decode(),
        }
        for name, caption in pictures.items()
    ]
    page = out / "index.html"
    page.write_text(
        template.render(
            title=title, heads=heads, rows=rows, pictures=shown, protocol=_flat(protocol)
        ),
        encoding="utf-8",
    )
    return page


def _flat(protocol: Mapping[str, Any]) -> dict[str, str]:
    """What is known, as text; groups of options on one line."""
    text = {}
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner} {x}" for inner, x in value.items() if x is not None)
        if value is not None:
            text[name.replace("_", " ")] = str(value)
    return text
