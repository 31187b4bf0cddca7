"""Loss curves: which points are drawn, and where."""

import json
import re

import numpy as np

from train.demo.charts import chart
from train.engine.curves import Curve, read_curves, smooth


def test_a_chart_has_a_point_for_each_step_on_a_logarithmic_axis(tmp_path):
    rows = [{"step": n, "loss": 10.0 ** (-n / 50)} for n in range(1, 101)] + [
        {"step": 9, "loss": float("nan")}
    ]
    rows.append({"step": 100, "event": "validation", "loss": 0.02})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    curves = read_curves(tmp_path / "metrics.jsonl", ("loss", "absent"))
    assert [curve.name for curve in curves] == ["loss", "loss, held-out assets"]
    svg = chart(curves)
    (points,) = re.findall(r'polyline points="([^"]+)" fill="none" stroke="#3567b0"', svg)
    xy = np.array([pair.split(",") for pair in points.split()], float)
    assert len(xy) == 100
    assert (np.diff(xy[:, 1]) > 0).all(), "the curve falls as the loss falls"
    assert np.abs(np.diff(xy[5:, 1], n=2)).max() < 0.11, "the curve is straight"
    assert ">0.1<" in svg
    assert chart([Curve(name="none", steps=[1], values=[0.0])]) == ""
    np.testing.assert_allclose(smooth([1, 2, 3, 4], 2), [1, 1.5, 2.5, 3.5])
