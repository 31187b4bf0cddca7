"""The log lines of a training run: seconds per step, time left, and what is left out of them."""

import json
import logging

import pytest

from train.engine import metrics_log
from train.engine.config import LoopConfig
from train.engine.metrics_log import METRICS, MetricsLog


@pytest.fixture
def lines(caplog):
    """The log lines so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_has_the_mean_seconds_since_the_last_line_and_the_time_left(tmp_path, lines):
    written = MetricsLog(tmp_path, LoopConfig(steps=100, log_every=2), first=10)
    for step, seconds in ((11, 9.0), (12, 1.0), (13, 2.0), (14, 4.0)):
        metrics = {"loss": 0.5, "tokens": 7, "tokens_per_s": 12345.0, "mfu": 0.31}
        written.log_step(step, {**metrics, "seconds": seconds})
    written.close()
    assert lines() == [
        "Step 12/100: loss 0.5  12.3k tokens/s  MFU 31.0%  5 s/step  0:07:20 left",
        "Step 14/100: loss 0.5  12.3k tokens/s  MFU 31.0%  3 s/step  0:04:18 left",
    ]
    rows = [
        json.loads(row) for row in (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["step"], row["seconds"]) for row in rows] == [
        (11, 9.0),
        (12, 1.0),
        (13, 2.0),
        (14, 4.0),
    ]


def test_a_time_limit_bounds_the_time_left(tmp_path, monkeypatch, lines):
    now = [1000.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    written = MetricsLog(tmp_path, LoopConfig(steps=1000, log_every=1, max_minutes=2), first=0)
    now[0] += 30
    written.log_step(1, {"seconds": 30.0})
    now[0] += 100
    written.log_step(2, {"seconds": 100.0})
    written.close()
    assert [line.rpartition("step  ")[2] for line in lines()] == ["0:01:30 left", "0:00:00 left"]


def test_the_last_step_has_a_line_whatever_the_cadence(tmp_path, lines):
    written = MetricsLog(tmp_path, LoopConfig(steps=3, log_every=50), first=0)
    for step in (1, 2, 3):
        written.log_step(step, {"loss": 0.5, "seconds": 2.0})
    written.close()
    assert lines() == ["Step 3/3: loss 0.5  2 s/step  0:00:00 left"]


def test_a_rank_other_than_the_first_writes_and_logs_nothing(tmp_path, lines):
    written = MetricsLog(tmp_path / "run", LoopConfig(steps=1, log_every=1), first=0, enabled=False)
    written.log_step(1, {"seconds": 1.0})
    written.log_event(1, "validation", {"loss": 1.0})
    written.close()
    assert lines() == []
    assert not (tmp_path / "run").exists()
