"""Loss curves of training runs as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.engine.curves import Curve

WIDTH = 520  # of the whole chart, in SVG units; so are the numbers below
HEIGHT = 220
LEFT = 46  # margins around the curves
RIGHT = 10
TOP = 26  # the names of the curves stand there
BOTTOM = 26
COLORS = ("#3567b0", "#c98a1b", "#2f8f6b", "#c0483d", "#7a5ba6")
MOST_MARKERS = 12  # a curve with at most this many points has a dot at each


def chart(curves: Sequence[Curve]) -> str:
    """Draw curves over a logarithmic axis of values.

    Returns:
        An SVG element, or "" if no value is positive.
    """
    values = [value for curve in curves for value in curve.values if value > 0]
    if not values:
        return ""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.05 * (high - low) + 0.02
    low, high = low - margin, high + margin
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
    names = []
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        points = [
            (x(step), y(value))
            for step, value in zip(curve.steps, curve.values, strict=True)
            if value > 0
        ]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(points) <= MOST_MARKERS:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{color}"/>' for px, py in points
            ]
        gap = ' dx="14"' if number else ""
        names.append(f'<tspan{gap} fill="{color}">{curve.name}</tspan>')
    parts.append(f'<text x="{LEFT}" y="12">{"".join(names)}</text>')
    return "".join(parts) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Return at most about six round values between 10^low and 10^high."""
    ticks: list[float] = []
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        candidates = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [value for value in candidates if low <= math.log10(value) <= high]
        if len(ticks) <= 6:
            return ticks
    return ticks[:: max(1, len(ticks) // 6)]
