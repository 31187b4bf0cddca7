"""Curves of training runs: their points, and how they are drawn."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from train.engine.config import PlotConfig
from train.engine.curves import smooth
from train.engine.plots import plot_runs, read_panels


def make_run(folder, losses, **others):
    """Write the metrics of a run, with a validation after every second step and a cut last line."""
    folder.mkdir(parents=True)
    lines = []
    for step, loss in enumerate(losses, 1):
        lines.append(json.dumps({"step": step, "loss": loss, **others}))
        if step % 2 == 0:
            lines.append(json.dumps({"step": step, "event": "validation", "loss": 2 * loss}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']), encoding="utf-8")
    return folder


def test_a_panel_has_the_training_and_the_validation_curve_of_each_run(tmp_path):
    runs = (
        make_run(tmp_path / "a" / "flow", [4.0, 3.0, math.nan, 1.0]),
        make_run(tmp_path / "b" / "flow", [8.0, 6.0], lr=0.1),
    )
    panels = read_panels(PlotConfig(runs=runs, metrics=("loss", "lr"), smoothing=0))
    found = {
        metric: {curve.name: (list(curve.steps), list(curve.values)) for curve in curves}
        for metric, curves in panels.items()
    }
    assert found == {
        "loss": {
            "a/flow": ([1, 2, 4], [4.0, 3.0, 1.0]),
            "a/flow (held-out assets)": ([2, 4], [6.0, 2.0]),
            "b/flow": ([1, 2], [8.0, 6.0]),
            "b/flow (held-out assets)": ([2], [12.0]),
        },
        "lr": {"b/flow": ([1, 2], [0.1, 0.1])},
    }


def test_smoothing_is_the_mean_over_a_share_of_the_steps(tmp_path):
    losses = [float(n) for n in np.random.default_rng(0).uniform(1, 2, 100)]
    run = make_run(tmp_path / "run", losses)
    (curve, _) = read_panels(PlotConfig(runs=(run,), smoothing=0.1))["loss"]
    assert list(curve.values) == smooth(losses, 10)
    assert curve.values[50] == pytest.approx(np.mean(losses[41:51]))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_image_and_the_terminal_show_the_curves(tmp_path, capsys, ending):
    run = make_run(tmp_path / "run", [4.0, 3.0, 2.0, 1.0])
    out = plot_runs(PlotConfig(runs=(run,), out=tmp_path / "new" / f"a.{ending}"))
    content = out.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    if ending == "png":
        with Image.open(out) as image:
            assert image.size == (1200, 480)
    text = capsys.readouterr().out
    assert "run (held-out assets)" in text
    assert text.isprintable() or "\x1b" not in text


def test_curves_with_values_of_both_signs_are_drawn(tmp_path, capsys):
    run = make_run(tmp_path / "run", [1.0, -1.0, 0.0, 2.0])
    assert plot_runs(PlotConfig(runs=(run,), terminal=False)) == run / "plot.png"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": ("nowhere",)}, "nowhere has no metrics.jsonl; name the directory of a training"),
        ({"metrics": ("x",)}, "no run has the metric x; there are event, loss, step"),
        ({"runs": ("run", "run")}, "the runs must differ, got"),
        ({"out": "a.nonsense"}, "out must end in .png, .svg or .pdf, got"),
    ],
)
def test_a_bad_request_is_one_line(tmp_path, options, message):
    make_run(tmp_path / "run", [2.0, 1.0])
    chosen = {"runs": ("run",), **options}
    chosen["runs"] = tuple(tmp_path / name for name in chosen["runs"])
    if "out" in chosen:
        chosen["out"] = tmp_path / chosen["out"]
    with pytest.raises(UserError, match=message) as error:
        plot_runs(PlotConfig(**chosen, terminal=False))
    assert "\n" not in str(error.value)
