"""Plots of training runs: curves in an image file and in the terminal."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import uniplot
from matplotlib.figure import Figure

from pipeline.core.errors import UserError
from train.engine.config import PlotConfig
from train.engine.curves import Curve, read_rows, training_curve, validation_curve
from train.engine.metrics_log import METRICS

log = logging.getLogger(__name__)

PANEL_INCHES = (8.0, 3.2)
TERMINAL_ROWS = 15
HELD_OUT = " (held-out assets)"
TERMINAL_COLUMNS = 100  # at most, and where the output is no terminal


def plot_runs(cfg: PlotConfig) -> Path:
    """Draw the metrics of some runs, one panel for each metric with a line for each run.

    Returns:
        The image file.

    Raises:
        UserError: If a run has no metrics, or none has one of the metrics.
    """
    panels = read_panels(cfg)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    for number, (metric, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, number)
        colors: dict[str, str] = {}  # of the runs
        for curve in curves:
            run = curve.name.removesuffix(HELD_OUT)
            color = colors.setdefault(run, f"C{len(colors)}")
            dash = "-" if curve.name == run else "--"
            axes.plot(curve.steps, curve.values, dash, color=color, label=curve.name)
        if _is_positive(curves):
            axes.set_yscale("log")
        axes.set(title=metric, xlabel="step")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        if cfg.terminal:
            columns = min(TERMINAL_COLUMNS, shutil.get_terminal_size().columns - 12)
            text = uniplot.plot_to_string(
                xs=[curve.steps for curve in curves],
                ys=[curve.values for curve in curves],
                lines=True,
                y_as_log=_is_positive(curves),
                legend_labels=[curve.name for curve in curves],
                title=metric,
                width=max(columns, 20),
                height=TERMINAL_ROWS,
                color=sys.stdout.isatty(),
            )
            sys.stdout.write(text + "\n")
    out = cfg.out or cfg.runs[0] / "plot.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, dpi=150)
    except ValueError as error:  # an ending that matplotlib does not know
        raise UserError(f"out must end in .png, .svg or .pdf, got {out}") from error
    log.info("The plot is in %s.", out)
    return out


def read_panels(cfg: PlotConfig) -> dict[str, list[Curve]]:
    """Return the curves of every metric: one for each run, and for "loss" also its validation.

    Raises:
        UserError: If a run has no metrics, or no run has one of the metrics.
    """
    names = _labels(cfg.runs)
    rows = {}
    for run, name in zip(cfg.runs, names, strict=True):
        if not (run / METRICS).exists():
            raise UserError(
                f"{run} has no {METRICS}; name the directory of a training run, such as "
                "runs/vae-tiny or runs/structure-tiny/flow"
            )
        rows[name] = read_rows(run / METRICS)
    panels = {}
    for metric in cfg.metrics:
        curves = []
        for name in names:
            curves.append(training_curve(rows[name], metric, name=name, smoothing=cfg.smoothing))
            if metric == "loss":
                curves.append(validation_curve(rows[name], name=name + HELD_OUT))
        panels[metric] = [curve for curve in curves if curve is not None]
        if not panels[metric]:
            known = sorted({key for run in rows.values() for row in run for key in row})
            raise UserError(f"no run has the metric {metric}; there are {', '.join(known)}")
    return panels


def _labels(runs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    for parts in range(1, max(len(run.absolute().parts) for run in runs) + 1):
        labels = ["/".join(run.absolute().parts[-parts:]) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"the runs must differ, got {', '.join(map(str, runs))}")


def _is_positive(curves: Sequence[Curve]) -> bool:
    return all(value > 0 for curve in curves for value in curve.values)
