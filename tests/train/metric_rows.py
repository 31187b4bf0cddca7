"""Reads what a run wrote to metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def all_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of steps and of events, in the order in which they were written."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def metric_rows(out: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of steps, or those of an event such as "validation"."""
    return [row for row in all_rows(out) if row.get("event") == event]
