"""Curves of training runs, read from their metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOOTHING_SHARE = 0.02  # of a run's points, over which a curve is smoothed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart.

    Args:
        name: Label of the line.
        steps: Training step of each point, ascending.
        values: Value of each point.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl. A last line that was cut off is left out."""
    rows = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def training_curve(
    rows: Sequence[dict[str, Any]],
    metric: str,
    *,
    name: str | None = None,
    smoothing: float = SMOOTHING_SHARE,
) -> Curve | None:
    """Return the curve of a metric of the training steps.

    Args:
        rows: The rows of metrics.jsonl.
        metric: Name of the metric. Steps in which it is missing or not finite have no point.
        name: Label of the curve. None takes the name of the metric.
        smoothing: Share of the points over which the mean is taken, 0 for none.

    Returns:
        The curve, or None if it has no points.
    """
    points = [
        (row["step"], row[metric])
        for row in rows
        if "event" not in row and _is_finite(row.get(metric))
    ]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    width = max(1, int(smoothing * len(points)))
    return Curve(name=name or metric, steps=steps, values=smooth(values, width))


def validation_curve(
    rows: Sequence[dict[str, Any]], *, name: str = "loss, held-out assets"
) -> Curve | None:
    """Return the loss on held-out assets, or None if the run has no validation."""
    points = [
        (row["step"], row["loss"])
        for row in rows
        if row.get("event") == "validation" and _is_finite(row.get("loss"))
    ]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    return Curve(name=name, steps=steps, values=values)


def read_curves(metrics: Path, names: Sequence[str]) -> list[Curve]:
    """Read the curves of some metrics and the validation loss, as far as a run has them."""
    rows = read_rows(metrics)
    curves = [*(training_curve(rows, name) for name in names), validation_curve(rows)]
    return [curve for curve in curves if curve is not None]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last `width` values at each place, or of all values before it."""
    total = 0.0
    means = []
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
