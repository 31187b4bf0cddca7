"""GroupNorm per asset against its formula and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import group_norm
from tests.numerics import DEVICE


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)


def formula(x: Tensor, sizes: list[int], groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    parts = []
    for part in x.split(sizes):
        grouped = part.unflatten(1, (groups, -1))
        centred = grouped - grouped.mean((0, 2), keepdim=True)
        parts.append((centred / (centred.square().mean((0, 2), keepdim=True) + eps).sqrt()).flatten(1))
    y = torch.cat([p.nan_to_num() for p in parts]) * weight + bias
    return y * y.sigmoid() if silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("sizes", "groups", "C"), [([30, 0, 20], 2, 6), ([1], 1, 4), ([5, 7], 3, 3), ([0, 0], 2, 4)])
def test_the_reference_is_the_formula(sizes, groups, C, silu):
    x, weight, bias = draw(sum(sizes), C) * 3 + 2, draw(C, seed=1), draw(C, seed=2)
    found = group_norm(
        x,
        starts(sizes),
        groups,
        weight,
        bias,
        eps=1e-3,
        silu=silu,
    )
    torch.testing.assert_close(found, formula(x, sizes, groups, weight, bias, 1e-3, silu), rtol=1e-12, atol=1e-12)


def test_gradcheck():
    inputs = [t.cpu().requires_grad_() for t in (draw(9, 4), draw(4, seed=1), draw(4, seed=2))]
    offsets = starts([4, 5]).cpu()
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, offsets, 2, w, b, silu=True), inputs)


def good() -> dict:
    x, one = torch.zeros(5, 4), torch.ones(4)
    return dict(x_NC=x, asset_starts_A1=torch.tensor([0, 5]).int(), groups=2, weight_C=one, bias_C=one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NC": torch.zeros(5)}, r"x_NC must be floating \[N, C\], got torch.float32 \[5\]"),
        ({"groups": 3}, "groups must divide the 4 channels, got 3"),
        ({"groups": 0}, "groups must divide the 4 channels, got 0"),
        ({"asset_starts_A1": torch.tensor([0, 5])}, r"asset_starts_A1 must be int32 \[A \+ 1\].*got torch.int64 \[2\]"),
        ({"asset_starts_A1": torch.tensor([0]).int()}, r"with A >= 1, got torch.int32 \[1\]"),
        ({"eps": -1.0}, r"eps must be finite and not negative, got -1\.0"),
        ({"weight_C": torch.ones(3)}, r"weight_C must be \[4\], got \[3\]"),
        ({"bias_C": torch.ones(4).half()}, "bias_C must be torch.float32 as x_NC .*got torch.float16"),
        ({"bias_C": torch.ones(4, device="meta")}, "bias_C must be on x_NC's device cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm(**(good() | change))
