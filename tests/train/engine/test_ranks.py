"""A command starts one rank per GPU, passes signals on, and fails as its first rank fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pipeline.core.errors import UserError
from pipeline.core.signals import Stopped
from train.engine import ranks
from train.engine.config import RankOptions, check_gpus

PROBE = "tests.train.rank_probe"


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_find_each_other(tmp_path):
    assert ranks.run_ranks(PROBE, [str(tmp_path), "ok"], 2) == 0
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert texts == {"rank-0": "2 3.0", "rank-1": "2 3.0"}


@pytest.mark.parametrize(("ending", "message"), [("fail", ""), ("killed", "killed by SIGKILL")])
def test_a_failed_rank_ends_the_others(tmp_path, ending, message, caplog):
    started = time.monotonic()
    assert ranks.run_ranks(PROBE, [str(tmp_path), ending], 2) == 1
    assert time.monotonic() - started < 50
    assert message in caplog.text


def test_a_signal_reaches_all_ranks(tmp_path):
    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        ranks.run_ranks(PROBE, [str(tmp_path), "wait"], 2)
    assert stopped.value.signum == signal.SIGTERM


@pytest.mark.parametrize(("name", "value"), [("TORCHELASTIC_RUN_ID", "7"), ("WORLD_SIZE", "2")])
def test_a_rank_starts_no_ranks(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert ranks.started_ranks("train.dit", [], RankOptions(device="cuda", gpus=2)) is None


@pytest.mark.parametrize(
    ("device", "gpus", "found", "count"),
    [
        ("auto", "auto", 0, 1),
        ("auto", "auto", 8, 8),
        ("cuda", "auto", 2, 2),
        ("auto", 3, 8, 3),
        ("auto", 1, 0, 1),
        ("cpu", "auto", 8, 1),
        ("cuda:3", "auto", 8, 1),
    ],
)
def test_the_number_of_ranks(device, gpus, found, count, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: found > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    assert ranks.number_of_ranks(device, gpus) == count


def test_impossible_numbers_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus 4 needs 4 GPUs, 2 found; use --gpus auto"):
        ranks.number_of_ranks("auto", 4)
    with pytest.raises(UserError, match="--gpus 2 needs --device auto or cuda, got --device cpu"):
        ranks.number_of_ranks("cpu", 2)
    with pytest.raises(ValueError, match="gpus must be auto, or 1 or more, got 0"):
        check_gpus(0)
