"""An evaluation as one HTML page: its table, its pictures, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core import html

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(
    out: Path,
    title: str,
    protocol: Mapping[str, Any],
    table: str,
    pictures: Mapping[str, str],
    details: str | None = None,
) -> Path:
    """Write the page `out`/index.html, which needs no other file.

    Args:
        out: The directory of the evaluation.
        title: Heading of the page.
        protocol: How the numbers were measured, by name. Values of None are left out.
        table: The evaluation's table in Markdown, with a heading row.
        pictures: Caption of each PNG file in `out`, by file name.
        details: Further table in Markdown below the pictures, with a heading row.

    Returns:
        The path of the page.
    """
    tables = [_parse(text) for text in (table, details) if text is not None]
    figures = [
        {"caption": caption, "source": html.image_uri((out / name).read_bytes(), "png")}
        for name, caption in pictures.items()
    ]
    return html.write_page(
        out / "index.html",
        TEMPLATE,
        title=title,
        tables=tables,
        pictures=figures,
        protocol=_as_text(protocol),
    )


def _parse(table: str) -> dict[str, Any]:
    """Return the heading and the rows of a Markdown table."""
    heads, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    return {"heads": heads, "rows": rows}


def _as_text(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries that are not None as text. A group of options becomes one line."""
    text = {}
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner} {x}" for inner, x in value.items() if x is not None)
        if value is not None:
            text[name.replace("_", " ")] = str(value)
    return text
