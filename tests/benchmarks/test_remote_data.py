"""The benchmark of remote data keeps what it has measured if a stage fails or is cut short."""

from pathlib import Path

import pytest

from benchmarks.remote_data_config import RemoteData
from benchmarks.remote_data_measure import (
    _recorded,
    _report,
    _row_of,
    _seconds_of_run,
    _sums,
    load_batches,
)
from pipeline.core.errors import RunError
from tests.train.analytic_builds import make_build, tiny_training
from tests.train.metric_rows import metric_rows
from train.engine.distributed import World
from train.stages.vae.run import train_vae

STEP = {"seconds": 0.5, "tokens": 100, "samples": 2, "data_s": 0.1, "loss": 1.0}


def lines_of(cfg: RemoteData, rows: list[dict]) -> list[str]:
    machine = {"gpu": None, "python": "3.11"}
    results = {"machine": machine, "cpu_cores": 2, "command": [], "total_s": 1.0, "rows": rows}
    return _report(cfg, results).splitlines()[-len(rows) :]


def test_a_stage_that_fails_does_not_hide_the_other():
    cfg = RemoteData(out=Path("out"))
    failed, measured = (_row_of(cfg, stage) for stage in ("vae", "dit"))
    with _recorded(failed):
        raise RuntimeError("out of memory\nand more")
    disk = _sums([STEP, STEP])
    measured |= {"stored_gb": 2.0, "cache_gb": 0.2, "disk": disk}
    first, second = lines_of(cfg, [failed, measured])
    assert first == "| vae base | RuntimeError: out of memory | | | | | | | | | | | |"
    assert second == (
        "| dit 256 | 2.00 | 0.20 | 2 | 4 of 6912 | 200 | not measured | 20.0% / - "
        "| - | - | - | - | - |"
    )
    rates = {"first_step_s": 2.0, "mb_per_s": 100.0, "requests_per_s": 9.0, "in_flight": None}
    measured |= {"store": _sums([STEP | {"seconds": 1.0}]) | rates, "loss": 0.5}
    assert lines_of(cfg, [measured])[0].endswith(
        "| 200 | 100 | 20.0% / 10.0% | 2.0 | 100.0 | 9.0 | - | +50.0% |"
    )


def test_a_mistake_in_the_benchmark_is_not_recorded_as_a_result():
    with pytest.raises(KeyError), _recorded({"stage": "vae"}):
        raise KeyError("tokens")


def test_the_stages_share_the_time_that_is_left():
    cfg = RemoteData(out=Path("out"), seconds=15, total_s=270)
    assert _seconds_of_run(cfg, left_s=200, stages=3) == 15
    assert _seconds_of_run(cfg, left_s=120, stages=3) == pytest.approx(8)
    assert _seconds_of_run(cfg, left_s=60, stages=3) == pytest.approx(4)
    with pytest.raises(RunError, match="30 of 270 s were left"):
        _seconds_of_run(cfg, left_s=30, stages=3)


def test_the_loader_alone_loads_the_batches_of_the_run(tmp_path):
    build = make_build(tmp_path / "build", resolutions=(32,))
    trained = tiny_training(build, tmp_path / "trained", steps=4, workers=2)
    train_vae(trained, World())
    loaded = tiny_training(build, tmp_path / "loaded", steps=4, workers=2)
    assert load_batches(loaded, World()) == 4
    rows = [
        [(row["tokens"], row["samples"]) for row in metric_rows(out) if "samples" in row]
        for out in (trained.out, loaded.out)
    ]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]
