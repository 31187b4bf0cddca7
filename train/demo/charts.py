"""Loss curves as SVG, drawn from a run's metrics: no plotting library, nothing to load."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 520, 220  # of the whole chart
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26  # margins
COLORS = ("#3567b0", "#c98a1b", "#2f8f6b", "#c0483d", "#7a5ba6")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart; dots where there are few points."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def curves_of(metrics: Path, names: Sequence[str]) -> list[Curve]:
    """The named numbers of a metrics.jsonl, smoothed over a fiftieth of the run, and its validation loss."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    curves = []
    for name in names:
        found = [(row["step"], row[name]) for row in steps if _shown(row.get(name))]
        if found:
            values = smoothed([value for _, value in found], max(1, len(found) // 50))
            curves.append(Curve(name=name, steps=[step for step, _ in found], values=values))
    held = [
        (row["step"], row["loss"])
        for row in rows
        if row.get("event") == "validation" and _shown(row.get("loss"))
    ]
    if held:
        curves.append(
            Curve(
                name="loss, held-out assets",
                steps=[s for s, _ in held],
                values=[v for _, v in held],
            )
        )
    return curves


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place."""
    total, means = 0.0, []
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means


def chart(curves: Sequence[Curve]) -> str:
    """An SVG with a logarithmic axis of values; "" if there is nothing positive to show."""
    values = [value for curve in curves for value in curve.values if value > 0]
    if not values:
        return ""
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02
    last = max(max(curve.steps) for curve in curves)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(value) - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" fill="#647084">']
    for value in _ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e3e7ee"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for step in (0, last // 2, last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step}</text>')
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        points = [
            (x(step), y(value))
            for step, value in zip(curve.steps, curve.values, strict=True)
            if value > 0
        ]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(points) <= 12:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{color}"/>' for px, py in points
            ]
        parts.append(
            f'<text x="{WIDTH - RIGHT - 4}" y="{TOP + 12 + 14 * number}" text-anchor="end" fill="{color}">'
        )
        parts.append(f"{curve.name}</text>")
    return "".join(parts) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten, at most about six."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(low), math.ceil(high) + 1)
        found = [
            m * 10.0**e for e in exponents for m in steps if low <= math.log10(m * 10.0**e) <= high
        ]
        if len(found) <= 6:
            return found
    return found[:: max(1, len(found) // 6)]


def _shown(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
