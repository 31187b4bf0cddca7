"""GroupNorm per asset against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import group_norm
from tests.kernel_inputs import DEVICE, assert_no_worse, run

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(DEVICE, dtype)


def starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)


def formula(
    x: Tensor, sizes: list[int], groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    parts = []
    for part in x.split(sizes):
        grouped = part.unflatten(1, (groups, -1))
        centred = grouped - grouped.mean((0, 2), keepdim=True)
        parts.append(
            (centred / (centred.square().mean((0, 2), keepdim=True) + eps).sqrt()).flatten(1)
        )
    y = torch.cat([p.nan_to_num() for p in parts]) * weight + bias
    return y * y.sigmoid() if silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("sizes", "groups", "C"), [([30, 0, 20], 2, 6), ([1], 1, 4), ([5, 7], 3, 3), ([0, 0], 2, 4)]
)
def test_the_reference_is_the_formula(sizes, groups, C, silu):
    x, weight, bias = draw(sum(sizes), C) * 3 + 2, draw(C, seed=1), draw(C, seed=2)
    result = group_norm(
        x, starts(sizes), groups, weight, bias, eps=1e-3, silu=silu, backend="reference"
    )
    torch.testing.assert_close(
        result, formula(x, sizes, groups, weight, bias, 1e-3, silu), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("sizes", "groups", "C"),
    [
        ([1500, 0, 1048, 3], 2, 6),
        ([1024, 1024], 5, 5),
        ([0, 7], 1, 130),
        ([0, 0], 2, 4),
        ([300], 32, 64),
    ],
)
def test_value_and_gradients(sizes, groups, C, silu, dtype):
    """Assets that end inside, between and right at the chunks of 1024 rows."""
    offsets = starts(sizes)
    x = draw(C, sum(sizes), dtype=dtype).T * 3 + 2  # not contiguous
    inputs = [x, draw(C, seed=1, dtype=dtype), draw(C, seed=2, dtype=dtype)]
    assert_no_worse(
        lambda x, w, b: group_norm(x, offsets, groups, w, b, silu=silu, backend="triton"),
        lambda x, w, b: group_norm(x, offsets, groups, w, b, silu=silu, backend="reference"),
        inputs,
    )


def test_variance_of_values_far_from_zero():
    x = draw(3000, 4, dtype=torch.float32) + 1000.0
    one, zero = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    y = group_norm(x, starts([3000]), 2, one, zero, backend="triton")
    exact = formula(x.double(), [3000], 2, one.double(), zero.double(), 1e-5, False)
    torch.testing.assert_close(
        y.double(), exact, rtol=0, atol=2e-3
    )  # the rounding of x itself is 6e-5


def test_backward_is_bit_identical():
    offsets = starts([1500, 700])
    inputs = [
        draw(2200, 6, dtype=torch.float32),
        draw(6, dtype=torch.float32),
        draw(6, dtype=torch.float32),
    ]

    def step():
        return run(
            lambda x, w, b: group_norm(x, offsets, 3, w, b, silu=True, backend="triton"), inputs
        )

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_as_a_custom_operator():
    offsets = starts([5, 4])
    x, w, b = (draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((9, 4), (4,), (4,)))
    torch.library.opcheck(torch.ops.sparse3d.group_norm.default, (x, offsets, 2, w, b, 1e-5, True))
    compiled = torch.compile(
        lambda x: group_norm(x, offsets, 2, w, b, silu=True, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), group_norm(x, offsets, 2, w, b, silu=True, backend="triton"))


def test_gradcheck():
    inputs = [t.cpu().requires_grad_() for t in (draw(9, 4), draw(4, seed=1), draw(4, seed=2))]
    offsets = starts([4, 5]).cpu()
    assert torch.autograd.gradcheck(
        lambda x, w, b: group_norm(x, offsets, 2, w, b, silu=True), inputs
    )


def valid_arguments() -> dict:
    x, one = torch.zeros(5, 4), torch.ones(4)
    return dict(
        x_NC=x, asset_starts_A1=torch.tensor([0, 5]).int(), groups=2, weight_C=one, bias_C=one
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NC": torch.zeros(5)}, r"x_NC must be floating \[N, C\], got torch.float32 \[5\]"),
        ({"groups": 3}, "groups must divide the 4 channels, got 3"),
        ({"groups": 0}, "groups must divide the 4 channels, got 0"),
        (
            {"asset_starts_A1": torch.tensor([0, 5])},
            r"asset_starts_A1 must be int32 \[A \+ 1\].*got torch.int64 \[2\]",
        ),
        ({"asset_starts_A1": torch.tensor([0]).int()}, r"with A >= 1, got torch.int32 \[1\]"),
        ({"eps": -1.0}, r"eps must be finite and not negative, got -1\.0"),
        ({"weight_C": torch.ones(3)}, r"weight_C must be \[4\], got \[3\]"),
        (
            {"bias_C": torch.ones(4).half()},
            "bias_C must be torch.float32 as x_NC .*got torch.float16",
        ),
        ({"bias_C": torch.ones(4, device="meta")}, "bias_C must be on x_NC's device cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm(**(valid_arguments() | change))
