"""Timing of alternative launches without a GPU: order, checks, end, table and better launches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import launches_timing
from benchmarks.launch_alternatives import ALTERNATIVES, Step
from benchmarks.launches_timing import Measurement, Timer, better_launches, table
from benchmarks.ssa_config import LaunchesConfig
from kernels import BlockIndex, token_order
from kernels.attention import scaled_keys
from kernels.attention.launches import CHOSEN, Launch
from pipeline.core.errors import UserError
from tests.child_python import run_python
from tests.kernel_inputs import random_coords
from tests.kernels.attention.test_ssa import make_inputs

PRESENT = Launch(rows=4, registers=100)
ROW = Measurement(
    kernel="gates", launch="rows 1", tokens=5, present_ms=2.0, ms=1.0, ratio=0.5, error=0.25,
    registers=40, spilled=0, shared=128,
)  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """Two steps whose kernel "gates" fails, is wrong or differs where its launch says so."""
    changes = ({"warps": 1}, {"warps": 2}, {"warps": 8}, {"warps": 16}, {"registers": 100})
    monkeypatch.setitem(ALTERNATIVES, "gates", changes)
    monkeypatch.setattr(launches_timing, "compiled_resources", lambda *_: {"registers": 7})

    def gates(launch):
        if launch is not None and launch.warps == 1:
            raise RuntimeError("out of registers\nmore")
        return (torch.full((4,), 1.0 + (launch is not None and launch.warps == 8) / 100),)

    def step(tokens, present=PRESENT):
        coords = torch.tensor([[0, 0, 0, z] for z in range(tokens)], dtype=torch.int32)
        index = BlockIndex.from_coords(coords, 1)
        return Step(index, [], (), {"gates": present}, {"gates": gates})

    return [step(3), step(5), step(7, replace(PRESENT, warps=16))]


def token_set(tokens):
    coords = random_coords([tokens], 16)
    return coords[token_order(coords)]


class FakeTimer(Timer):
    def time(self, first, second):
        assert torch.equal(first()[0], second()[0])
        return 2.0, 1.0, 0.5


def timer(steps, seconds_left):
    wrong = replace(PRESENT, warps=2)
    return FakeTimer(steps, lambda x: 1.5 if x.gates == wrong else 0.5, 1.0, seconds_left)


def test_a_launch_is_timed_only_if_it_is_right(steps):
    rows = list(timer(steps, lambda: 1.0).alternatives("gates"))
    assert [(row.launch, row.tokens, row.failed) for row in rows] == [
        ("warps 1", 0, "out of registers"),
        ("warps 2", 0, "error 1.5 of the tolerance"),
        ("warps 8", 3, "results differ by 1.0e-02"),
        ("warps 16", 3, ""),
        ("warps 16", 5, ""),
    ]
    assert [row.ratio for row in rows] == [0.0, 0.0, 0.0, 0.5, 0.5]  # 7 tokens have it already
    assert rows[-1].registers == 7
    assert better_launches(rows, steps[1]).gates == Launch(rows=4, registers=100, warps=16)
    assert better_launches(rows, steps[2]) == CHOSEN


def test_no_measurement_begins_after_the_time(steps):
    left = iter([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    rows = list(timer(steps, lambda: next(left, 0.0)).alternatives("gates"))
    assert [row.launch for row in rows] == ["warps 1", "warps 2", "warps 8", "warps 16"]
    assert list(timer(steps, lambda: 0.0).alternatives("gates")) == []


def test_a_launch_must_be_better_at_every_size(steps):
    def rows(*ratios):
        return [
            Measurement(kernel="gates", launch="warps 16", tokens=i, ratio=ratio)
            for i, ratio in enumerate(ratios)
        ]

    assert better_launches(rows(0.97, 0.99), steps[0]) == CHOSEN
    assert better_launches(rows(0.97, 0.9), steps[0]) != CHOSEN
    whole = [Measurement(kernel="whole forward", launch="range_bytes 1 MiB", ratio=0.5)]
    assert better_launches(whole, steps[0]) == CHOSEN


def test_the_table():
    failed = Measurement(kernel="gates", launch="warps 1", failed="out of registers")
    lines = table([ROW, failed]).splitlines()
    assert lines[2:] == [
        "| gates | rows 1 | 5 | 2 | 1 | 0.500 | equal | 0.25 | 40, 0, 128 |",
        "| gates | warps 1 | - | - | - | out of registers | equal | 0.00 | -, -, - |",
    ]
    assert {line.count("|") for line in lines} == {10}


def test_the_json_holds_every_field(tmp_path):
    launches_timing._write(tmp_path / "new" / "launches.json", {"gpu": "none"}, [ROW])
    read = json.loads((tmp_path / "new" / "launches.json").read_text(encoding="utf-8"))
    assert read["gpu"] == "none"
    assert Measurement(**read["rows"][0]) == ROW


def test_unknown_kernels_and_a_missing_gpu_are_named():
    with pytest.raises(UserError, match=r"kernels must be among block_score, .*, got soup"):
        launches_timing.check_names(["gates", "soup"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = run_python("-m", "benchmarks.ssa", "launches", exit_code=2)
    assert ended.stderr.strip().splitlines()[-1].endswith("needs a CUDA device, and none was found")


@pytest.mark.slow
def test_the_command_measures_checks_and_writes(monkeypatch, tmp_path, capsys):
    """The whole command on small fp16 steps in the interpreter, with a clock in place of a GPU."""
    monkeypatch.setattr(scaled_keys, "FOLDED_DTYPES", {torch.float16})
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(launches_timing, "require_gpu", lambda: None)
    monkeypatch.setattr(launches_timing, "compiled_resources", lambda *_: {"registers": 7})
    monkeypatch.setattr(launches_timing, "capture", lambda function: function)
    machine = dict.fromkeys(("gpu", "torch", "triton", "commit"), "none")
    monkeypatch.setattr(launches_timing, "gpu_and_versions", lambda: machine)
    monkeypatch.setattr(launches_timing, "paired_milliseconds", lambda *_: (2.0, 1.0, 0.5))
    monkeypatch.setattr(launches_timing, "surface_coords", lambda *_: token_set(40))
    monkeypatch.setattr(launches_timing, "token_sets", lambda _: [token_set(30), token_set(50)])

    def inputs(index, _, sizes):
        return make_inputs(index, sizes.heads, sizes.kv_heads, sizes.head_size, torch.float16)

    monkeypatch.setattr(launches_timing, "make_inputs", inputs)
    monkeypatch.setitem(ALTERNATIVES, "gates", ({"rows": 4},))
    monkeypatch.setitem(ALTERNATIVES, "block_score", ({"tiles": 4}, {"emulated": 4}))
    out = tmp_path / "launches.json"
    launches_timing.time_launches(
        LaunchesConfig(
            kernels=("gates", "block_score"), heads=4, head_size=16, top_k=2, total_s=500, out=out
        )
    )
    read = json.loads(out.read_text(encoding="utf-8"))
    assert read["present_error"] <= 1
    assert [(row["kernel"], row["launch"], row["tokens"]) for row in read["rows"]] == [
        *(("gates", "rows 4", n) for n in (30, 50)),
        *(("block_score", "tiles 4", n) for n in (30, 50)),
        *(("block_score", "emulated 4", n) for n in (30, 50)),
        *(
            (f"whole {way}", "better launches", n)
            for n in (30, 50)
            for way in ("forward", "backward")
        ),
    ]
    assert [row["failed"] for row in read["rows"]] == [""] * 10
    assert read["rows"][2]["difference"] == 0.0  # tiles do not change the sums
    assert "better: SsaLaunches(block_score=Launch(" in capsys.readouterr().out
