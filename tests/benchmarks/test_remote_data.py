"""The benchmark of remote data keeps what it has measured if a stage fails or is cut short."""

from pathlib import Path

import pytest

from benchmarks.remote_data_config import RemoteData
from benchmarks.remote_data_measure import _recorded, _report, _row_of, _sums

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
    assert first == "| vae base | RuntimeError: out of memory | | | | | | | |"
    assert second == (
        "| dit 256 | 2.00 | 0.20 | 2 | 4 of 6912 | 200 | not measured | 20.0% / - | - |"
    )
    measured |= {"store": _sums([STEP | {"seconds": 1.0}]), "loss": 1.0}
    assert lines_of(cfg, [measured])[0].endswith("| 200 | 100 | 20.0% / 10.0% | +100.0% |")


def test_a_mistake_in_the_benchmark_is_not_recorded_as_a_result():
    with pytest.raises(KeyError), _recorded({"stage": "vae"}):
        raise KeyError("tokens")
