"""The profile of a training step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training_measure import profile_step


@pytest.mark.gpu
def test_a_profile_names_kernels_and_counts_waits():
    x = torch.randn(512, 512, device="cuda")

    def step() -> None:
        y = x @ x
        float((y + 1).sum())

    report = profile_step(step, shown=2)
    assert report["launches"] >= 3
    assert report["waits"] >= 1
    assert 0 < report["busy_ms"] < 1000
    assert len(report["kernels"]) == 2
