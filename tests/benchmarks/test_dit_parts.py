"""The parts of the benchmark of transformer blocks that need no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.dit_parts import image_tokens, relative_error, surface_level


def test_inputs_have_the_wanted_numbers_of_tokens():
    image = image_tokens(3, 7, 16, torch.device("cpu"))
    assert image.batch_size == 3
    assert image.starts.tolist() == [0, 7, 14, 21]
    assert image.asset_of.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    level = surface_level(300, 2, 16, torch.device("cpu"))
    assert level.batch_size == 2
    assert all(290 <= n <= 310 for n in level.asset_starts.diff().tolist())


def test_errors_are_relative_to_the_norm_of_all_tensors():
    expected = [torch.tensor([3.0]), None, torch.tensor([4.0, 0.0])]
    found = [torch.tensor([3.0]), None, torch.tensor([4.0, 0.5])]
    assert relative_error(found, expected) == pytest.approx(0.1)
