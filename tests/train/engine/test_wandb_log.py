"""Weights & Biases through its own package, without a network."""

import importlib
import json
import struct
import sys

import pytest

from pipeline.core.errors import UserError
from tests.train.toy_model import run
from train.engine.wandb_log import ID_FILE, WandbLog

BLOCK = 32768  # bytes; records are split at the ends of blocks, as in LevelDB's log


def records(path):
    """Yield the records of a file of W&B's package: a header of 7 bytes, then LevelDB's log."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(out):
    """Return what W&B's package has kept of each of a run's processes."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    kept = []
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        rows = []
        for data in records(path):
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.FromString(data).history.item
            }
            rows += [items] if items else []
        kept.append((path.stem, rows))
    return kept


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(offline, tmp_path):
    out = tmp_path / "run"
    for steps in (10, 20):
        run(out, steps=steps, validate_every=10, wandb_project="tests")
    identifier = (out / ID_FILE).read_text(encoding="utf-8")
    (first, before), (second, after) = history(out)
    assert {first, second} == {f"run-{identifier}"}
    assert [row["step"] for row in before if "train/loss" in row] == [5, 10]
    assert [row["step"] for row in after if "train/loss" in row] == [15, 20]
    assert [row["step"] for row in [*before, *after] if "validation/loss" in row] == [10, 20]
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {row["step"]: row["loss"] for row in map(json.loads, lines) if "event" not in row}
    for row in [*before, *after]:
        if "train/loss" in row:
            assert row["train/loss"] == losses[row["step"]]


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs the package wandb; pip install 'sparse3d\[wandb\]"):
        WandbLog(tmp_path, "tests", {})


def test_a_service_that_cannot_be_used_is_one_line(monkeypatch, tmp_path):
    wandb = importlib.import_module("wandb")

    def refuse(**_options):
        raise wandb.errors.UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"api_key not configured \(no-tty\); log in with") as error:
        WandbLog(tmp_path, "tests", {})
    assert "\n" not in str(error.value)
