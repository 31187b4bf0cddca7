"""The memory benchmark keeps what it has measured if a mode fails."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import low_memory
from benchmarks.low_memory import SIZES, main, table, write_export
from model.inference.generator import Generator
from pipeline.core.errors import RunError, UserError


def test_modes_that_fail_are_recorded_and_the_file_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "stages").mkdir()  # no export is written
    monkeypatch.setattr(sys, "executable", "false")  # the process of every mode fails
    assert main(["--folder", str(tmp_path), "--out", str(tmp_path / "low.json")]) == 1
    rows = json.loads((tmp_path / "low.json").read_text(encoding="utf-8"))["rows"]
    assert [row["mode"] for row in rows] == ["usual", "low"]
    assert all("ended with 1" in row["failed"] for row in rows)
    assert capsys.readouterr().out.count("failed: its process ended with 1") == 2


@pytest.mark.parametrize("hashes", ["aa", "ab"])
def test_modes_that_decode_different_values_are_an_error(tmp_path, monkeypatch, hashes):
    (tmp_path / "stages").mkdir()
    numbers = dict.fromkeys(("load_seconds", "first_seconds", "seconds", "peak_gb"), 1.0)
    numbers |= {"gpu_peak_gb": None, "gpu_reserved_gb": None}
    measured = {"usual": hashes[0], "low": hashes[1]}
    monkeypatch.setattr(
        low_memory,
        "measure_in_child",
        lambda _cfg, _folder, mode: {"mode": mode, "sha256": measured[mode], **numbers},
    )
    if len(set(hashes)) == 1:
        assert main(["--folder", str(tmp_path)]) == 0
    else:
        with pytest.raises(RunError, match="decoded different values"):
            main(["--folder", str(tmp_path)])


def test_a_missing_directory_of_the_result_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="in a directory that does not exist; create it"):
        main(["--out", str(tmp_path / "missing" / "low.json")])


def test_the_table_shows_the_gpu_only_where_there_is_one():
    row = {"mode": "low", "load_seconds": 1, "first_seconds": 2, "seconds": 3, "peak_gb": 4}
    cpu = row | {"gpu_peak_gb": None, "gpu_reserved_gb": None}
    gpu = row | {"gpu_peak_gb": 5, "gpu_reserved_gb": 6}
    assert table([cpu, gpu]).splitlines()[2:] == [
        "| low | 1.0 | 2.0 | 3.0 | 4.00 |  |  |",
        "| low | 1.0 | 2.0 | 3.0 | 4.00 | 5.00 | 6.00 |",
    ]


@pytest.mark.slow  # it imports transformers
def test_the_written_export_has_both_resolutions_of_one_file_in_bf16(tmp_path):
    weights = write_export(tmp_path, SIZES["tiny"], torch.device("cpu"))
    assert set(weights) == {"dinov2", "structure", "dit_64", "vae_64"}
    generator = Generator.load(tmp_path / "stages", torch.device("cpu"))
    assert generator.resolutions == [64, 128]
    files = [tmp_path / "stages" / f"dit_{size}" / "model.safetensors" for size in (64, 128)]
    assert files[0].samefile(files[1])
    dit = generator.stages.dits[128]
    stored = load_file(files[1])
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim > 1} == {torch.bfloat16}
    assert {parameter.dtype for parameter in dit.dit.parameters()} == {torch.float32}
    # Layers that training starts at zero have weights, so that each stage changes the result.
    written = [*stored.values(), *generator.vaes[128].parameters()]
    assert all(tensor.any() for tensor in written if tensor.ndim > 1)
