"""Tile sizes are measured once, kept across processes, and results never depend on the cache."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels.conv import gather_gemm, sparse_conv_backward
from kernels.conv.gather_gemm import plain_taps
from kernels.runtime import autotune_cache
from kernels.runtime.autotune_cache import choose, size_class
from tests.kernel_inputs import DEVICE

GPU = SimpleNamespace(is_cuda=True, device="cuda")
KERNELS = (SimpleNamespace(cache_key="source"),)


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Times of the candidates in milliseconds, on a simulated GPU."""
    simulated = {}
    monkeypatch.setattr(autotune_cache, "CACHE", tmp_path / "sub" / "tiles.json")
    another_process(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def milliseconds(launch):
        launch()
        return simulated["last"]

    monkeypatch.setattr(autotune_cache, "_milliseconds", milliseconds)
    return simulated


def another_process(monkeypatch):
    monkeypatch.setattr(autotune_cache, "_choices", None)
    monkeypatch.setattr(autotune_cache, "_entry_names", {})


def launcher(times, launches, milliseconds):
    def launch(candidate):
        launches.append(candidate)
        if milliseconds[candidate] is None:
            raise OutOfResources(200_000, 160_000, "shared memory")
        times["last"] = milliseconds[candidate]

    return launch


def test_the_fastest_is_measured_once_and_kept(times, monkeypatch):
    launches = []
    launch = launcher(times, launches, {"a": 3.0, "b": None, "c": 1.0})
    assert choose(("key",), "abc", launch, GPU, KERNELS) == "c"
    assert choose(("other", 3), "ab", launch, GPU, KERNELS) == "a"
    assert launches == ["a", "b", "c", "a", "b"]
    another_process(monkeypatch)
    assert choose(("key",), "abc", launch, GPU, KERNELS) == "c"
    assert choose(("other", 3), "ab", launch, GPU, KERNELS) == "a"
    assert len(launches) == 5
    assert len(json.loads(autotune_cache.CACHE.read_text(encoding="utf-8"))) == 2
    assert [path.name for path in autotune_cache.CACHE.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"H200 | key": "x"}'])
def test_a_broken_file_only_means_measuring_again(times, text):
    autotune_cache.CACHE.parent.mkdir()
    autotune_cache.CACHE.write_text(text, encoding="utf-8")
    assert choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU, KERNELS) == "b"
    assert 1 in json.loads(autotune_cache.CACHE.read_text(encoding="utf-8")).values()


def test_a_choice_that_no_longer_exists_is_measured_again(times, monkeypatch):
    assert choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU, KERNELS) == "b"
    monkeypatch.setattr(
        autotune_cache,
        "_choices",
        {key: 7 for key in json.loads(autotune_cache.CACHE.read_text(encoding="utf-8"))},
    )
    assert choose(("key",), "ab", launcher(times, [], {"a": 1.0, "b": 2.0}), GPU, KERNELS) == "a"


@pytest.mark.parametrize(
    ("candidates", "sources"),
    [("bca", ["f", "g"]), ("abc", ["f", "h"]), ("abc", ["f"])],
    ids=["other candidates", "another source", "one kernel less"],
)
def test_choices_of_other_code_are_measured_again(candidates, sources, times, monkeypatch):
    kernels = [SimpleNamespace(cache_key=source) for source in ("f", "g")]
    launches = []
    assert (
        choose(
            ("key",), "abc", launcher(times, launches, {"a": 3.0, "b": 1.0, "c": 2.0}), GPU, kernels
        )
        == "b"
    )
    another_process(monkeypatch)
    kernels = [SimpleNamespace(cache_key=source) for source in sources]
    launch = launcher(times, launches, {"a": 3.0, "b": 2.0, "c": 1.0})
    assert choose(("key",), candidates, launch, GPU, kernels) == "c"
    assert len(launches) == 6


def test_a_choice_depends_on_every_kernel_that_a_candidate_launches(monkeypatch):
    kernels_of_choices = []

    def record(key, candidates, launch, like, kernels):
        kernels_of_choices.append(kernels)
        return candidates[0]

    for module in (gather_gemm, sparse_conv_backward):
        monkeypatch.setattr(module, "choose", record)
    x, weight = torch.ones(1, 16, device=DEVICE), torch.ones(27, 16, 16, device=DEVICE)
    table = torch.full((1, 27), -1, dtype=torch.int32, device=DEVICE)
    gather_gemm.gather_gemm(x, weight, None, table, plain_taps(1))
    sparse_conv_backward.weight_grad(x, x, table, plain_taps(1))
    by_tap = sparse_conv_backward._weight_grad_by_tap
    assert kernels_of_choices == [
        (gather_gemm._gather_gemm,),
        (sparse_conv_backward._weight_grad, by_tap),
    ]


def test_a_directory_that_cannot_be_written(times, caplog):
    autotune_cache.CACHE.parent.write_text("a file", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert (
            choose(("key",), "ab", launcher(times, [], {"a": 2.0, "b": 1.0}), GPU, KERNELS) == "b"
        )
    assert "The tile sizes cannot be saved in" in caplog.text


def test_the_default_where_nothing_may_be_measured(times, monkeypatch):
    launches = []
    launch = launcher(times, launches, {"a": 2.0, "b": 1.0})
    assert choose(("key",), "ab", launch, torch.zeros(1), KERNELS) == "a"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(("key",), "ab", launch, GPU, KERNELS) == "a"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(("key",), "ab", launch, GPU, KERNELS) == "a"
    assert launches == []
    assert not autotune_cache.CACHE.exists()


def test_size_classes_are_factors_of_four():
    assert [size_class(n) for n in (0, 1, 3, 4, 15, 16, 64)] == [1, 1, 1, 2, 2, 3, 4]
