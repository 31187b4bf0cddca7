"""Tile sizes are measured once, remembered across processes, and never needed."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels import tuning
from kernels.tuning import choose, size_class

GPU = SimpleNamespace(is_cuda=True, device="cuda")


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Milliseconds of each candidate, on a GPU that is not there."""
    taken = {}
    monkeypatch.setattr(tuning, "CACHE", tmp_path / "sub" / "tiles.json")
    monkeypatch.setattr(tuning, "_known", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def milliseconds(launch):
        launch()
        return taken["last"]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return taken


def launcher(times, launches, milliseconds):
    def launch(candidate):
        launches.append(candidate)
        if milliseconds[candidate] is None:
            raise OutOfResources(200_000, 160_000, "shared memory")
        times["last"] = milliseconds[candidate]

    return launch


def test_the_fastest_is_found_once_and_remembered(times, monkeypatch):
    launches = []
    launch = launcher(times, launches, {"a": 3.0, "b": None, "c": 1.0})
    assert choose(("key",), "abc", launch, GPU) == "c"
    assert choose(("other", 3), "ab", launch, GPU) == "a"
    assert launches == ["a", "b", "c", "a", "b"]
    monkeypatch.setattr(tuning, "_known", None)  # another process
    assert choose(("key",), "abc", launch, GPU) == "c"
    assert choose(("other", 3), "ab", launch, GPU) == "a"
    assert len(launches) == 5
    assert len(json.loads(tuning.CACHE.read_text())) == 2
    assert [path.name for path in tuning.CACHE.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"H200 | key": "x"}'])
def test_a_broken_file_only_means_measuring_again(times, text):
    tuning.CACHE.parent.mkdir()
    tuning.CACHE.write_text(text)
    assert choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU) == "b"
    assert 1 in json.loads(tuning.CACHE.read_text()).values()


def test_a_choice_that_no_longer_exists_is_measured_again(times, monkeypatch):
    assert choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU) == "b"
    monkeypatch.setattr(tuning, "_known", {key: 7 for key in json.loads(tuning.CACHE.read_text())})
    assert choose(("key",), "ac", launcher(times, [], {"a": 1.0, "c": 2.0}), GPU) == "a"


def test_a_directory_that_cannot_be_written(times, caplog):
    tuning.CACHE.parent.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU) == "b"
    assert "cannot remember tile sizes" in caplog.text


def test_the_default_where_nothing_may_be_measured(times, monkeypatch):
    launches = []
    launch = launcher(times, launches, {"a": 2.0, "b": 1.0})
    assert choose(("key",), "ab", launch, torch.zeros(1)) == "a"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(("key",), "ab", launch, GPU) == "a"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(("key",), "ab", launch, GPU) == "a"
    assert launches == []
    assert not tuning.CACHE.exists()


def test_size_classes_are_factors_of_four():
    assert [size_class(n) for n in (0, 1, 3, 4, 15, 16, 64)] == [1, 1, 1, 2, 2, 3, 4]
