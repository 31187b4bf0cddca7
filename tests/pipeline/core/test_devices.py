"""The `--device` option: which names are valid, and which device each of them is."""

import pytest
import torch

from pipeline.core.devices import check_device, choose_device
from pipeline.core.errors import UserError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_valid_names_are_returned_unchanged(name):
    assert check_device(name) == name


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:0\n"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r'device must be "auto", "cpu", "cuda" or "cuda:N", got'):
        check_device(name)
    with pytest.raises(UserError, match=r'--device must be "auto"'):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "rank", "device"),
    [
        ("auto", 0, "cuda:0"),
        ("auto", 1, "cuda:1"),
        ("cuda", 1, "cuda:1"),
        ("cuda:1", 0, "cuda:1"),
        ("cpu", 1, "cpu"),
    ],
)
def test_a_name_and_a_rank_choose_the_current_device(two_gpus, name, rank, device):
    assert choose_device(name, rank) == torch.device(device)
    # Triton launches kernels on the current device.
    assert two_gpus == [torch.device(device).index] * (device != "cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_missing_gpu_is_an_error_of_one_line():
    with pytest.raises(UserError, match=r"--device cuda:2 needs a CUDA device, 2 found; use"):
        choose_device("cuda:2")
    with pytest.raises(UserError, match=r"--device cuda:1 names one GPU.*process 1"):
        choose_device("cuda:1", 1)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device cuda needs a CUDA device, 0 found"):
        choose_device("cuda")
